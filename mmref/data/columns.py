"""The columns of an index, in memory for small sets and mapped from the node's disk for large ones.

Ten million rows are more than a gigabyte, and every reader of a node needs them. So a large `<split>.index.parquet` is
checked and written out once per node, uncompressed, and mapped into memory: its processes share the pages, and only those
that are looked at are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmref.errors import ShardSetError, StorageError
from mmref.storage.array_file import ArrayFile
from mmref.storage.disk import told_when_full
from mmref.storage.locations import cache_folder
from mmref.storage.locks import one_at_a_time
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


@dataclass(frozen=True)
class Columns:
    """What an index says of n images of m objects."""

    numbers: dict[str, Any]  # arrays (n,) each
    strings: dict[str, Strings]  # n each
    object_ids: Strings  # m, by row
    object_start: NDArray[np.int64]  # (m + 1,) first image of each object, and n


Check = Callable[[dict[str, NDArray[Any]]], None]


def read_columns(
    source: Any, place: str, stamp: str, numbers: dict[str, Any], strings: list[str], check: Check, most_rows: int | None = None
) -> Columns:
    """Columns of an index: numbers as arrays of the given dtypes, `object_row` among them, the others as Strings.

    Args:
        source: open file.
        place: its path or URL.
        stamp: changes whenever the file does, or what `check` holds it against.
        check: called with the numbers of some rows at a time, once for all that use the node's copy; it raises what is wrong.
        most_rows: that can be true; a small file may claim any number.
    Raises KeyError that names the columns that are missing, OSError or ValueError for a file that is no parquet or claims more
    rows, ShardSetError for object rows that are not 0, 1, 2, ... in order, and what `check` raises.
    """
    file = open_parquet(source)
    missing = [name for name in (*numbers, *strings, "object_id") if name not in file.schema_arrow.names]
    if missing:
        raise KeyError(f"columns {missing} are missing")
    if most_rows is not None and file.metadata.num_rows > most_rows:
        raise ValueError(f"it has {file.metadata.num_rows:,} rows, for which its shards have no room")
    if file.metadata.num_rows <= IN_MEMORY_ROWS:
        table = read_parquet(file, [*numbers, *strings, "object_id"])
        found: dict[str, Any] = {name: table[name].to_numpy().astype(dtype) for name, dtype in numbers.items()}
        check(found)
        objects = _Objects(place)
        first = objects.first_images(found["object_row"])
        ids = texts(table["object_id"]).take(pa.array(first))
        return Columns(found, {name: Strings(table[name]) for name in strings}, Strings(ids), np.append(first, len(table)))
    folder = _node_copy(place, stamp, lambda temporary: _write_out(file, place, temporary, numbers, strings, check))
    return Columns(
        {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in numbers},
        {name: Strings(column) for name, column in _mapped(folder / "strings.arrow").items()},
        Strings(_mapped(folder / "objects.arrow")["object_id"]),
        np.load(folder / "object_start.npy", mmap_mode="r"),
    )


def _mapped(path: Path) -> dict[str, pa.ChunkedArray]:
    with pa.memory_map(str(path)) as mapped:
        table = pa.ipc.open_file(mapped).read_all()  # maps, does not read
    return {name: table[name] for name in table.column_names}


def texts(column: Any) -> Any:
    """A column of strings with offsets of 64 bits: those of 32 end at two gigabytes of text, which 100 million ids are."""
    return column.cast(pa.large_string())


def _node_copy(place: str, stamp: str, write: Callable[[Path], None]) -> Path:
    """The folder of the node's copy of an index, complete. One process writes it, the others wait for it; copies of what lay at
    the same place before go."""
    folder = Path(cache_folder("indexes"))
    own = hashlib.sha256(place.encode()).hexdigest()[:16]
    copy = folder / f"{own}-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}"
    if copy.exists():
        return copy
    with contextlib.ExitStack() as stack:
        with _named(folder):
            folder.mkdir(parents=True, exist_ok=True)
            alone = stack.enter_context(one_at_a_time(folder / f".{own}.lock"))
            if copy.exists():
                return copy
            if alone:
                for stale in (*folder.glob(f"{own}-*"), *folder.glob(f".{own}-*")):  # what has them mapped keeps them
                    shutil.rmtree(stale, ignore_errors=True)
            temporary = Path(tempfile.mkdtemp(dir=folder, prefix=f".{own}-"))
        try:
            with told_when_full(copy):
                write(temporary)
            with _named(folder):
                _put(temporary, copy)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return copy


def _put(temporary: Path, copy: Path) -> None:
    try:
        os.rename(temporary, copy)
    except OSError:
        if not copy.exists():  # else another process made the same, where the file system has no locks
            raise


@contextlib.contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Raises StorageError for the errors of the cache's own folder, which say nothing of the set."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{folder}, where the indexes of large sets are kept on this machine, cannot be written: {error.strerror or error}. "
            "Name another folder by the variable MMREF_CACHE."
        ) from error


class _Objects:
    """Where objects begin, of rows that come in pieces."""

    def __init__(self, place: str) -> None:
        self.place, self.images, self.last = place, 0, -1

    def first_images(self, rows: NDArray[Any]) -> NDArray[np.int64]:
        """Places in `rows`, the next object rows, at which an object begins. Raises ShardSetError."""
        steps = np.diff(rows, prepend=rows.dtype.type(self.last))
        first = np.flatnonzero(steps)
        # An object's images are adjacent and rows are contiguous exactly when rows start at 0 and rise by 0 or 1.
        if (len(rows) and self.last < 0 and rows[0] != 0) or (steps[first] != 1).any():
            raise ShardSetError(f"{self.place}: object rows are not 0, 1, 2, ... in order. Build the shard set again.")
        self.last = int(rows[-1]) if len(rows) else self.last
        self.images += len(rows)
        return first


def _write_out(file: pq.ParquetFile, place: str, folder: Path, numbers: dict[str, Any], strings: list[str], check: Check) -> None:
    """Write the columns into a folder as files that can be mapped."""
    rows, objects = file.metadata.num_rows, _Objects(place)
    of_image, of_object = (pa.schema([(name, pa.large_string()) for name in names]) for names in (strings, ["object_id"]))
    starts = tempfile.TemporaryFile(dir=folder)  # how many objects there are is known at the end
    with contextlib.ExitStack() as stack:
        arrays = {name: stack.enter_context(ArrayFile(folder / f"{name}.npy", (rows,), dtype)) for name, dtype in numbers.items()}
        image_texts, object_texts = (
            stack.enter_context(pa.ipc.new_file(stack.enter_context(pa.OSFile(str(folder / name), "wb")), schema))
            for name, schema in (("strings.arrow", of_image), ("objects.arrow", of_object))
        )
        for batch in parquet_batches(file, [*numbers, *strings, "object_id"]):
            found = {name: batch[name].to_numpy(zero_copy_only=False).astype(dtype) for name, dtype in numbers.items()}
            check(found)
            begin = objects.images
            first = objects.first_images(found["object_row"])
            starts.write((begin + first).data)
            object_texts.write_batch(pa.record_batch([texts(batch["object_id"]).take(pa.array(first))], of_object))
            image_texts.write_batch(pa.record_batch([texts(batch[name]) for name in strings], of_image))
            for name, array in arrays.items():
                array.write(found[name])
    with starts, ArrayFile(folder / "object_start.npy", (objects.last + 2,), np.int64) as file_of_starts:
        starts.seek(0)
        while piece := starts.read(1 << 24):
            file_of_starts.write(np.frombuffer(piece, np.int64))
        file_of_starts.write(np.array([rows]))
