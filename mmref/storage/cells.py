"""Cells of tables that a user gives, one by one or by the column, whatever format they come from.

A cell is what the table says, or the row is left out and named: text stays text (the id `007` is not 7, someone may be called
Nan), a number is the text that it is written as (2.0 of a column with missing values is `2`), and what is no text at all
(true, a mapping, bytes of an image) is none. Missing are empty cells, null, and the number NaN, which pandas writes for it.
"""

from __future__ import annotations

import functools
import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmref.errors import SampleError

EXACT_UP_TO = 2**53  # a larger whole number that is kept as a float may be another one
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"  # no white space to Python, and no text


class Row(NamedTuple):
    """A row of a table. Its cells are read by name; SampleError says what of it cannot be used."""

    number: int  # as a spreadsheet or editor counts: of a CSV, the names of the columns are row 1
    cells: Mapping[str, Any]
    fault: str = ""  # why none of it can be used

    def cell(self, column: str) -> Any:
        """The cell as it is, None where it is missing. Raises SampleError."""
        if self.fault:
            raise SampleError(self.fault)
        value = self.cells.get(column)
        if isinstance(value, _Unread):
            raise SampleError(f"{column}: {value.reason}")
        return None if isinstance(value, (float, Decimal)) and math.isnan(value) else value

    def text(self, column: str) -> str:
        """A name, id or place, "" where it is missing. Raises SampleError."""
        value = self.cell(column)
        return str(value) if isinstance(value, (date, uuid.UUID)) else _text(column, value)

    def needed(self, column: str) -> str:
        """As `text`, of a column that a row cannot do without. Raises SampleError."""
        if not (text := self.text(column)):
            raise SampleError(f"no {column}")
        return text

    def texts(self, column: str) -> list[str]:
        """Captions: a text, or a list of them. Raises SampleError."""
        value = self.cell(column)
        found = [_text(column, each) for each in (value if isinstance(value, list) else [value])]
        return [text for text in found if text]

    def value(self, column: str) -> Any:
        """The cell as it goes into JSON, in which neither NaN nor infinity exist. Raises SampleError."""
        return _json(column, self.cell(column))


@dataclass(frozen=True)
class Batch:
    """Rows of a table that lie one behind the other."""

    numbers: NDArray[np.int64]  # (n,) as `Row.number`
    cells: Mapping[str, pa.Array | list[Any]]  # of each column n cells; values of Python where Arrow has no type for them
    faults: Mapping[int, str] = field(default_factory=dict)  # position -> why none of the row can be used

    @classmethod
    def of(cls, rows: Sequence[Row], columns: Sequence[str]) -> Batch:
        """Rows that were read one by one."""
        cells = {name: [row.cells.get(name) for row in rows] for name in columns}
        faults = {position: row.fault for position, row in enumerate(rows) if row.fault}
        return cls(np.array([row.number for row in rows], np.int64), cells, faults)

    def rows(self) -> Iterator[Row]:
        """The rows, one by one."""
        columns = {name: cells if isinstance(cells, list) else python_values(cells) for name, cells in self.cells.items()}
        for position, number in enumerate(self.numbers.tolist()):
            fault = self.faults.get(position, "")
            yield Row(number, {name: cells[position] for name, cells in columns.items()}, fault)

    def texts(self, column: str) -> tuple[pa.Array, dict[int, str]]:
        """What `Row.text` says of a column: (n,) strings, "" where a cell is missing; and why the others cannot be used."""
        cells = self.cells[column]
        if not isinstance(cells, list) and (plain := _as_strings(cells)) is not None:
            return _clean(column, plain)
        return _each(range(len(self.numbers)), (row.text for row in self._alone(column)), column)

    def text_lists(self, column: str) -> tuple[pa.Array, NDArray[np.int64], dict[int, str]]:
        """What `Row.texts` says of a column: the texts of all rows end to end, how many each row has (n,), and why the others
        cannot be used."""
        cells, n = self.cells[column], len(self.numbers)
        if not isinstance(cells, list) and _as_strings(cells) is not None:
            texts, faults = self.texts(column)
            rows = np.arange(n)
        elif not isinstance(cells, list) and is_list(cells.type) and _as_strings(cells.flatten()) is not None:
            texts, wrong = _clean(column, _as_strings(cells.flatten()))
            rows = np.repeat(np.arange(n), pc.fill_null(pc.list_value_length(cells), 0).to_numpy(zero_copy_only=False))
            faults = {int(rows[position]): why for position, why in reversed(wrong.items())}
        else:
            found, faults = [], {}
            for position, row in enumerate(self._alone(column)):
                try:
                    found += [(position, text) for text in row.texts(column)]
                except SampleError as error:
                    faults[position] = str(error)
            rows = np.array([position for position, _ in found], np.int64)
            texts = pa.array([text for _, text in found], pa.string())
        said = pc.not_equal(texts, "").to_numpy(zero_copy_only=False)
        return texts.filter(pa.array(said)), np.bincount(rows[said], minlength=n), faults

    def values(self, columns: Sequence[str]) -> tuple[list[dict[str, Any]], dict[int, str]]:
        """What `Row.value` says of columns, by row."""
        found: list[dict[str, Any]] = []
        faults: dict[int, str] = {}
        alone = Batch(self.numbers, {name: self.cells[name] for name in columns})
        for position, row in enumerate(alone.rows()):
            try:
                found.append({name: row.value(name) for name in columns})
            except SampleError as error:
                found.append({})
                faults[position] = str(error)
        return found, faults

    def _alone(self, column: str) -> Iterator[Row]:
        """Rows of a column; what is wrong with others is told elsewhere."""
        return Batch(self.numbers, {column: self.cells[column]}).rows()


def line_texts(lines: Iterable[str], kind: str) -> list[str]:
    """Captions of a text file, one a line, each as a cell of a table would be read. Raises SampleError that names the line."""
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_text(kind, line))
        except SampleError as error:
            raise SampleError(f"line {number}: {error}") from None
    return [text for text in found if text]


def is_list(kind: pa.DataType) -> bool:
    """Whether cells of a type are lists, of any or of a fixed length."""
    t = pa.types
    return any(
        is_one(kind) for is_one in (t.is_list, t.is_large_list, t.is_fixed_size_list, t.is_list_view, t.is_large_list_view)
    )


# -- cells -----------------------------------------------------------------------------------------------------------


class _Unread(NamedTuple):
    """In place of a cell that its file format cannot give."""

    reason: str


def _text(column: str, value: Any) -> str:
    """A text or number as text, "" where it is missing. Raises SampleError."""
    if isinstance(value, str):
        if "\0" in value:
            raise SampleError(f"{column} holds a NUL character: {value[:80]!r}")
        text = _encodable(column, value).strip().strip("\ufeff")  # of files with a mark, joined into one
        return text if text.isascii() or text.strip(INVISIBLE) else ""
    if isinstance(value, bytes):  # a binary column of Parquet
        try:
            return _text(column, value.decode())
        except UnicodeDecodeError:
            raise SampleError(f"{column} holds {len(value):,} bytes that are no text in UTF-8") from None
    if value is None or (isinstance(value, Integral) and not isinstance(value, bool)):
        return "" if value is None else str(value)
    number = isinstance(value, (Real, Decimal)) and not isinstance(value, bool)
    if number and math.isnan(value):
        return ""
    if number and not isinstance(value, Decimal) and float(value).is_integer():
        if abs(float(value)) <= EXACT_UP_TO:
            return str(int(float(value)))
        raise SampleError(f"{column} is {value!r}, a float that cannot hold such a whole number: make it a text")
    if number and math.isfinite(value):
        return str(value)
    raise SampleError(f"{column} is {str(value)[:80]!r} ({type(value).__name__}): make it a text")


def _each(positions: Sequence[int], reads: Iterable[Callable[[str], str]], column: str) -> tuple[pa.Array, dict[int, str]]:
    """Texts of cells that are read one by one, and why some cannot be: position -> reason."""
    texts: list[str] = []
    faults: dict[int, str] = {}
    for position, read in zip(positions, reads, strict=True):
        try:
            texts.append(read(column))
        except SampleError as error:
            texts.append("")
            faults[int(position)] = str(error)
    return pa.array(texts, pa.string()), faults


def _clean(column: str, texts: pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """Texts as `_text` gives them. It is asked for those that begin or end with something else than a printed character of
    ASCII, or hold a NUL: all others stay as they are."""
    odd = pc.match_substring_regex(texts, r"^[^!-~]|[^!-~]$|\x00")
    positions = np.flatnonzero(odd.to_numpy(zero_copy_only=False))
    if not len(positions):
        return texts, {}
    each = texts.take(pa.array(positions)).to_pylist()
    cleaned, faults = _each(positions.tolist(), (functools.partial(_read_text, text) for text in each), column)
    return pc.replace_with_mask(texts, odd, cleaned), faults


def _read_text(value: Any, column: str) -> str:
    return _text(column, value)


def _as_strings(cells: pa.Array) -> pa.Array | None:
    """Cells of text or whole numbers as strings, "" for the missing; None where only their values say what they are."""
    kind = cells.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_null(kind)):
        return None
    try:
        strings = cells.cast(pa.string())
        strings.validate(full=True)  # text of Parquet that is no UTF-8
    except (pa.ArrowInvalid, ValueError):
        return None
    return pc.fill_null(strings, "")


def _encodable(column: str, text: str) -> str:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise SampleError(f"{column} cannot be written, it holds half a character: {text[:80]!a}") from None
    return text


def _json(column: str, value: Any) -> Any:
    if isinstance(value, str):
        return _encodable(column, value)
    if isinstance(value, bytes):
        return _text(column, value)
    if isinstance(value, float):
        if math.isinf(value):
            raise SampleError(f"{column} is {value}, which JSON does not have")
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        return {_encodable(column, str(name)): _json(column, each) for name, each in value.items()}
    return [_json(column, each) for each in value] if isinstance(value, list | tuple) else value


def python_values(column: Any) -> list[Any]:
    """Values of an Arrow array; where one has no Python value (text that is no UTF-8, the year 20000), that one alone is none."""
    if pa.types.is_float32(column.type):  # 0.1 of 32 bits is not 0.10000000149011612
        column = column.cast(pa.string()).cast(pa.float64())
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):
        return [_cell(scalar) for scalar in column]


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        return _Unread(f"cannot be read: {error}")
