"""Parquet files, read by the thread that asks for them.

Left to itself, pyarrow reads with threads of two pools: one computes, one reads ahead. Some of them may still run when the
process ends. Its library then aborts the process ("terminate called without an active exception"), after all work was done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmref.storage.locations import is_url, opened

BATCH_ROWS = 65_536


def open_parquet(source: Any, buffer_bytes: int = 0) -> pq.ParquetFile:
    """A file of which only the description is read: names, types, number of rows.

    Args:
        source: path or URL, or a file that is open for bytes.
        buffer_bytes: read as many at once of a column; 0: all of a row group, which is quicker and takes its memory.

    Raises:
        OSError, ValueError: it cannot be read, or is no Parquet file that can be read here.
        FileSystemMissingError: what opens such URLs is not installed.
    """
    if isinstance(source, str) and is_url(source):
        source = opened(source)
    with _as_documented():
        return pq.ParquetFile(source, pre_buffer=False, buffer_size=buffer_bytes)


def read_parquet(source: Any, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a file, by default all. `source` as in `open_parquet`, or what that gives. Raises as that does."""
    file = source if isinstance(source, pq.ParquetFile) else open_parquet(source)
    with _as_documented():
        return file.read(None if columns is None else list(columns), use_threads=False)


def parquet_batches(
    file: pq.ParquetFile, columns: Sequence[str], rows: int = BATCH_ROWS, groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a file in order, or of some of its row groups, at most `rows` at a time. Raises as `read_parquet`."""
    with _as_documented():
        yield from file.iter_batches(rows, groups, columns=list(columns), use_threads=False)


@contextlib.contextmanager
def _as_documented() -> Iterator[None]:
    """Turn the one error of pyarrow that is neither an OSError nor a ValueError into a ValueError."""
    try:
        yield
    except pa.ArrowNotImplementedError as error:
        raise ValueError(str(error)) from error
