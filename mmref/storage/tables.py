"""Tables that a user gives: CSV, TSV, JSON lines and Parquet, as `mmref shards build table` and `mmref index` read them.

A cell is what the table says, or the row is left out and named: text stays text (the id `007` is not 7, someone may be called
Nan), a number is the text that it is written as (2.0 of a column with missing values is `2`), and what is no text at all
(true, a mapping, bytes of an image) is none. Missing are empty cells, null, and the number NaN, which pandas writes for it.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import json
import math
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from numbers import Integral, Real
from typing import Any, NamedTuple

from mmref.errors import MMRefError, SampleError, SourceError
from mmref.storage.locations import file_system, is_url
from mmref.storage.texts import open_text

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
LONGEST_CELL = 2**31 - 1  # characters; a quotation mark that is never closed is found at the end of the file
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
class Table:
    """Names of the columns, and the rows: `rows(columns)` reads these columns from the beginning."""

    place: str
    names: list[str]
    rows: Callable[[Sequence[str]], Iterator[Row]]

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
    header = next(_records(place, separator), None)
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

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        for number, cells, fault in itertools.islice(_records(place, separator), 1, None):
            if any(map(str.strip, cells[len(names) :])):
                fault = (
                    f"{len(cells)} cells, but {len(names)} columns: a cell that holds {SEPARATORS[separator]} belongs in "
                    "quotation marks"
                )
            yield Row(number, dict(zip(names, cells)), fault)

    return Table(place, names, rows)


class _Record(NamedTuple):
    number: int
    cells: list[str]
    fault: str


def _records(place: str, separator: str) -> Iterator[_Record]:
    """Rows of a CSV that are not empty, the names of the columns first.

    Raises SourceError for wrong quotation marks that take more than a line with them: nobody knows where the row ends.
    """
    csv.field_size_limit(LONGEST_CELL)
    with open_text(place, SourceError) as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        for number in itertools.count(1):
            line, fault = reader.line_num + 1, ""
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                cells, fault = [], f"a quotation mark is not closed, or one inside of a cell is not doubled ({error})"
                if reader.line_num > line:
                    raise SourceError(
                        f"{place}, row {number}: from line {line} to line {reader.line_num} {fault}. Write a quotation mark "
                        'inside of a cell as "", or save the table as JSON lines.'
                    ) from None
            if fault or any(map(str.strip, cells)):
                yield _Record(number, cells, fault)


def _json_lines(place: str) -> Table:
    found: list[Row] = []
    with open_text(place, SourceError) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                found.append(_json_row(place, number, line, first=not found))
    names = dict.fromkeys(name for row in found for name in row.cells)
    return Table(place, list(names), lambda columns: iter(found))


def _json_row(place: str, number: int, line: str, first: bool) -> Row:
    """The row of a line. Raises SourceError where it is no JSON or no object."""
    twice: list[str] = []

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return dict(pairs)

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
    import pyarrow as pa

    from mmref.storage.parquet import open_parquet, parquet_batches

    damaged = (pa.ArrowException, OSError, ValueError)
    try:
        fs, inner = file_system(place) if is_url(place) else (None, place)
        file = open_parquet(fs.open(inner, "rb") if fs else inner)
        names = file.schema_arrow.names
    except damaged as error:
        kind = "cannot be read" if isinstance(error, OSError) else "is not a Parquet file"
        raise SourceError(f"{place} {kind}: {error}.") from None

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        numbers = itertools.count(1)
        try:
            for batch in parquet_batches(file, columns):
                cells = [_cells(batch.column(name)) for name in columns]
                yield from (Row(next(numbers), dict(zip(columns, values))) for values in zip(*cells, strict=True))
        except damaged as error:
            raise SourceError(f"{place} is damaged after row {next(numbers) - 1}: {error}.") from None

    return Table(place, names, rows)


def _cells(column: Any) -> list[Any]:
    """Values of an Arrow array; where one has no Python value (text that is no UTF-8, the year 20000), that one alone is none."""
    import pyarrow as pa

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
