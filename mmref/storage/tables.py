"""Tables that a user gives: CSV, TSV, JSON lines and Parquet, as `mmref shards build table` and `mmref index` read them."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import functools
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmref.errors import MMRefError, SourceError
from mmref.storage.cells import Batch, Row
from mmref.storage.files import folder_of, matching_files
from mmref.storage.parquet import BATCH_ROWS, open_parquet, parquet_batches
from mmref.storage.plain_csv import LARGEST, Piece
from mmref.storage.plain_json import count_lines, holds_no_other, json_kinds, plain_columns
from mmref.storage.texts import line_blocks

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
PARQUET = (".parquet",)
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
LONGEST_CELL = 2**31 - 1  # characters; a quotation mark that is never closed is found at the end of the file
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"  # in the name of a folder
FIRST = 1 << 16  # bytes of a CSV that are read for the names of its columns


@dataclass(frozen=True)
class Table:
    """Names of the columns, and the rows: `batches(columns)` reads these distinct columns from the beginning."""

    place: str
    names: list[str]
    batches: Callable[[Sequence[str]], Iterator[Batch]]

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The rows, one by one."""
        for batch in self.batches(list(dict.fromkeys(columns))):
            yield from batch.rows()

    def require(self, options: Mapping[str, str], wrong: type[MMRefError] = SourceError) -> None:
        """Raise `wrong` for the first column that is not there. options: column -> what names it on the command line."""
        for name, option in options.items():
            if name not in self.names:
                near = difflib.get_close_matches(name, self.names, 1, 0.5)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                names = ", ".join(self.names)
                raise wrong(f"{self.place} has no column {name!r}, only {names}. {hint}Name yours with {option}.")

    def caption_columns(self) -> list[str]:
        """Where captions are, unless the user says so: `caption`, else the list column `captions`; [] where there is neither."""
        names: list[str] = [name for name in ("caption", "captions") if name in self.names]
        return names[:1]


def read_table(place: str) -> Table:
    """A table by the ending of its name; a folder or a pattern of Parquet files is one, too, with the rows of all. Raises
    SourceError where it is missing, damaged or of another kind."""
    if (files := table_files(place)) != [place]:
        return _parquet_files(place, files)
    readers = dict(zip(TABLE_ENDINGS, (_csv, _csv, _json_lines, _json_lines, _parquet), strict=True))
    ending = os.path.splitext(place)[1].lower()
    if ending not in readers:
        raise SourceError(f"{place}: the ending says what a table is; expected one of {', '.join(readers)}.")
    table = readers[ending](place)
    if twice := [name for name, count in Counter(table.names).items() if count > 1 and name]:
        raise SourceError(f"{place} has {table.names.count(twice[0])} columns called {twice[0]!r}. Rename one of them.")
    return table


def table_files(place: str) -> list[str]:
    """The files of a table: itself, or the Parquet files that a pattern or a folder names."""
    other = os.path.splitext(place)[1].lower() in TABLE_ENDINGS and not place.lower().endswith(PARQUET)
    return [place] if other else parquet_files(place) or [place]


def parquet_files(place: str) -> list[str]:
    """The Parquet files that a file's path, a glob or a folder names, in order; [] where it is none of these."""
    return matching_files(place, PARQUET)


def told_by_folders(place: str, files: Sequence[str]) -> list[dict[str, str | None]]:
    """Of each file of a place the columns that its folders are named after, as in `split=train/part-0.parquet`: Spark, Dask,
    pandas and pyarrow divide a table so, and leave these columns out of its files. A name that not all have is no column."""
    top = folder_of(place, PARQUET)
    found: list[dict[str, str | None]] = []
    for file in files:
        folders = file.removeprefix(top).split("/")[:-1]
        told = (folder.partition("=") for folder in folders if "=" in folder)
        found.append({unquote(name): None if value == NO_VALUE else unquote(value) for name, _, value in told if name})
    common = set.intersection(*map(set, found)) if found else set()
    return [{name: value for name, value in told.items() if name in common} for told in found]


def check_same_columns(columns: Mapping[str, Sequence[str]]) -> None:
    """Raise SourceError where files have other columns than the first. columns: of each file, by its path."""
    (first, names), *others = columns.items()
    for place, found in others:
        if lost := sorted(set(names) ^ set(found)):
            raise SourceError(
                f"{place} and {first} do not both have the column {lost[0]!r}: give files of one kind, with a glob."
            )


# -- formats ---------------------------------------------------------------------------------------------------------


def _csv(place: str) -> Table:
    """Cells of a CSV are text. A row may end early, as spreadsheets write it; its other cells are missing."""
    separator = "\t" if place.lower().endswith(".tsv") else ","
    records = _records(place, separator, line_blocks(place, SourceError, FIRST))
    header = next(records, None)
    if header is not None and "".join(header.cells).strip() in ("sep=", f"sep={separator}"):  # written for Excel above the names
        header = next(records, None)
    if header is None:
        raise SourceError(f"{place} is empty: the first line must name the columns.")
    if header.fault:
        raise SourceError(f"{place}, row {header.number}, which names the columns: {header.fault}.")
    names = [name.strip() for name in header.cells]
    while len(names) > 1 and not names[-1]:  # a spreadsheet's empty columns
        names.pop()
    for other in SEPARATORS:
        if len(names) == 1 and other != separator and other in names[0]:
            ending = "" if other != "\t" else ", or call it .tsv"
            raise SourceError(
                f"{place} has one column, called {names[0]!r}: its cells are separated by {SEPARATORS[other]}, those of a "
                f"{place[-4:].lower()} are by {SEPARATORS[separator]}. Save it with {SEPARATORS[separator]}{ending}."
            )

    cells = _CsvColumns(place, separator, names, len(header.cells), header.number)
    return Table(place, names, functools.partial(_csv_batches, cells))


class _Record(NamedTuple):
    number: int
    cells: list[str]
    fault: str


def _records(place: str, separator: str, blocks: Iterable[bytes], before: int = 0, lines: int = 0) -> Iterator[_Record]:
    """Rows of a CSV that are not empty, the names of the columns first. Blocks are of whole lines; so many rows and lines lie
    before them.

    Raises SourceError for wrong quotation marks that take more than a line with them: nobody knows where the row ends.
    """
    csv.field_size_limit(LONGEST_CELL)
    texts = itertools.chain.from_iterable(io.StringIO(block.decode(), newline="") for block in blocks)
    reader = csv.reader(texts, delimiter=separator, strict=True)
    for number in itertools.count(before + 1):
        line, fault = reader.line_num + 1, ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells, fault = [], f"a quotation mark is not closed, or one inside of a cell is not doubled ({error})"
            if reader.line_num > line:
                raise SourceError(
                    f"{place}, row {number}: from line {lines + line} to line {lines + reader.line_num} {fault}. Write a "
                    'quotation mark inside of a cell as "", or save the table as JSON lines.'
                ) from None
        if fault or any(map(str.strip, cells)):
            yield _Record(number, cells, fault)


@dataclass(frozen=True)
class _CsvColumns:
    """How the rows of a CSV become cells."""

    place: str
    separator: str
    names: list[str]
    width: int  # cells of the row of names; those without a name hold nothing
    names_at: int  # its number

    def one_by_one(self, columns: Sequence[str], blocks: Iterable[bytes], number: int, lines: int) -> Iterator[Batch]:
        """Rows as `_records` reads them, which says of each that cannot be used why."""
        records = _records(self.place, self.separator, blocks, number, lines)
        return _in_batches((self._row(record) for record in records if record.number > self.names_at), columns)

    def together(self, columns: Sequence[str], piece: Piece, number: int) -> Batch | None:
        """The rows of a plain piece; None where one of them has other cells than the row of names."""
        wanted, unnamed = [self.names.index(name) for name in columns], range(len(self.names), self.width)
        cells = piece.columns(self.separator, self.width, [*wanted, *unnamed])
        if cells is None or any(pc.any(pc.not_equal(cells[n], "")).as_py() for n in unnamed):
            return None
        return Batch(number + 1 + np.arange(len(piece)), {name: cells[n] for name, n in zip(columns, wanted)})

    def _row(self, record: _Record) -> Row:
        fault = record.fault
        if any(map(str.strip, record.cells[len(self.names) :])):
            fault = (
                f"{len(record.cells)} cells, but {len(self.names)} columns: a cell that holds {SEPARATORS[self.separator]} "
                "belongs in quotation marks"
            )
        return Row(record.number, dict(zip(self.names, record.cells)), fault)


def _csv_batches(table: _CsvColumns, columns: Sequence[str]) -> Iterator[Batch]:
    """The rows behind that of names."""
    blocks = line_blocks(table.place, SourceError)
    number, lines, rest = 0, 0, b""
    for block in itertools.chain(blocks, [None]):
        piece = Piece.of(rest + (block or b""))
        rest = b""
        if block is not None and len(piece.text) <= LARGEST:  # else its last row may go on
            whole = piece.whole_rows()
            piece, rest = whole, piece.text[len(whole.text) :]
        if not piece.text:
            continue
        if not piece.is_quoted_plainly(table.separator):
            # Where its rows end is not sure, nor where those behind it do.
            yield from table.one_by_one(columns, itertools.chain([piece.text, rest], blocks), number, lines)
            return
        if number < table.names_at:
            names, piece = piece, piece.behind(table.names_at)
            number, lines = table.names_at, count_lines(names.text) - count_lines(piece.text)
        if len(piece):
            together = table.together(columns, piece, number)
            yield from [together] if together else table.one_by_one(columns, [piece.text], number, lines)
        number, lines = number + len(piece), lines + count_lines(piece.text)


def _in_batches(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[Batch]:
    rows = iter(rows)
    while some := list(itertools.islice(rows, BATCH_ROWS)):
        yield Batch.of(some, columns)


def _json_lines(place: str) -> Table:
    """Names are those of all lines, which are looked through once for them."""
    names: dict[str, None] = {}
    kinds: pa.Schema | None = None
    for number, block in _numbered(line_blocks(place, SourceError)):
        if kinds is not None and holds_no_other(block, kinds):
            continue
        for row in _json_rows(place, block, number, (), not names):
            names.update(dict.fromkeys(row.cells))
        kinds = kinds or json_kinds(block)

    def batches(columns: Sequence[str]) -> Iterator[Batch]:
        for number, block in _numbered(line_blocks(place, SourceError)):
            cells = plain_columns(block, kinds, columns) if kinds is not None else None
            if cells is None:
                yield from _in_batches(_json_rows(place, block, number, columns), columns)
            elif block:
                yield Batch(number + 1 + np.arange(count_lines(block)), cells)

    return Table(place, list(names), batches)


def _json_rows(place: str, block: bytes, before: int, columns: Sequence[str], first: bool = False) -> Iterator[Row]:
    """The rows of a block of lines, `before` of which lie before it. Raises SourceError as `_json_row`."""
    for number, line in enumerate(io.StringIO(block.decode(), newline=""), before + 1):
        if line.strip():
            yield _json_row(place, number, line, columns, first)
            first = False


def _numbered(blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Blocks of lines, each with the number of lines before it."""
    number = 0
    for block in blocks:
        yield number, block
        number += count_lines(block)


def _json_row(place: str, number: int, line: str, columns: Sequence[str], first: bool) -> Row:
    """The row of a line. Raises SourceError where it is no JSON or no object."""
    twice: list[str] = []

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            twice.extend(name for name, count in counts.items() if count > 1 and name in columns)
        return row

    fix = " One row a line: with pandas, `to_json(path, orient='records', lines=True)`."
    try:
        row = json.loads(line, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        text = line.strip()
        many = first and (text[0] == "[" or text == "{")
        hint = fix if many else " A line ends without a comma." if text.endswith(",") else ""
        raise SourceError(f"{place}, line {number} is not JSON: {error}.{hint}") from None
    if not isinstance(row, dict):
        hint = fix if isinstance(row, list) else ""
        raise SourceError(f"{place}, line {number}: expected an object {{...}}, found {type(row).__name__}.{hint}")
    return Row(number, row, f"{twice[0]!r} is given twice" if twice else "")


def _parquet_files(place: str, files: list[str]) -> Table:
    """Files of the same columns as one table, whose rows are numbered through."""
    tables = [_parquet(file, told) for file, told in zip(files, told_by_folders(place, files))]
    check_same_columns({table.place: table.names for table in tables})

    def batches(columns: Sequence[str]) -> Iterator[Batch]:
        before = 0
        for table in tables:
            number = 0
            for batch in table.batches(columns):
                yield dataclasses.replace(batch, numbers=batch.numbers + before)
                number = int(batch.numbers[-1])
            before += number

    return Table(place, tables[0].names, batches)


def _parquet(place: str, told: Mapping[str, str | None] | None = None) -> Table:
    """told: columns with one value for all rows, where the file has none of that name."""
    damaged = (pa.ArrowException, OSError, ValueError)
    try:
        file = open_parquet(place)
        names = file.schema_arrow.names
    except damaged as error:
        kind = "cannot be read" if isinstance(error, OSError) else "is not a Parquet file"
        raise SourceError(f"{place} {kind}: {error}.") from None
    more = {name: pa.scalar(value, pa.string()) for name, value in (told or {}).items() if name not in names}

    def batches(columns: Sequence[str]) -> Iterator[Batch]:
        number = 0
        try:
            for batch in parquet_batches(file, [name for name in columns if name not in more]):
                cells = {n: pa.repeat(more[n], len(batch)) if n in more else batch.column(n) for n in columns}
                yield Batch(number + 1 + np.arange(len(batch)), cells)
                number += len(batch)
        except damaged as error:
            raise SourceError(f"{place} is damaged after row {number}: {error}.") from None

    return Table(place, [*names, *more], batches)
