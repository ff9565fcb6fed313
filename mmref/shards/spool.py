"""Rows of a source on their way to the tars: on disk, in parts by the hash order of objects.

What the process that builds a set holds does not grow with the set: a buffer of rows, later one part. An object's rows are all in
one part, so that each part can be sorted, merged and checked alone. Image ids are checked in parts of their own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmref.shards.rows import ROWS, Conflict, image_conflict, in_groups, merge_images, objects_of, split_conflict
from mmref.shards.samples import SourceObject, hash_fraction
from mmref.storage.parquet import open_parquet

BUFFER_BYTES = 32_000_000  # rows of Arrow that are held before they go to disk
PARTS = 128
GROUP_ROWS = 16_384  # of a part that are read together
KEYS = ("row", "object_id", "image_id", "key")


class Span(NamedTuple):
    """Consecutive rows of a part."""

    path: str
    first: int
    behind: int  # the row after the last


@dataclass
class Split:
    """What is known of a split's rows."""

    objects: int = 0
    images: int = 0
    most_told: int = 0  # images with a caption of the object that has most of them
    parts: list[Path] = field(default_factory=list)  # in hash order


class Spool:
    """Takes rows, then gives them by split in hash order.

    Args:
        folder: of its own, which whoever makes it removes.
        merges: rows of an object, or an image, that came before belong to it; else they are conflicts.
    """

    def __init__(self, folder: Path, merges: bool) -> None:
        self.folder, self.merges = folder, merges
        self.splits: dict[str, Split] = {}
        folder.mkdir()
        self._buffer: list[pa.Table] = []
        self._bytes = 0
        self._spilled = False

    def add(self, table: pa.Table) -> None:
        """Take rows of the schema ROWS, in the order of the source."""
        ids = table.column("object_id").combine_chunks().dictionary_encode()
        fractions = np.array([hash_fraction(object_id) for object_id in ids.dictionary.to_pylist()])
        order = fractions[ids.indices.to_numpy(zero_copy_only=False)] if len(table) else np.zeros(0)
        self._buffer.append(table.append_column("order", pa.array(order, pa.float64())))
        self._bytes += table.nbytes
        if self._bytes > BUFFER_BYTES:
            self._spill()

    def settle(self) -> Conflict | None:
        """Sort, merge and check what was taken. Returns the conflict that comes first in the source."""
        conflicts = []
        if not self._spilled:
            parts, keys = [self._buffered()], [self._buffered().select(KEYS)]
        else:
            self._spill()
            parts, keys = (_Parts(self.folder, kind) for kind in ("rows", "keys"))  # type: ignore[assignment]
        self._buffer = []
        for number, part in enumerate(parts):
            conflicts.append(self._settle_part(part, number))
        conflicts += [image_conflict(part, self.merges) for part in keys if len(part)]
        return min((found for found in conflicts if found), key=lambda found: found.row, default=None)

    def cut(self, split: str, count: int) -> list[list[Span]]:
        """Consecutive objects in `count` shards (at most one an object) of nearly the same number of images."""
        entry = self.splits[split]
        shards: list[list[Span]] = [[] for _ in range(count)]
        images = objects = 0
        for part in entry.parts:
            sizes = np.load(part.with_suffix(".npy")).astype(np.int64)
            rows = np.concatenate([[0], np.cumsum(sizes)])
            # By images, but at least one object for each shard that is still to come.
            by_images = np.minimum((images + rows[:-1]) * count // entry.images, count - 1)
            left = count - (entry.objects - objects - np.arange(len(sizes)))
            number = np.maximum(np.maximum(by_images, left), 0)
            edges = np.flatnonzero(np.diff(number, prepend=-1, append=count + 1))
            for begin, end in pairwise(edges.tolist()):
                shards[int(number[begin])].append(Span(str(part), int(rows[begin]), int(rows[end])))
            images, objects = images + int(rows[-1]), objects + len(sizes)
        return [shard for shard in shards if shard]

    def sample(self, split: str, step: int) -> Iterator[SourceObject]:
        """Every `step`-th image of a split, each as an object."""
        passed = 0
        for part in self.splits[split].parts:
            rows = open_parquet(str(part)).metadata.num_rows
            for position in range(-passed % step, rows, step):
                yield from read_objects([Span(str(part), position, position + 1)])
            passed += rows

    def captions(self, split: str) -> Iterator[str]:
        """All captions of a split."""
        for part in self.splits[split].parts:
            for batch in open_parquet(str(part)).iter_batches(GROUP_ROWS, columns=["captions"], use_threads=False):
                yield from batch.column(0).flatten().to_pylist()

    def _buffered(self) -> pa.Table:
        empty = ROWS.append(pa.field("order", pa.float64())).empty_table()
        return pa.concat_tables([empty, *self._buffer]).combine_chunks()

    def _spill(self) -> None:
        """Write what is held into the parts of its objects, and its images into those of their keys."""
        if not self._buffer:
            return
        table = self._buffered()
        self._buffer, self._bytes, self._spilled = [], 0, True
        by_order = np.minimum((table.column("order").to_numpy() * PARTS).astype(np.int64), PARTS - 1)
        self._write(table, by_order, "rows")
        names = table.column("key").cast(pa.binary()).to_pylist()
        self._write(table.select(KEYS), np.fromiter(map(zlib.crc32, names), np.int64, len(names)) % PARTS, "keys")

    def _write(self, table: pa.Table, part: NDArray[np.int64], kind: str) -> None:
        order = np.argsort(part, kind="stable")
        table = table.take(pa.array(order))
        edges = np.searchsorted(part[order], np.arange(PARTS + 1))
        for number, (begin, end) in enumerate(pairwise(edges.tolist())):
            if begin == end:
                continue
            # One stream behind the other: the parts are more than the files that a process may have open (256 on a Mac), and
            # a file of Parquet would hold in memory what has passed.
            options = pa.ipc.IpcWriteOptions(compression="lz4")
            with (
                open(self.folder / f"{kind}-{number:03d}.arrows", "ab") as file,
                pa.ipc.new_stream(file, table.schema, options=options) as stream,
            ):
                stream.write_table(table.slice(begin, end - begin))

    def _settle_part(self, table: pa.Table, number: int) -> Conflict | None:
        """Write a part anew by split, in hash order, an image a row."""
        if not len(table):
            return None
        table = _in_order(table)
        if (conflict := split_conflict(table, self.merges)) is not None:
            return conflict
        if self.merges:
            table = merge_images(table)
        for name in pc.unique(table.column("split")).to_pylist():
            entry = self.splits.setdefault(name, Split())
            rows = table.filter(pc.equal(table.column("split"), name)).combine_chunks()
            path = self.folder / f"{list(self.splits).index(name)}-{number:03d}.parquet"
            pq.write_table(rows.select(ROWS.names), path, GROUP_ROWS, compression="lz4")
            sizes = np.bincount(in_groups(rows, "object_id"))
            np.save(path.with_suffix(".npy"), sizes.astype(np.int32))
            entry.parts.append(path)
            entry.objects += len(sizes)
            entry.images += len(rows)
            entry.most_told = max(entry.most_told, _most_told(rows))
        return None


class _Parts:
    """Tables that were spilled, read one at a time, each removed from the disk when the next is asked for."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._paths = sorted(folder.glob(f"{kind}-*.arrows"))

    def __iter__(self) -> Iterator[pa.Table]:
        for path in self._paths:
            tables = []
            with pa.OSFile(str(path)) as file:
                while file.tell() < file.size():
                    with pa.ipc.open_stream(file) as stream:
                        tables.append(stream.read_all())
            yield pa.concat_tables(tables).combine_chunks()
            path.unlink()


def read_objects(spans: Iterable[Span]) -> Iterator[SourceObject]:
    """Objects of a shard, read a few rows at a time."""
    return objects_of(batch for span in spans for batch in _read_span(span))


def _read_span(span: Span) -> Iterator[pa.Table]:
    file = open_parquet(span.path)
    begin = 0
    for group in range(file.metadata.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        first, behind = max(span.first, begin), min(span.behind, end)
        if first < behind:
            yield file.read_row_group(group, use_threads=False).slice(first - begin, behind - first)
        begin = end


def _in_order(table: pa.Table) -> pa.Table:
    """Rows by the hash of their object, then its id, then as they came."""
    order = table.column("order").to_numpy()
    sorted_ = np.argsort(order, kind="stable")
    table = table.take(pa.array(sorted_))
    ties = np.diff(order[sorted_]) == 0
    groups = np.diff(in_groups(table, "object_id")) > 0
    if (ties & groups).any():  # two ids of one hash
        position = table.append_column("came", pa.array(sorted_))
        table = position.sort_by([("order", "ascending"), ("object_id", "ascending"), ("came", "ascending")])
    return table


def _most_told(rows: pa.Table) -> int:
    """Images with a caption of the object that has most of them."""
    captions = rows.column("captions").combine_chunks()
    counts = pc.fill_null(pc.list_value_length(captions), 0).to_numpy(zero_copy_only=False)
    texts = captions.flatten()
    says = pc.match_substring_regex(texts, "[!-~]").to_numpy(zero_copy_only=False).copy()
    for position in np.flatnonzero(~says).tolist():  # no letter of ASCII
        says[position] = bool(texts[position].as_py().strip())
    told = np.bincount(np.repeat(np.arange(len(rows)), counts)[says], minlength=len(rows)) > 0
    return int(np.bincount(in_groups(rows, "object_id"), weights=told).max())
