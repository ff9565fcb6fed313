"""Pieces of a CSV that say plainly what their cells are, taken apart by array operations and by pyarrow.

Plain is a piece in which every quotation mark begins a cell, ends one, or is doubled inside of one, and every row has as many
cells as the first. There pyarrow and Python's `csv` read the same. Of anything else pyarrow gives no reason by row, or it takes
in silence what `csv` refuses: that is left to the reader that names rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv
from numpy.typing import NDArray

QUOTE, FEED, RETURN, SPACE, DELETE = (ord(character) for character in '"\n\r \x7f')
LARGEST = 1 << 30  # bytes that pyarrow takes at once; a cell of so many is a mark that was never closed


@dataclass(frozen=True)
class Piece:
    """Bytes of a table in UTF-8 that begin with a row, and what cuts them: positions of bytes."""

    text: bytes
    data: NDArray[np.uint8]
    quotes: NDArray[np.int64]
    row_ends: NDArray[np.int64]  # line feeds outside of quotation marks

    @classmethod
    def of(cls, text: bytes) -> Piece:
        """The piece that a text is."""
        data = np.frombuffer(text, np.uint8)
        quotes, feeds = np.flatnonzero(data == QUOTE), np.flatnonzero(data == FEED)
        return cls(text, data, quotes, feeds[~_inside(quotes, feeds)])

    def whole_rows(self) -> Piece:
        """The piece up to the end of its last whole row."""
        end = int(self.row_ends[-1]) + 1 if len(self.row_ends) else 0
        kept = self.quotes[: np.searchsorted(self.quotes, end)]
        return Piece(self.text[:end], self.data[:end], kept, self.row_ends)

    def behind(self, rows: int) -> Piece:
        """The piece without its first rows."""
        begin = int(self.row_ends[rows - 1]) + 1 if rows <= len(self.row_ends) else len(self.text)
        return Piece.of(self.text[begin:])

    def __len__(self) -> int:
        """Rows; of the last the line end may be missing."""
        return len(self.row_ends) + (len(self.text) > 0 and self.text[-1:] != b"\n")

    def is_quoted_plainly(self, separator: str) -> bool:
        """Whether every quotation mark and every line end is where it can mean one thing alone."""
        opening, closing = self.quotes[::2], self.quotes[1::2]
        if len(opening) != len(closing) or len(self.data) > LARGEST:
            return False
        # A piece begins and ends where a row does, as a line feed before it and one behind it would say.
        around = np.pad(self.data, 1, constant_values=FEED)
        returns = np.flatnonzero(self.data == RETURN)
        returns = returns[~_inside(self.quotes, returns)]
        cuts = [ord(separator), FEED, QUOTE]
        return bool(
            np.isin(around[opening], cuts).all()
            and np.isin(around[closing + 2], [*cuts, RETURN]).all()
            and (around[returns + 2] == FEED).all()
        )

    def columns(self, separator: str, width: int, wanted: Sequence[int]) -> Mapping[int, pa.Array] | None:
        """Cells of columns by number, (rows,) strings; None where a row has more or fewer than `width` cells, or says nothing."""
        cuts = np.flatnonzero(self.data == ord(separator))
        cuts = cuts[~_inside(self.quotes, cuts)]
        ends = self.row_ends if len(self) == len(self.row_ends) else np.append(self.row_ends, len(self.text))
        if (np.bincount(np.searchsorted(ends, cuts), minlength=len(ends)) != width - 1).any():
            return None
        says = (self.data > SPACE) & (self.data < DELETE) & (self.data != QUOTE) & (self.data != ord(separator))
        if not np.logical_or.reduceat(says, np.concatenate([[0], ends[:-1] + 1])).all():
            return None
        names = [str(number) for number in range(width)]
        table = pyarrow.csv.read_csv(
            pa.py_buffer(self.text),
            pyarrow.csv.ReadOptions(use_threads=False, block_size=len(self.text) + 1, column_names=names),
            pyarrow.csv.ParseOptions(delimiter=separator, newlines_in_values=True, ignore_empty_lines=False),
            pyarrow.csv.ConvertOptions(
                check_utf8=False, column_types=dict.fromkeys(names, pa.string()), include_columns=[str(n) for n in wanted]
            ),
        )
        if len(table) != len(ends):
            return None
        return {number: table.column(str(number)).combine_chunks() for number in wanted}


def _inside(quotes: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether positions lie between an opening quotation mark and its closing one."""
    inside: NDArray[np.bool_] = np.searchsorted(quotes, positions) % 2 == 1
    return inside
