"""The indexes of a set whose tars lie elsewhere, out of the rows that each scan of a tar left.

Rows of one object may come from any tar. They are ordered by a hash of the object's id, which is spread evenly: so a range of
hashes is a share of the rows, and one share after the other is sorted in memory, however many rows there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmref.errors import SourceError
from mmref.shards.index_parts import INDEX_SCHEMA, OBJECTS_SCHEMA
from mmref.shards.rows import in_groups

SHARE_ROWS = 4_000_000  # sorted at a time, about a gigabyte
ROW_GROUP = 1_000_000
MOST_MAPPED = 10_000  # files at a time: a process has 65,530 maps in all
PART_SCHEMA = pa.schema([
    ("split", pa.large_string()), ("fraction", pa.float64()),
    *(INDEX_SCHEMA.field(name) for name in ("object_id", "image_id", "key", "image_ext", "image_offset", "image_size")),
    *(INDEX_SCHEMA.field(name) for name in ("json_offset", "json_size", "n_captions")),
])  # fmt: skip
ORDER = [(name, "ascending") for name in ("fraction", "object_id", "tar", "image_offset")]


@dataclass
class _Split:
    """The files of a split that are being written."""

    shards: NDArray[np.int32]  # of each tar, its number in the split
    index: pq.ParquetWriter
    objects: pq.ParquetWriter | None  # of train
    count: int = 0  # objects so far


def write_indexes(root: Path, parts: Sequence[Path], shards: Mapping[str, Sequence[int]], manifest: dict[str, Any]) -> None:
    """Writes `<split>/<split>.index.parquet` and objects.parquet, and the number of objects into the manifest.

    Args:
        parts: a file for each tar, rows of PART_SCHEMA by `fraction`.
        shards: by split the number of each tar in it.

    Raises SourceError for an object of two splits.
    """
    tables = list(_tables(parts))
    fractions = [np.concatenate([chunk.to_numpy() for chunk in table["fraction"].chunks] or [[]]) for table, _ in tables]
    count = max(1, -(-sum(len(table) for table, _ in tables) // SHARE_ROWS))
    edges = np.append(np.linspace(0, 1, count + 1)[:-1], np.inf)
    bounds = [np.searchsorted(each, edges) for each in fractions]
    with contextlib.ExitStack() as stack:
        splits = {name: _open(stack, root, name, numbers) for name, numbers in shards.items()}
        for share in range(count):
            pieces = [
                _with_tar(table.slice(bound[share], bound[share + 1] - bound[share]), number)
                for (table, number), bound in zip(tables, bounds)
                if bound[share + 1] > bound[share]
            ]
            if pieces:
                _write_share(pa.concat_tables(pieces).combine_chunks().sort_by(ORDER), splits)
    for name, split in splits.items():
        manifest["splits"][name]["objects"] = split.count


def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _tables(parts: Sequence[Path]) -> Iterator[tuple[pa.Table, int | None]]:
    """Rows by `fraction`, and of which tar they are: of each part alone, or of several joined, whose rows say it themselves."""
    size = -(-len(parts) // MOST_MAPPED)
    for first in range(0, len(parts), max(1, size)):
        some = [(_mapped(path), number) for number, path in enumerate(parts[first : first + size], first)]
        if size == 1:
            yield some[0]
            continue
        rows = pa.concat_tables([_with_tar(*each) for each in some]).combine_chunks().sort_by("fraction")
        path = parts[first].with_suffix(".joined")
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as writer:
            writer.write_table(rows)
        yield _mapped(path), None


def _with_tar(rows: pa.Table, number: int | None) -> pa.Table:
    return rows if number is None else rows.append_column("tar", pa.array(np.full(len(rows), number, np.int32)))


def _open(stack: contextlib.ExitStack, root: Path, name: str, numbers: Sequence[int]) -> _Split:
    (root / name).mkdir(exist_ok=True)  # a split may be called as the folder of the json
    index = stack.enter_context(pq.ParquetWriter(root / name / f"{name}.index.parquet", INDEX_SCHEMA, compression="zstd"))
    objects = None
    if name == "train":
        objects = stack.enter_context(pq.ParquetWriter(root / "objects.parquet", OBJECTS_SCHEMA, compression="zstd"))
    return _Split(np.array(numbers, np.int32), index, objects)


def _write_share(rows: pa.Table, splits: Mapping[str, _Split]) -> None:
    """Write sorted rows; those of one object are all among them."""
    ids, names = rows["object_id"].combine_chunks(), rows["split"].combine_chunks()
    new, other = (np.diff(in_groups(rows, column), prepend=-1) > 0 for column in ("object_id", "split"))
    if (both := np.flatnonzero(~new & other)).size:
        at = int(both[0])
        raise SourceError(
            f"Object {ids[at].as_py()!r} is in {names[at - 1].as_py()!r} ({rows['image_id'][at - 1]}) and in "
            f"{names[at].as_py()!r} ({rows['image_id'][at]}). Splits are by object: give all of its samples one, or name another "
            "field with --split."
        )
    for name, split in splits.items():
        mask = pc.equal(names, name)
        own, begins = rows.filter(mask), new[mask.to_numpy(zero_copy_only=False)]
        object_row = (split.count + np.cumsum(begins) - 1).astype(np.int32)
        columns = {**{each: own[each] for each in own.column_names}, "object_row": object_row}
        columns["shard"] = split.shards[own["tar"].to_numpy()]
        split.index.write_table(pa.table([columns[each] for each in INDEX_SCHEMA.names], INDEX_SCHEMA), ROW_GROUP)
        if split.objects is not None:
            first = pa.array(np.flatnonzero(begins))
            split.objects.write_table(pa.table([own["object_id"].take(first), object_row[begins]], OBJECTS_SCHEMA), ROW_GROUP)
        split.count += int(begins.sum())
