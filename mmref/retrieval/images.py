"""Which images an index holds: a folder, a shard set, a table, a dataset, or a URL prefix, listed as rows of one table.

Every image has a place (`path`, `offset`, `length`: a file or URL, a part of one, or a row of a Parquet file; see
`mmref.storage.image_places`), so that all kinds of source are read alike, by the workers that embed and by the service
that shows an image.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import date
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa

from mmref.data.folder import describe, stamp_of
from mmref.data.sample_reader import SampleReader, sound
from mmref.data.shard_set import ShardSet
from mmref.errors import EmptySourceError, OutsideError, SampleError, SearchIndexError, StorageError
from mmref.retrieval.columns import metadata_column
from mmref.retrieval.sources import TARS, images_place, parquet_in, refuse_tars, shared_source
from mmref.shards.sources.folders import FolderSource
from mmref.shards.sources.hub_dataset import SCHEME
from mmref.shards.sources.listed import ListedImage, ListedSource, split_name
from mmref.storage.cells import Row
from mmref.storage.fetch import id_of, locate, locate_inside, outside_most, unsigned
from mmref.storage.files import matching_files
from mmref.storage.image_places import Place, file_of, read_place
from mmref.storage.locations import absolute, from_text, is_url, join, size_of, to_text
from mmref.storage.secrets import told
from mmref.storage.tables import TABLE_ENDINGS, Table, read_table

COLUMNS = {  # of every listing, before metadata columns
    "id": pa.string(), "path": pa.string(), "offset": pa.int64(), "length": pa.int64(), "object_id": pa.string(),
    "file_stamp": pa.string(),
}  # fmt: skip
RESERVED = {*COLUMNS, "uid", "width", "height", "file_sha256", "captions", "image_id"}
FOLDERS = ("auto", "objects", "plain")  # what the folders of a folder may be taken for
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
    notes: list[str] = field(default_factory=list)  # what a user should hear of the source


@dataclass(frozen=True)
class TableColumns:
    """Names of a table's columns: the image's path or URL, the object's id (optional), the item's; where images may lie."""

    image: str = "image"
    object_id: str = "object_id"
    image_root: str | None = None
    item_id: str | None = None  # None: the image's own, see `mmref.storage.fetch.id_of`
    allow_outside: bool = False  # of the image root
    config: str | None = None  # of a dataset
    folders: str = "auto"  # whether the folders of a folder are objects: one of FOLDERS


DEFAULT_COLUMNS = TableColumns()


def list_images(source: str, split: str | None = None, columns: TableColumns = DEFAULT_COLUMNS) -> Listing:
    """Every image of a folder (recursive), shard set or dataset (of `split`, by default all splits), table, or URL prefix.

    Raises:
        EmptySourceError: there is nothing there, or no image in it. SearchIndexError: it cannot be listed.
        ShardSetError, SourceError: a damaged shard set, dataset or table.
    """
    source = images_place(source)
    shared = shared_source(source, columns)
    if shared is not None:
        listing = _list_shared(shared, split, columns)
    elif source.lower().endswith(TABLE_ENDINGS):
        listing = _list_table(source, columns)
        listing = replace(listing, items=_stamped(listing.items))
    elif size_of(join(source, "manifest.json")) is not None:
        listing = _list_shards(ShardSet.open(source), split)
    else:
        listing = _list_folder(source, split, columns)
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
        return read_place(Place(path, offset, length))
    except StorageError:  # says nothing of the image: leaving it out would be wrong
        raise
    except Exception as error:  # every file system has its own
        name = told(path)
        raise SampleError(f"{to_text(name)} cannot be read: {str(error).replace(path, name)}.") from None


def no_items() -> pa.Table:
    """A listing of nothing."""
    return _as_table([], [])


def _as_table(rows: list[dict[str, Any]], extra: list[str], plain: bool = False) -> pa.Table:
    """Rows as a table; metadata columns as of `metadata_column`."""
    arrays: dict[str, Any] = {name: pa.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()}
    for name in extra:
        arrays[name] = metadata_column(name, [row["extra"].get(name) for row in rows], plain)
    return pa.table(arrays)


def _stamped(items: pa.Table) -> pa.Table:
    """Whole files of this machine with their stamps; one that is not there is found out when it is read."""

    places = [from_text(path) for path in items["path"].to_pylist()]
    stamps = pa.array([None if is_url(path) else _stamp(path) for path in places], pa.string())
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
    return value is None or isinstance(value, str | int | float | bool | date | Decimal)


def _sample(captions: list[str]) -> list[str]:
    distinct = sorted(set(captions))
    return [distinct[i] for i in np.random.default_rng(0).permutation(len(distinct))[:QUERIES]]


# -- kinds of source -------------------------------------------------------------------------------------------------


def _list_folder(source: str, split: str | None, columns: TableColumns) -> Listing:
    """Pictures below a folder or URL prefix; ids are paths relative to it. Where there is none, images of Parquet files."""
    if not is_url(source) and not os.path.isdir(source):
        raise EmptySourceError(
            f"{source} is no folder, shard set or table ({', '.join(TABLE_ENDINGS)}). A dataset of a hub is {SCHEME}USER/NAME."
        )
    found = FolderSource(source, strict=False, wrong=SearchIndexError)
    listing = _list_shared(found, split, columns)
    if len(listing.items):
        return listing
    if inside := parquet_in(source, columns):
        return _list_shared(inside, split, columns)
    refuse_tars(source, matching_files(source, TARS))
    return listing


def _list_shared(source: ListedSource, split: str | None, columns: TableColumns) -> Listing:
    """Images of a source that shard sets are built from too. Raises SearchIndexError for a split that it has not."""
    images = list(source.images())
    if split is not None and images:
        splits = list(dict.fromkeys(image.split for image in images if image.split is not None))
        if split_name(split) not in splits:
            raise SearchIndexError(f"{source.origin} has no split {split!r}, only {', '.join(splits) or 'images without any'}.")
        images = [image for image in images if image.split == split_name(split)]
    of_folder = isinstance(source, FolderSource)
    with_objects = not of_folder or columns.folders == "objects" or (columns.folders == "auto" and source.regular)
    stamps, rows, left = _Stamps(source), [], dict(source.columns_left)
    for image in images:
        fields: dict[str, Any] = {"split": image.split} if image.split is not None else {}
        fields |= {"caption": image.captions[0]} if image.captions else {}
        for name, value in image.extra.items():
            if name in RESERVED:
                left[name] = "the index has its own"
            elif value is not None and name not in fields:
                fields[name] = value if _is_scalar(value) else str(value)
        object_id = image.object_id if with_objects or image.object_id in source.told_objects else None
        rows.append(_row(from_text(image.image_id), *image.place, object_id, fields, stamps.of(image)))
    extra = list(dict.fromkeys(name for row in rows for name in row["extra"]))
    captions = [text for image in images for text in image.captions]
    notes = _said_of_folders(rows) if of_folder and with_objects and rows else []
    passed, cells = dict(source.passed_over), dict(source.infinite)
    return Listing(_as_table(rows, extra), _sample(captions), source.left_out, passed, source.closed, left, cells, notes)


def _said_of_folders(rows: list[dict[str, Any]]) -> list[str]:
    count = len({row["object_id"] for row in rows})
    return [f"{count:,} folders taken as objects (--folders plain: they mean nothing)"]


class _Stamps:
    """What changes with the file of an image; a file is looked at once."""

    def __init__(self, source: ListedSource) -> None:
        self._known = source.stamps
        self._files: dict[str, str | None] = {}

    def of(self, image: ListedImage) -> str | None:
        """None where it is not known."""
        if (stamp := self._known.get(image.image_id)) is not None:
            return stamp
        file = file_of(image.place.path)
        if file not in self._files:
            self._files[file] = None if is_url(file) else _stamp(file)
        return self._files[file]


def _stamp(path: str) -> str | None:
    try:
        return stamp_of(os.stat(path))
    except OSError:  # it is found out when it is read
        return None


def _list_shards(shards: ShardSet, split: str | None) -> Listing:
    """Images of one split or of all; ids are those of the images, the first caption and scalar fields become columns."""
    rows, captions = [], []
    extra: dict[str, None] = {"split": None, "caption": None}
    for name in [split] if split else shards.splits:
        index = shards.index(name)
        reader, stamps = SampleReader(index), index.shard_sha256 or [None] * len(index.shard_paths)
        for i, record in enumerate(reader.read_metas(range(len(index)))):
            fields: dict[str, Any] = {"split": name}
            try:
                meta = sound(record)
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
    rows = _as_table(list(items.rows.values()), list(items.extra), plain=source.lower().endswith((".csv", ".tsv")))
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
            raise SampleError(f"image {told(cell)!r} has the id {before!r} in an earlier row, here {name!r}")
        if known is not None and self._images[name] != image:
            raise SampleError(f"the id {name!r} is that of the image {self._images[name]!r} in an earlier row")
        place = self.locate(cell, self.root) if known is None else ""
        object_id = (row.text(self.columns.object_id) or None) if self.of_object else None
        if known is not None and known["object_id"] and object_id and object_id != known["object_id"]:
            earlier = known["object_id"]
            raise SampleError(f"image {told(cell)!r} belongs to the object {earlier!r} in an earlier row, here to {object_id!r}")
        texts = [text for column in self.of_captions for text in row.texts(column)]
        fields = {k: v for k in self.kept if (v := self._metadata(row, k)) is not None}
        self.captions += texts
        if known is None:
            self.extra |= dict.fromkeys(fields)
            self._images[name], self._ids[image] = image, name
            known = self.rows[name] = _row(name, place, 0, 0, object_id, fields)
        known["object_id"] = known["object_id"] or object_id

    def _metadata(self, row: Row, column: str) -> Any:
        """A single value. None for an empty cell, for what is no single value (lists, mappings, bytes that are no text), whose
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
        return None if value == "" else value if _is_scalar(value) else str(value)
