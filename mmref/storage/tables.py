"""Tables that a user gives: CSV, TSV, JSON lines and Parquet, as `mmref shards build table` and `mmref index` read them.

A cell is what the table says, or the row is left out and named: text stays text (the id `007` is not 7, someone may be called
Nan), a number is the text that it is written as (2.0 of a column with missing values is `2`), and what is no text at all
(true, a mapping, bytes of an image) is none. Missing are empty cells, null, and the number NaN, which pandas writes for it.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import itertools
import json
import math
import os
import uuid
from collections import Counter
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

from mmref.errors import MMRefError, SampleError, SourceError
from mmref.storage.locations import file_system, is_url
from mmref.storage.parquet import BATCH_ROWS, open_parquet, parquet_batches
from mmref.storage.plain_csv import LARGEST, Piece
from mmref.storage.plain_json import count_lines, holds_no_other, json_kinds, plain_columns
from mmref.storage.texts import line_blocks

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
LONGEST_CELL = 2**31 - 1  # characters; a quotation mark that is never closed is found at the end of the file
FIRST = 1 << 16  # bytes of a CSV that are read for the names of its columns
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
        columns = {name: cells if isinstance(cells, list) else _cells(cells) for name, cells in self.cells.items()}
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
        elif not isinstance(cells, list) and pa.types.is_list(cells.type) and _as_strings(cells.flatten()) is not None:
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
    """A table by the ending of its name. Raises SourceError where it is missing, damaged or of another kind."""
    readers = dict(zip(TABLE_ENDINGS, (_csv, _csv, _json_lines, _json_lines, _parquet), strict=True))
    ending = os.path.splitext(place)[1].lower()
    if ending not in readers:
        raise SourceError(f"{place}: the ending says what a table is; expected one of {', '.join(readers)}.")
    table = readers[ending](place)
    if twice := [name for name, count in Counter(table.names).items() if count > 1 and name]:
        raise SourceError(f"{place} has {table.names.count(twice[0])} columns called {twice[0]!r}. Rename one of them.")
    return table


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


# -- formats ---------------------------------------------------------------------------------------------------------


def _csv(place: str) -> Table:
    """Cells of a CSV are text. A row may end early, as spreadsheets write it; its other cells are missing."""
    separator = "\t" if place.lower().endswith(".tsv") else ","
    header = next(_records(place, separator, line_blocks(place, SourceError, FIRST)), None)
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


def _parquet(place: str) -> Table:
    damaged = (pa.ArrowException, OSError, ValueError)
    try:
        fs, inner = file_system(place) if is_url(place) else (None, place)
        file = open_parquet(fs.open(inner, "rb") if fs else inner)
        names = file.schema_arrow.names
    except damaged as error:
        kind = "cannot be read" if isinstance(error, OSError) else "is not a Parquet file"
        raise SourceError(f"{place} {kind}: {error}.") from None

    def batches(columns: Sequence[str]) -> Iterator[Batch]:
        number = 0
        try:
            for batch in parquet_batches(file, columns):
                yield Batch(number + 1 + np.arange(len(batch)), {name: batch.column(name) for name in columns})
                number += len(batch)
        except damaged as error:
            raise SourceError(f"{place} is damaged after row {number}: {error}.") from None

    return Table(place, names, batches)


def _cells(column: Any) -> list[Any]:
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
