"""A segment: the arrays of a run of items, each a file that is mapped into memory, never changed once written.

features.npy    (n, d) float32, L2-normalised; float16 in large indexes
near.npy        (n, r) int32 and weights.npy (n, r) float32: sparse codes over the references, where there are any
uids.npy        (n,) int64, rising: numbers that items keep for life
items.arrow     id, path, offset, length, object_id, file_stamp, width, height (pixels), file_sha256 (of the image's bytes;
                indexes of older versions have none), metadata columns. Mapped, too: of many items it is large. Older
                versions wrote items.parquet
thumbnails.bin  WebP files end to end; thumbnails.npy (n, 2) int64: where each starts, and its bytes
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from mmref.errors import SearchIndexError
from mmref.retrieval.chunks import Arrays
from mmref.retrieval.exact import Features
from mmref.retrieval.manifest import Manifest
from mmref.storage.array_file import ArrayFile, RowFile, save_array
from mmref.storage.disk import sync_files, told_when_full
from mmref.storage.parquet import read_parquet

FULL_PRECISION_UP_TO = 100_000  # items of an index: 0.2 GB at a width of 512
CODES = ("near", "weights")
ITEMS = "items.arrow"
ITEMS_OF_A_BATCH = 65_536
COPIED_ROWS = 65_536  # at a time
NOT_JOINED = (pa.ArrowTypeError, pa.ArrowInvalid)  # types that do not go together; a whole number that no float holds


class Segment:
    """A segment that is read. Files are opened at once: they may be deleted behind a reader's back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.features: Features = np.load(folder / "features.npy", mmap_mode="r")
            self.codes = {n: np.load(folder / f"{n}.npy", mmap_mode="r") for n in CODES if (folder / f"{n}.npy").exists()}
            mapped = {"features": self.features, **self.codes}
            self.rows = {name: RowFile(folder / f"{name}.npy", array) for name, array in mapped.items()}
            self.uids: NDArray[np.int64] = np.load(folder / "uids.npy", mmap_mode="r")
            self.spans: NDArray[np.int64] = np.load(folder / "thumbnails.npy", mmap_mode="r")
            self.items: pa.Table = read_items(folder)
            self._thumbnails = os.open(folder / "thumbnails.bin", os.O_RDONLY)
            weakref.finalize(self, os.close, self._thumbnails).atexit = False  # as in `RowFile`
        except (OSError, ValueError) as error:
            raise SearchIndexError(f"{folder} cannot be read ({error}): the index is damaged; make it again.") from None
        lengths = {len(x) for x in (self.features, self.uids, self.spans, self.items, *self.codes.values())}
        if len(lengths) != 1:
            raise SearchIndexError(f"{folder} holds arrays of {sorted(lengths)} rows: the index is damaged; make it again.")

    def __len__(self) -> int:
        return len(self.uids)

    def thumbnail(self, row: int) -> bytes:
        """WebP of a row."""
        start, size = self.spans[row].tolist()
        return os.pread(self._thumbnails, size, start)

    @cached_property
    def thumbnail_file_bytes(self) -> int:
        return os.fstat(self._thumbnails).st_size

    @property
    def holds_others(self) -> bool:
        """Whether its file of thumbnails has some of items that it does not hold any more."""
        return self.thumbnail_file_bytes > int(self.spans[:, 1].sum())


def read_items(folder: Path) -> pa.Table:
    """Rows of a segment's items. Raises OSError or ValueError."""
    if not (folder / ITEMS).exists():
        return read_parquet(folder / "items.parquet")
    with pa.memory_map(str(folder / ITEMS)) as file:
        table = ipc.open_file(file).read_all()
    table.validate()
    return table


def write_items(folder: Path, items: pa.Table) -> None:
    """What `read_items` reads. Raises StorageError: no space is left."""
    path = str(folder / ITEMS)
    with told_when_full(folder), pa.OSFile(path, "wb") as file, ipc.new_file(file, items.schema) as writer:
        writer.write_table(items, max_chunksize=ITEMS_OF_A_BATCH)


def joined_uids(segments: Sequence[Segment]) -> NDArray[np.int64]:
    """Uids of all items, end to end; of one segment they stay mapped."""
    return segments[0].uids if len(segments) == 1 else np.concatenate([s.uids for s in segments])


def open_segments(index: Path, manifest: Manifest) -> list[Segment]:
    """The segments in force. Raises SearchIndexError."""
    return [Segment(index / "segments" / name) for name in manifest.segments]


def stored_as(items: int) -> type[np.float16] | type[np.float32]:
    """The numbers that features of an index of so many items are kept in: in fp32 results are those of an evaluation to the last
    digit, and fp16 is half to read."""
    return np.float16 if items > FULL_PRECISION_UP_TO else np.float32


def write_segment(folder: Path, chunks: Iterable[tuple[pa.Table, Arrays]], first_uid: int, count: int, dim: int) -> None:
    """Write the embedded chunks of a listing, `count` readable images.

    Raises:
        SearchIndexError: they are not as many. StorageError: no space is left.
    """
    folder.mkdir(parents=True)
    codes: dict[str, ArrayFile] = {}
    tables, thumbnail_bytes, done = [], [], 0
    with contextlib.ExitStack() as stack:
        kind = stored_as(first_uid + count)
        features = stack.enter_context(ArrayFile(folder / "features.npy", (count, dim), kind))
        file = stack.enter_context(open(folder / "thumbnails.bin", "wb"))
        for rows, arrays in chunks:
            n = len(arrays["position"])
            if not n:
                continue
            features.write(arrays["features"].astype(kind))
            for name in CODES:
                if name in arrays:
                    if name not in codes:
                        shape = (count, arrays[name].shape[1])
                        codes[name] = stack.enter_context(ArrayFile(folder / f"{name}.npy", shape, arrays[name].dtype))
                    codes[name].write(arrays[name])
            table = rows.take(pa.array(arrays["position"]))
            for column, name in enumerate(("height", "width")):
                table = table.append_column(name, pa.array(arrays["size"][:, column], pa.int32()))
            if "sha256" in arrays:  # a chunk that an older version left has none
                hashes = pa.array([row.tobytes() for row in arrays["sha256"]], pa.binary(32))
                table = table.append_column("file_sha256", hashes)
            tables.append(table)
            sizes = arrays["thumbnail_bytes"]
            thumbnail_bytes.append(sizes)
            file.write(arrays["thumbnails"].tobytes())
            done += n
    if done != count:
        raise SearchIndexError(f"{folder}: {done} of {count} images arrived. Start the same command again.")
    _write_rows(
        folder,
        pa.concat_tables(tables, promote_options="default"),
        np.arange(first_uid, first_uid + count),
        _end_to_end(np.concatenate(thumbnail_bytes)),
    )


def join_items(tables: Sequence[pa.Table]) -> pa.Table:
    """Items of several segments as one table; a metadata column whose cells do not go together becomes text, as it does within
    one source."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except NOT_JOINED:
        names = {name for table in tables for name in table.column_names}
        mixed = {name for name in names if not _go_together([t.select([name]) for t in tables if name in t.column_names])}
        as_text = [pa.schema([f.with_type(pa.string()) if f.name in mixed else f for f in table.schema]) for table in tables]
        return pa.concat_tables([t.cast(schema) for t, schema in zip(tables, as_text)], promote_options="permissive")


def _go_together(columns: Sequence[pa.Table]) -> bool:
    """Whether tables of one column can be joined without loss."""
    try:
        pa.concat_tables(columns, promote_options="permissive")
    except NOT_JOINED:
        return False
    return True


def copy_rows(
    folder: Path, parts: Sequence[tuple[Segment, NDArray[np.int64]]], same: pa.Table | None = None, forget: bool = False
) -> None:
    """Write a segment of the chosen rows of others, in order. Nothing is embedded.

    Args:
        same: rows of a listing, in whose place and time of change items of these ids are from now on.
        forget: no thumbnail of another row stays in its files. Else those of one source are linked, where half of the
            bytes or more are of these rows.
    """
    folder.mkdir(parents=True)
    count = sum(len(rows) for _, rows in parts)
    first = parts[0][0]
    arrays = {"features": [s.features for s, _ in parts]} | {n: [s.codes[n] for s, _ in parts] for n in first.codes}
    for name, sources in arrays.items():
        widest = np.result_type(*(source.dtype for source in sources))  # what older versions wrote stays as it is
        with ArrayFile(folder / f"{name}.npy", (count, sources[0].shape[1]), widest) as target:
            for source, (_, rows) in zip(sources, parts):
                for start in range(0, len(rows), COPIED_ROWS):
                    target.write(source[rows[start : start + COPIED_ROWS]])
    spans = _copy_thumbnails(folder / "thumbnails.bin", parts, forget)
    tables = join_items([s.items.take(pa.array(rows)) for s, rows in parts])
    if same is not None:
        tables = _relisted(tables, same)
    uids = np.concatenate([s.uids[rows] for s, rows in parts])
    _write_rows(folder, tables, uids, spans)


def _relisted(items: pa.Table, same: pa.Table) -> pa.Table:
    """Items with what a listing says now of those that it names; what belongs to their content stays."""
    at = {name: row for row, name in enumerate(same["id"].to_pylist())}
    ids = items["id"].to_pylist()
    old = pa.array([row for row, name in enumerate(ids) if name in at], pa.int64())
    listed = same.take(pa.array([at[ids[row]] for row in old.to_pylist()], pa.int64()))
    for name in ("height", "width", "file_sha256"):
        if name in items.column_names:
            listed = listed.append_column(name, items[name].take(old))
    new_row = {row: len(items) + number for number, row in enumerate(old.to_pylist())}
    order = pa.array([new_row.get(row, row) for row in range(len(items))], pa.int64())
    return join_items([items, listed]).take(order)


def _copy_thumbnails(target: Path, parts: Sequence[tuple[Segment, NDArray[np.int64]]], forget: bool) -> NDArray[np.int64]:
    """Write thumbnails of the chosen rows, or link the file that has them; returns where they are in it, (n, 2)."""
    spans = np.concatenate([segment.spans[rows] for segment, rows in parts])
    if len(parts) == 1 and not forget and 2 * int(spans[:, 1].sum()) >= parts[0][0].thumbnail_file_bytes:
        with contextlib.suppress(OSError):  # a file system without hard links
            os.link(parts[0][0].folder / "thumbnails.bin", target)
            return spans
    with open(target, "wb") as file:
        for segment, rows in parts:
            for row in rows.tolist():
                file.write(segment.thumbnail(row))
    return _end_to_end(spans[:, 1])


def _end_to_end(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where thumbnails of these bytes are, one behind the other, (n, 2)."""
    return np.stack([np.cumsum(sizes) - sizes, sizes], 1)


def _write_rows(folder: Path, items: pa.Table, uids: NDArray[np.int64], spans: NDArray[np.int64]) -> None:
    write_items(folder, items)
    save_array(folder / "uids.npy", uids.astype(np.int64))
    save_array(folder / "thumbnails.npy", spans.astype(np.int64))
    sync_files(folder)
