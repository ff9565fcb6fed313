"""Which images an index holds: a folder, a shard set, a table, or a URL prefix, listed as rows of one table.

Every image is a byte range of a file or URL (`path`, `offset`, `length`; length 0 is the whole file), so that all kinds
of source are read alike, by the workers that embed and by the service that shows an image.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mmref.data.folder import describe, look_into, stamp_of
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import EmptySourceError, OutsideError, SampleError, SearchIndexError, StorageError
from mmref.storage.cells import Row
from mmref.storage.fetch import id_of, locate, locate_inside, outside_most, read_location, unsigned
from mmref.storage.locations import absolute, from_text, is_url, join, read_bytes, size_of, to_text
from mmref.storage.tables import TABLE_ENDINGS, Table, read_table

COLUMNS = {  # of every listing, before metadata columns
    "id": pa.string(), "path": pa.string(), "offset": pa.int64(), "length": pa.int64(), "object_id": pa.string(),
    "file_stamp": pa.string(),
}  # fmt: skip
RESERVED = {*COLUMNS, "uid", "width", "height", "file_sha256", "captions", "image_id"}
QUERIES = 256  # captions kept to measure the recall of an approximate index with


@dataclass(frozen=True)
class Listing:
    """Images of a source: `COLUMNS` and its metadata columns.

    Ids and paths are texts as of `storage.locations.to_text`. object_id is null where it is not known, file_stamp too: it is
    another one when the file has changed.
    """

    items: pa.Table
    captions: list[str]  # at most QUERIES of the source's captions
    skipped: list[tuple[str, str]] = field(default_factory=list)  # what was left out (a row, a file), and why
    passed_over: dict[str, int] = field(default_factory=dict)  # files that are no images, by ending
    closed: list[str] = field(default_factory=list)  # folders that could not be looked into
    columns_left: dict[str, str] = field(default_factory=dict)  # columns of a table that are no metadata, and why
    cells_left: dict[str, int] = field(default_factory=dict)  # infinite numbers of each column, which are kept as missing


@dataclass(frozen=True)
class TableColumns:
    """Names of a table's columns: the image's path or URL, the object's id (optional), the item's; where images may lie."""

    image: str = "image"
    object_id: str = "object_id"
    image_root: str | None = None
    item_id: str | None = None  # None: the image's own, see `mmref.storage.fetch.id_of`
    allow_outside: bool = False  # of the image root


DEFAULT_COLUMNS = TableColumns()


def list_images(source: str, split: str | None = None, columns: TableColumns = DEFAULT_COLUMNS) -> Listing:
    """Every image of a folder (recursive), shard set (of `split`, by default all splits), table, or URL prefix.

    Raises:
        EmptySourceError: there is nothing there, or no image in it. SearchIndexError: it cannot be listed.
        ShardSetError, SourceError: a damaged shard set or table.
    """
    source = absolute(source)
    if source.lower().endswith(TABLE_ENDINGS):
        listing = _list_table(source, columns)
        listing = replace(listing, items=_stamped(listing.items))
    elif size_of(join(source, "manifest.json")) is not None:
        listing = _list_shards(ShardSet.open(source), split)
    else:
        listing = _list_folder(source)
    if not len(listing.items):
        found = describe(listing.passed_over) or "nothing else"
        if left := [f"{what}: {why}" for what, why in listing.skipped]:
            found = f"{len(left):,} were left out, the first: {'; '.join(left[:3])}"
        raise EmptySourceError(f"{source} holds no image that can be read here ({found}).")
    return listing


def read_image_bytes(path: str, offset: int = 0, length: int = 0) -> bytes:
    """Encoded bytes of one image of a listing. Raises SampleError, or StorageError where storage does not answer."""
    path = from_text(path)
    try:
        data = read_bytes(path, offset, length) if length else read_location(path)
    except StorageError:  # says nothing of the image: leaving it out would be wrong
        raise
    except Exception as error:  # every file system has its own
        raise SampleError(f"{to_text(path)} cannot be read: {error}.") from None
    if length and len(data) != length:
        raise SampleError(f"{to_text(path)}: short at byte {offset}: {len(data)} of {length} bytes.")
    return data


def no_items() -> pa.Table:
    """A listing of nothing."""
    return _as_table([], [])


def _as_table(rows: list[dict[str, Any]], extra: list[str]) -> pa.Table:
    """Rows as a table; a metadata column of mixed types becomes text."""
    arrays: dict[str, Any] = {name: pa.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()}
    for name in extra:
        values = [row["extra"].get(name) for row in rows]
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            arrays[name] = pa.array([None if value is None else str(value) for value in values])
        if pa.types.is_null(arrays[name].type):
            arrays[name] = arrays[name].cast(pa.string())
    return pa.table(arrays)


def _stamped(items: pa.Table) -> pa.Table:
    """Whole files of this machine with their stamps; one that is not there is found out when it is read."""

    def stamp(path: str) -> str | None:
        try:
            return None if is_url(path) else stamp_of(os.stat(from_text(path)))
        except OSError:
            return None

    stamps = pa.array([stamp(path) for path in items["path"].to_pylist()], pa.string())
    return items.set_column(items.column_names.index("file_stamp"), "file_stamp", stamps)


def _row(
    name: str,
    path: str,
    offset: int,
    length: int,
    object_id: str | None,
    extra: dict[str, Any],
    stamp: str | None = None,
) -> dict[str, Any]:
    return {
        "id": to_text(name), "path": to_text(path), "offset": offset, "length": length, "object_id": object_id,
        "file_stamp": stamp, "extra": extra,
    }  # fmt: skip


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _sample(captions: list[str]) -> list[str]:
    distinct = sorted(set(captions))
    return [distinct[i] for i in np.random.default_rng(0).permutation(len(distinct))[:QUERIES]]


# -- kinds of source -------------------------------------------------------------------------------------------------


def _list_folder(source: str) -> Listing:
    """Pictures below a folder or URL prefix; ids are paths relative to it."""
    if not is_url(source) and not os.path.isdir(source):
        raise EmptySourceError(f"{source} is no folder, shard set or table ({', '.join(TABLE_ENDINGS)}).")
    found = look_into(source, SearchIndexError)
    rows = [_row(name, path, 0, 0, None, {}, stamp) for name, path, stamp in found.pictures]
    return Listing(_as_table(rows, []), [], found.skipped, dict(found.passed_over), found.closed)


def _list_shards(shards: ShardSet, split: str | None) -> Listing:
    """Images of one split or of all; ids are those of the images, the first caption and scalar fields become columns."""
    rows, captions = [], []
    extra: dict[str, None] = {"split": None, "caption": None}
    for name in [split] if split else shards.splits:
        index = shards.index(name)
        reader, stamps = SampleReader(index), index.shard_sha256 or [None] * len(index.shard_paths)
        for i in range(len(index)):
            fields: dict[str, Any] = {"split": name}
            try:
                meta = reader.read_meta(i)
                texts = [text for text in meta["captions"] if isinstance(text, str) and text.strip()]
                captions += texts
                fields["caption"] = texts[0] if texts else None
                fields |= {k: v for k, v in meta.items() if k not in RESERVED and k not in fields and _is_scalar(v)}
            except SampleError:
                pass  # the image may be sound; its record adds nothing
            extra |= dict.fromkeys(fields)
            path, object_id = index.shard_paths[int(index.shard[i])], index.object_ids[int(index.object_row[i])]
            span = int(index.image_offset[i]), int(index.image_size[i])
            rows.append(_row(id_of(index.image_ids[i]), path, *span, object_id, fields, stamps[int(index.shard[i])]))
    return Listing(_as_table(rows, list(extra)), _sample(captions))


def _list_table(source: str, columns: TableColumns) -> Listing:
    """Distinct images of a table in its order, see `_TableItems`; rows that cannot be used are listed. Raises SearchIndexError
    where most rows name images that lie outside of the root."""
    table = read_table(source)
    options = {columns.image: "--image-column"}
    if columns.object_id != TableColumns.object_id:
        options[columns.object_id] = "--object-column"
    if columns.item_id is not None:
        options[columns.item_id] = "--id-column"
    table.require(options, SearchIndexError)
    root = absolute(os.path.dirname(source) if columns.image_root is None else columns.image_root)
    items = _TableItems(table, columns, root)
    skipped: list[tuple[str, str]] = []
    outside: list[tuple[str, str]] = []
    count = 0
    for row in table.rows(items.names):
        count += 1
        try:
            items.take(row)
        except SampleError as error:
            skipped.append((f"row {row.number}", str(error)))
            if isinstance(error, OutsideError):
                outside.append(skipped[-1])
    if why := outside_most(source, root, outside, count):
        raise SearchIndexError(why)
    # A list of captions is taken, as captions.
    left = {name: why for name, why in items.left.items() if name not in items.of_captions}
    rows = _as_table(list(items.rows.values()), list(items.extra))
    return Listing(rows, _sample(items.captions), skipped, columns_left=left, cells_left=dict(items.infinite))


class _TableItems:
    """Items of a table, a row at a time. The first row of an image counts, others add captions; single values of columns that
    are not named otherwise are metadata."""

    def __init__(self, table: Table, columns: TableColumns, root: str) -> None:
        self.columns, self.root = columns, root
        self.locate = locate if columns.allow_outside else locate_inside
        named = {columns.image, columns.object_id, columns.item_id, *RESERVED}
        self.kept = [name for name in table.names if name and name not in named]
        own = [name for name in table.names if name in RESERVED]
        self.left = {
            name: "the index has its own" for name in own if name not in {columns.image, columns.object_id, columns.item_id}
        }
        self.of_object = columns.object_id in table.names
        self.of_captions = table.caption_columns()
        used = [columns.image, *([columns.object_id] if self.of_object else [])]
        used += [*([columns.item_id] if columns.item_id is not None else []), *self.of_captions, *self.kept]
        self.names = list(dict.fromkeys(used))
        self.rows: dict[str, dict[str, Any]] = {}  # by id
        self.captions: list[str] = []
        self.extra: dict[str, None] = {}
        self.infinite: Counter[str] = Counter()
        self._images: dict[str, str] = {}  # of each id: the cell, without what signs it
        self._ids: dict[str, str] = {}  # the other way round

    def take(self, row: Row) -> None:
        """Raises SampleError for a row that cannot be used, or gives an image another object or id."""
        cell = row.needed(self.columns.image).removeprefix("./")
        name = id_of(cell) if self.columns.item_id is None else row.needed(self.columns.item_id)
        image, known = unsigned(cell), self.rows.get(name)
        if (before := self._ids.get(image, name)) != name:
            raise SampleError(f"image {cell!r} has the id {before!r} in an earlier row, here {name!r}")
        if known is not None and self._images[name] != image:
            raise SampleError(f"the id {name!r} is that of the image {self._images[name]!r} in an earlier row")
        place = self.locate(cell, self.root) if known is None else ""
        object_id = (row.text(self.columns.object_id) or None) if self.of_object else None
        if known is not None and known["object_id"] and object_id and object_id != known["object_id"]:
            earlier = known["object_id"]
            raise SampleError(f"image {cell!r} belongs to the object {earlier!r} in an earlier row, here to {object_id!r}")
        texts = [text for column in self.of_captions for text in row.texts(column)]
        fields = {k: v for k in self.kept if (v := self._metadata(row, k)) is not None}
        self.captions += texts
        if known is None:
            self.extra |= dict.fromkeys(fields)
            self._images[name], self._ids[image] = image, name
            known = self.rows[name] = _row(name, place, 0, 0, object_id, fields)
        known["object_id"] = known["object_id"] or object_id

    def _metadata(self, row: Row, column: str) -> Any:
        """A single value, times and decimals as text. None for what is none (lists, mappings, bytes that are no text), whose
        columns are added to `left`, and for an infinite number, which JSON does not have. Raises SampleError."""
        cell = row.cell(column)
        if isinstance(cell, float) and math.isinf(cell):
            self.infinite[column] += 1
            return None
        try:
            value = None if isinstance(cell, list | dict) else row.value(column)
        except SampleError:
            if not isinstance(cell, bytes):
                raise
            value = None
        if value is None and cell is not None:
            self.left[column] = "no single values"
        return value if _is_scalar(value) else str(value)
