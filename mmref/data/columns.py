"""The columns of an index, in memory for small sets and mapped from the node's disk for large ones.

Ten million rows are more than a gigabyte, and every reader of a node needs them. So a large `<split>.index.parquet` is
written out once per node, uncompressed, and mapped into memory: its processes share the pages, and only those that are
looked at are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmref.storage.array_file import ArrayFile
from mmref.storage.disk import told_when_full
from mmref.storage.locations import cache_folder
from mmref.storage.parquet import open_parquet, parquet_batches, read_parquet

IN_MEMORY_ROWS = 500_000  # up to about 100 MB


class Strings(Sequence[str]):
    """Strings of an Arrow column, made into Python strings one at a time."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.column[i].to_pylist()
        n = len(self.column)
        i = int(i)
        if not -n <= i < n:
            raise IndexError(f"{i} of {n}")
        return self.column[i % n].as_py()

    def __len__(self) -> int:
        return len(self.column)

    def __iter__(self) -> Iterator[str]:
        for chunk in self.column.chunks:
            yield from chunk.to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def __hash__(self) -> int:
        raise TypeError("unhashable type: 'Strings'")


def read_columns(
    source: Any, stamp: str, numbers: dict[str, Any], strings: list[str], most_rows: int | None = None
) -> dict[str, Any]:
    """Columns of a parquet file by name: numbers as arrays of the given dtypes, the others as Strings.

    Args:
        source: open file.
        stamp: changes whenever the file does; names its copy on this node.
        most_rows: that can be true; a small file may claim any number.
    Raises KeyError that names the columns that are missing, OSError or ValueError for a file that is no parquet or claims more
    rows.
    """
    file = open_parquet(source)
    missing = [name for name in (*numbers, *strings) if name not in file.schema_arrow.names]
    if missing:
        raise KeyError(f"columns {missing} are missing")
    if most_rows is not None and file.metadata.num_rows > most_rows:
        raise ValueError(f"it has {file.metadata.num_rows:,} rows, for which its shards have no room")
    if file.metadata.num_rows <= IN_MEMORY_ROWS:
        table = read_parquet(file, [*numbers, *strings])
        found: dict[str, Any] = {name: table[name].to_numpy().astype(dtype) for name, dtype in numbers.items()}
        return found | {name: Strings(table[name]) for name in strings}
    folder = Path(cache_folder("indexes")) / hashlib.sha256(stamp.encode()).hexdigest()[:24]
    if not folder.exists():
        with told_when_full(folder):
            _write_out(file, folder, numbers, strings)
    found = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in numbers}
    with pa.memory_map(str(folder / "strings.arrow")) as mapped:
        table = pa.ipc.open_file(mapped).read_all()  # maps, does not read
    return found | {name: Strings(table[name]) for name in strings}


def _write_out(file: pq.ParquetFile, folder: Path, numbers: dict[str, Any], strings: list[str]) -> None:
    """Complete or absent: written to a temporary name, moved into place; the first of several processes wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".index-"))
    try:
        rows = file.metadata.num_rows
        schema = pa.schema([(name, pa.string()) for name in strings])
        with contextlib.ExitStack() as stack:
            arrays = {
                name: stack.enter_context(ArrayFile(temporary / f"{name}.npy", (rows,), dtype)) for name, dtype in numbers.items()
            }
            sink = stack.enter_context(pa.OSFile(str(temporary / "strings.arrow"), "wb"))
            writer = stack.enter_context(pa.ipc.new_file(sink, schema))
            for batch in parquet_batches(file, [*numbers, *strings]):
                for name, array in arrays.items():
                    array.write(batch[name].to_numpy(zero_copy_only=False))
                writer.write_batch(pa.record_batch([batch[name].cast(pa.string()) for name in strings], schema))
        with contextlib.suppress(OSError):  # another process was first
            os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
