"""Where the bytes of an image lie: a file or URL, a part of one, or a row of a Parquet file.

A row is written `FILE::COLUMN` with its number: a Parquet file packs its values, so that no range of its bytes is an image.
Rows are read forward through a file a few at a time. Reading them in order unpacks every page once; a jump unpacks its row
group from the start.
"""

from __future__ import annotations

import bisect
import os
import re
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import pyarrow as pa

from mmref.errors import SampleError
from mmref.storage.fetch import read_location
from mmref.storage.locations import is_url, read_bytes
from mmref.storage.parquet import open_parquet, parquet_batches

IN_ROW = -1  # in place of a length
ROW = re.compile(r"(?P<file>.+)::(?P<column>[^/:]+)", re.DOTALL)
BATCH_ROWS, BATCHES_KEPT = 16, 4  # of a reader; several threads ask for neighbors, a little out of order
READERS = 4  # files that are open at once
BUFFER_BYTES = 1 << 20  # read at once: a row group may be larger than memory


class Place(NamedTuple):
    """Bytes from `offset` of a file or URL, as many as `length`; 0: the whole file. IN_ROW: the row `offset` of a column."""

    path: str
    offset: int = 0
    length: int = 0


def row_place(file: str, column: str, row: int) -> Place:
    """The place of an image in a row of a Parquet file, from 0."""
    return Place(f"{file}::{quote(column, safe=' ')}", row, IN_ROW)


def file_of(path: str) -> str:
    """The file or URL that a place's path leads to, without the column of a row."""
    found = ROW.fullmatch(path)
    return found["file"] if found and found["file"].lower().endswith(".parquet") else path


def read_place(place: Place) -> bytes:
    """Encoded bytes of an image.

    Raises:
        SampleError, OSError: this one cannot be read. StorageError: the storage keeps failing. FileSystemMissingError.
    """
    path, offset, length = place
    if length == IN_ROW:
        found = ROW.fullmatch(path)
        if found is None:
            raise SampleError(f"{path} names no column of a Parquet file")
        return _read_row(found["file"], unquote(found["column"]), offset)
    if not length:
        return read_location(path)
    data = read_bytes(path, offset, length)
    if len(data) != length:
        raise SampleError(f"{path}: short at byte {offset}: {len(data)} of {length} bytes")
    return data


def _read_row(file: str, column: str, row: int) -> bytes:
    """Raises SampleError where the file is damaged or has no such row, OSError where it is not there."""
    stamp = None
    if not is_url(file):
        status = os.stat(file)
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
    value = _reader(file, column, stamp).read(row)
    if not value:
        raise SampleError(f"{file}, row {row + 1}: no image in the column {column!r}")
    return value


class _RowReader:
    """Rows of one column of binary values, or of the field `bytes` of its mappings."""

    def __init__(self, file: str, column: str) -> None:
        self.name = f"{file}::{column}"
        self._lock = threading.Lock()
        self._kept: deque[tuple[int, pa.Array]] = deque(maxlen=BATCHES_KEPT)  # first row, values
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._next = self._end = 0  # rows that the batches give next, and where their row group ends
        try:
            self._file = open_parquet(file, BUFFER_BYTES)
            nested = pa.types.is_struct(self._file.schema_arrow.field(column).type)
        except KeyError:
            raise SampleError(f"{file} has no column {column!r} any more") from None
        except ValueError as error:
            raise SampleError(f"{file} is no Parquet file: {error}") from None
        self._leaf = f"{column}.bytes" if nested else column
        groups = self._file.metadata
        self._starts = [0]
        for number in range(groups.num_row_groups):
            self._starts.append(self._starts[-1] + groups.row_group(number).num_rows)

    def read(self, row: int) -> bytes | None:
        """Raises SampleError."""
        if not 0 <= row < self._starts[-1]:
            raise SampleError(f"{self.name} has {self._starts[-1]:,} rows, and no row {row + 1:,}")
        with self._lock:
            while True:
                for first, values in self._kept:
                    if first <= row < first + len(values):
                        return values[row - first].as_py()
                if not self._next <= row < self._end:
                    self._begin(bisect.bisect_right(self._starts, row) - 1)
                self._advance()

    def _begin(self, group: int) -> None:
        self._next, self._end = self._starts[group], self._starts[group + 1]
        self._batches = parquet_batches(self._file, [self._leaf], BATCH_ROWS, [group])

    def _advance(self) -> None:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise SampleError(f"{self.name} ends at row {self._next:,}: the file is damaged") from None
        except (OSError, ValueError) as error:
            self._end = self._next  # the next row asked for begins its group anew
            raise SampleError(f"{self.name} is damaged near row {self._next + 1:,}: {error}") from None
        column = batch.column(0)
        values = _bytes_of(column)
        self._kept.append((self._next, values))
        self._next += len(values)


def _bytes_of(column: pa.Array) -> Any:
    """Values of a column of bytes, or of mappings that hold them; null where a mapping is."""
    if not pa.types.is_struct(column.type):
        return column
    return column.flatten()[column.type.get_field_index("bytes")]


_open: OrderedDict[tuple[Any, ...], _RowReader] = OrderedDict()
_opening = threading.Lock()


def _reader(file: str, column: str, stamp: tuple[int, ...] | None) -> _RowReader:
    """The reader of a file as it is now; READERS of them stay open."""
    key = (os.getpid(), file, column, stamp)
    with _opening:
        reader = _open.pop(key, None) or _RowReader(file, column)
        _open[key] = reader
        while len(_open) > READERS:
            _open.popitem(last=False)
        return reader
