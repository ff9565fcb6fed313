"""The index of a split, put together from what the tasks that wrote its tars left on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmref.shards.left_out import LeftOut
from mmref.shards.rows import in_groups
from mmref.shards.tar_writer import ShardResult

# Texts of all rows together may have more bytes than the offsets of `string` count.
INDEX_SCHEMA = pa.schema([
    ("object_row", pa.int32()), ("object_id", pa.large_string()), ("image_id", pa.large_string()), ("key", pa.large_string()),
    ("shard", pa.int32()), ("image_offset", pa.int64()), ("image_size", pa.int64()), ("image_ext", pa.large_string()),
    ("json_offset", pa.int64()), ("json_size", pa.int64()), ("n_captions", pa.int32()),
])  # fmt: skip
OBJECTS_SCHEMA = pa.schema([("object_id", pa.large_string()), ("row", pa.int32())])
PART_SCHEMA = pa.schema([field for field in INDEX_SCHEMA if field.name not in ("object_row", "shard")])
GROUP_ROWS = 1 << 18  # rows of an index that are held and written together


@dataclass(frozen=True)
class Written:
    """A shard that a task wrote."""

    entry: dict[str, Any]  # of the manifest
    part: str  # <part>.parquet: its rows of the index
    left_out: str  # a file as `LeftOut` writes it


def write_part(result: ShardResult, part: str) -> Written:
    """Keep a shard's rows, and what was left out of it, in files that begin with `part`."""
    pq.write_table(pa.Table.from_pylist(result.rows, PART_SCHEMA), f"{part}.parquet", compression="lz4")
    left_out = LeftOut(f"{part}.left_out")
    left_out.take(result.skipped)
    left_out.close()
    return Written(result.entry, part, f"{part}.left_out")


class IndexWriter:
    """Writes the index of a split, and where a path is given for them the objects of train, as shards are added in order."""

    def __init__(self, path: str, objects: str | None) -> None:
        self.objects = self.captions = 0
        self._last: str | None = None  # object of the last row
        self._index = _Rows(path, INDEX_SCHEMA)
        self._objects = _Rows(objects, OBJECTS_SCHEMA) if objects else None

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        for rows in filter(None, (self._index, self._objects)):
            rows.close()

    def add(self, shard: int, part: pa.Table) -> None:
        """Rows of the next shard."""
        if not len(part):
            return
        group = in_groups(part, "object_id")
        first = self.objects - (part.column("object_id")[0].as_py() == self._last)
        starts = np.flatnonzero(np.diff(group, prepend=-1))
        object_row = group + first
        if self._objects is not None:
            new = starts[object_row[starts] >= self.objects]
            ids = part.column("object_id").take(pa.array(new))
            self._objects.add(pa.table([ids, _int32(object_row[new])], OBJECTS_SCHEMA))
        columns: dict[str, Any] = {name: part.column(name) for name in part.column_names}
        columns |= {"object_row": _int32(object_row), "shard": _int32(np.full(len(part), shard))}
        self._index.add(pa.table([columns[name] for name in INDEX_SCHEMA.names], INDEX_SCHEMA))
        self.objects = int(object_row[-1]) + 1
        self.captions += int(np.sum(part.column("n_captions").to_numpy()))
        self._last = part.column("object_id")[-1].as_py()


class _Rows:
    """A Parquet file that is written some rows at a time."""

    def __init__(self, path: str, schema: pa.Schema) -> None:
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._held: list[pa.Table] = []
        self._count = 0

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        self._count += len(table)
        if self._count >= GROUP_ROWS:
            self._write()

    def close(self) -> None:
        self._write()
        self._writer.close()

    def _write(self) -> None:
        if self._held:
            self._writer.write_table(pa.concat_tables(self._held).combine_chunks())
        self._held, self._count = [], 0


def _int32(values: NDArray[np.int64]) -> pa.Array:
    return pa.array(values, pa.int32())
