"""A source's images as rows of Arrow: what travels from a source to the tasks that write tars, however many there are.

A row is an image, or one more caption of it where the source says so by rows (`RowSource`).
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple, Protocol, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmref.shards.samples import Source, SourceImage, SourceObject

TEXTS = pa.list_(pa.string())
ROWS = pa.schema([
    ("row", pa.int64()),  # its number in the source; of a source of objects that of the object
    ("split", pa.string()), ("object_id", pa.string()), ("image_id", pa.string()),
    ("key", pa.string()),  # rows with the same one are the same image
    ("ref", pa.binary()),  # pickled; null where it is the image id
    ("captions", TEXTS), ("kinds", TEXTS),
    ("extra", pa.binary()),  # pickled; null where there is none
])  # fmt: skip
TOGETHER = 16_384  # images of objects that become a table


class RowSource(Source, Protocol):
    """A source that gives its rows as they come, so that a table of any size passes through."""

    def batches(self) -> Iterator[pa.Table]:
        """Tables of the schema ROWS. Rows of an object, and of an image (`key`), may lie anywhere; `skipped` may be emptied
        between two of them. Raises SourceError."""

    def contradiction(self, found: Conflict) -> str:
        """What to say of rows that cannot both be true."""


class Conflict(NamedTuple):
    """A row that contradicts an earlier one: its object is in another split, or its image of another object."""

    row: int
    name: str  # of the object; of the image where `of_image`
    first: str  # split or object in the earlier row
    second: str
    of_image: bool


def source_rows(source: Source) -> Iterator[pa.Table]:
    """Rows of any source, a table at a time."""
    if hasattr(source, "batches"):
        yield from cast(RowSource, source).batches()
        return
    images: list[tuple[int, SourceObject, SourceImage]] = []
    for number, item in enumerate(source.objects()):
        images += [(number, item, image) for image in item.images]
        if len(images) >= TOGETHER:
            yield _writable(images, source.skipped)
            images = []
    yield _writable(images, source.skipped)


def _writable(images: list[tuple[int, SourceObject, SourceImage]], skipped: list[str]) -> pa.Table:
    """A table of images; those with half a character in a text, which no file can hold, are listed instead."""
    try:
        return _table(images)
    except UnicodeEncodeError:
        sound = []
        for row in images:
            try:
                _table([row])
                sound.append(row)
            except UnicodeEncodeError as error:
                skipped.append(f"{row[2].image_id!a}: a text cannot be written: {error}")
        return _table(sound)


def _table(images: list[tuple[int, SourceObject, SourceImage]]) -> pa.Table:
    columns = {
        "row": [number for number, _, _ in images],
        "split": [item.split for _, item, _ in images],
        "object_id": [item.object_id for _, item, _ in images],
        "image_id": [image.image_id for _, _, image in images],
        "key": [image.image_id for _, _, image in images],
        "ref": [None if image.ref == image.image_id else pickle.dumps(image.ref) for _, _, image in images],
        "captions": [image.captions for _, _, image in images],
        "kinds": [image.caption_kinds for _, _, image in images],
        "extra": [pickle.dumps(image.extra) if image.extra else None for _, _, image in images],
    }
    return pa.table(columns, ROWS)


def objects_of(tables: Iterable[pa.Table | pa.RecordBatch]) -> Iterator[SourceObject]:
    """Objects of rows in which each has its images side by side, and each image one row."""

    def images() -> Iterator[tuple[str, str, SourceImage]]:
        names = ("split", "object_id", "image_id", "ref", "captions", "kinds", "extra")
        for table in tables:
            for split, object_id, image_id, ref, captions, kinds, extra in zip(
                *(table.column(name).to_pylist() for name in names), strict=True
            ):
                loaded = image_id if ref is None else pickle.loads(ref)
                fields = {} if extra is None else pickle.loads(extra)
                yield split, object_id, SourceImage(image_id, loaded, captions, kinds, fields)

    for (split, object_id), found in groupby(images(), key=lambda row: row[:2]):
        yield SourceObject(split, object_id, [image for _, _, image in found])


# -- rows of a whole set, or of a part of it that holds all rows of its objects ----------------------------------------


def in_groups(table: pa.Table, column: str) -> NDArray[np.int64]:
    """Numbers of the groups that neighbors with the same value form: (n,), from 0."""
    values = table.column(column).combine_chunks()
    if not len(values):
        return np.zeros(0, np.int64)
    changes = pc.not_equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(changes, dtype=np.int64)])


def split_conflict(table: pa.Table, merges: bool) -> Conflict | None:
    """The first row whose object is in another split, of rows in which objects lie side by side; where rows are not to be merged,
    the first of an object that came before."""
    group = in_groups(table, "object_id")
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    column = _codes(table, "split") if merges else table.column("row").to_numpy()
    return _first(table, column != column[starts][group], starts[group], "object_id", "split", False)


def image_conflict(table: pa.Table, merges: bool) -> Conflict | None:
    """The first row whose image is of another object, of all rows of their images; where rows are not to be merged, the first of
    an image that came before."""
    keys = _codes(table, "key")
    _, firsts, inverse = np.unique(keys, return_index=True, return_inverse=True)
    earlier = firsts[inverse]
    objects = _codes(table, "object_id") if merges else np.arange(len(keys))
    return _first(table, objects != objects[earlier], earlier, "image_id", "object_id", True)


def _first(
    table: pa.Table, wrong: NDArray[np.bool_], earlier: NDArray[np.int64], name: str, what: str, of_image: bool
) -> Conflict | None:
    at = np.flatnonzero(wrong)
    if not len(at):
        return None
    row = table.column("row").to_numpy()
    position = int(at[np.argmin(row[at])])
    first, second = (table.column(what)[int(i)].as_py() for i in (earlier[position], position))
    return Conflict(int(row[position]), table.column(name)[position].as_py(), first, second, of_image)


def merge_images(table: pa.Table) -> pa.Table:
    """Rows of the same image as one, of rows in which objects lie side by side: the first row with the captions of all."""
    group = in_groups(table, "object_id")
    pairs = group * (len(table) + 1) + _codes(table, "key")
    _, firsts, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    if len(firsts) == len(table):
        return table
    order = np.argsort(firsts)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    merged = table.take(pa.array(firsts[order]))
    for name in ("captions", "kinds"):
        column = table.column(name).combine_chunks()
        if column.null_count == len(column):
            continue
        counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        owner = np.repeat(rank[inverse], counts)
        texts = column.flatten().take(pa.array(np.argsort(owner, kind="stable")))
        lists = as_lists(texts, np.bincount(owner, minlength=len(order)))
        merged = merged.set_column(merged.column_names.index(name), name, lists)
    return merged


def as_lists(texts: pa.Array, counts: NDArray[np.int64]) -> pa.ListArray:
    """Lists of so many texts each, of texts end to end."""
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), texts)


def _codes(table: pa.Table, column: str) -> NDArray[np.int64]:
    """A number for each distinct value: (n,)."""
    indices = table.column(column).combine_chunks().dictionary_encode().indices
    return np.asarray(indices.to_numpy(zero_copy_only=False), np.int64)
