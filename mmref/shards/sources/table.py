"""Your own data: a CSV, TSV, JSONL or Parquet table with an image, an object id and captions in every row.

Rows with the same image are one image with more captions; rows with the same object id are one object. The image column
holds a path below `image_root` or an http(s) URL; with `allow_outside` any path, and whatever fsspec opens (s3://, gs://, ...).
"""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmref.errors import OutsideError, SampleError, SourceError
from mmref.shards.rows import ROWS, TEXTS, Conflict, as_lists, image_conflict, merge_images, objects_of, split_conflict
from mmref.shards.samples import DEFAULT_FRACTIONS, SourceObject, can_name_split, check_kept, common_split, hash_split
from mmref.shards.sources.image_columns import check_no_written_lists
from mmref.storage.cells import Batch
from mmref.storage.downloads import DEFAULT, Downloads
from mmref.storage.fetch import is_web, locate, locate_inside, one_spelling, outside_most, read_location
from mmref.storage.locations import absolute, folder_name, is_url, join
from mmref.storage.secrets import USER
from mmref.storage.tables import Table, read_table, table_files

LOOKED_AT = 10_000  # rows of which links are followed before anything is begun: it takes a look at the disk for each
WEB = r"(?i)^https?://"
ODD = r"^[~/]|(^|/)\.{1,2}(/|$)|://|\\"  # names that may lie outside of the root
ODD_AT_URL = ODD + "|%|::"
RESPELLED = ODD + r"|//|[^\x00-\x7F]"  # names that may have another spelling


class TableSource:
    """One row per image, or per image and caption."""

    name = "table"
    min_images = 1

    def __init__(
        self,
        path: str,
        image: str = "image",
        object_id: str = "object_id",
        captions: list[str] | None = None,
        split: str | None = None,
        image_root: str | None = None,
        fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
        keep: Iterable[str] = (),
        licence: str = "not stated",
        min_images: int = 1,
        allow_outside: bool = False,
        downloads: Downloads = DEFAULT,
    ) -> None:
        """image, object_id, captions, split: names of columns. Captions None: `caption`, or the list column `captions`;
        split None: `split` if there is one, else a fixed hash of the object id with `fractions`. keep: further columns
        to carry in the sample's json. min_images: objects with fewer usable images are left out. allow_outside: images may lie
        outside of image_root. downloads: how http(s) URLs are fetched."""
        self.path, self.image, self.object_id, self.captions, self.split = path, image, object_id, captions, split
        self.image_root = absolute(_root_of(path) if image_root is None else image_root)  # workers may run in another directory
        self.locate = locate if allow_outside else locate_inside
        self.fractions, self.keep, self.licence, self.min_images = dict(fractions), list(keep), licence, min_images
        self.origin = folder_name(path)  # the full path says more of your machine than of the data
        self.downloads = downloads
        self.skipped: list[str] = []

    def objects(self) -> list[SourceObject]:
        """Objects in the order of the table, all of them in memory; see `batches`, which it raises as."""
        table = pa.concat_tables([ROWS.empty_table(), *self.batches()]).combine_chunks()
        codes = table.column("object_id").combine_chunks().dictionary_encode().indices
        together = table.take(pa.array(np.argsort(codes.to_numpy(zero_copy_only=False), kind="stable")))
        conflicts = [found for found in (split_conflict(together, True), image_conflict(table, True)) if found]
        if conflicts:
            raise SourceError(self.contradiction(min(conflicts, key=lambda found: found.row)))
        return list(objects_of([merge_images(together)]))

    def batches(self) -> Iterator[pa.Table]:
        """Rows in the order of the table. One that lacks its image, object or split, or has a cell of another type, is listed and
        left out, and so is one whose image lies where it may not. Links are followed for the first `LOOKED_AT` rows; for
        others `load` finds out.

        Raises SourceError: no such file, unknown ending, missing column, most images outside of the root.
        """
        table = read_table(self.path)
        captions, split = self._columns(table)
        needed = dict.fromkeys([self.image, self.object_id, *captions, *self.keep, *([split] if split else [])])
        outside: list[tuple[int, str]] = []
        count = 0
        for batch in table.batches(list(needed)):
            looked = max(0, LOOKED_AT - count)
            count += len(batch.numbers)
            rows = self._rows(batch, captions, split, looked, outside)
            if 0 < looked <= len(batch.numbers):
                last = int(batch.numbers[looked - 1])
                self._check_inside([each for each in outside if each[0] <= last], LOOKED_AT)
            yield rows
        self._check_inside(outside, count)

    def contradiction(self, found: Conflict) -> str:
        """What to say of a row that contradicts an earlier one."""
        where = f"{self.path}, row {found.row}: "
        if found.of_image:
            return (
                f"{where}image {found.name!r} belongs to the objects {found.first!r} and {found.second!r}. An image shows one "
                "object: copy the file under another name if that is meant."
            )
        return (
            f"{where}object {found.name!r} is in {found.first!r} and in {found.second!r}. Splits are by object: give all of its "
            f"rows one {self.split or 'split'}."
        )

    def _rows(
        self, batch: Batch, captions: list[str], split: str | None, looked: int, outside: list[tuple[int, str]]
    ) -> pa.Table:
        """Rows of a batch that can be used; the others are listed. `outside` takes those whose image lies outside of the root."""
        faults = dict(batch.faults)
        image, object_id = (self._needed(batch, column, faults) for column in (self.image, self.object_id))
        ids, refs = _without_users(image)
        keys = self._keys(ids, looked, faults, batch.numbers, outside)
        splits = self._splits(batch, split, object_id, faults)
        lists = [batch.text_lists(column) for column in captions]
        for *_, wrong in lists:
            _add(faults, wrong)
        if looked == LOOKED_AT:  # the first rows of all
            for column, (texts, *_) in zip(captions, lists):
                check_no_written_lists(self.path, column, texts)
        extra = pa.nulls(len(image), pa.binary())
        if self.keep:
            values, wrong = batch.values(self.keep)
            _add(faults, wrong)
            extra = pa.array([pickle.dumps(fields) for fields in values], pa.binary())
        texts, kinds = _side_by_side(captions, [(found, counts) for found, counts, _ in lists])
        columns = [batch.numbers, splits, object_id, ids, keys, refs, texts, kinds, extra]
        table = pa.Table.from_arrays([pa.array(c) if isinstance(c, np.ndarray) else c for c in columns], schema=ROWS)
        if not faults:
            return table
        self.skipped += [f"row {batch.numbers[i]}: {faults[i]}" for i in sorted(faults)]
        kept = np.ones(len(table), bool)
        kept[list(faults)] = False
        return table.filter(pa.array(kept))

    def _needed(self, batch: Batch, column: str, faults: dict[int, str]) -> pa.Array:
        """Texts of a column that a row cannot do without."""
        texts, wrong = batch.texts(column)
        _add(faults, wrong)
        missing = np.flatnonzero(pc.equal(texts, "").to_numpy(zero_copy_only=False))
        _add(faults, dict.fromkeys(missing.tolist(), f"no {column}"))
        return texts

    def _keys(
        self, images: pa.Array, looked: int, faults: dict[int, str], numbers: Any, outside: list[tuple[int, str]]
    ) -> pa.Array:
        """What each image is known by, however it is spelled: its place, relative to the root where it lies below it."""
        web = pc.match_substring_regex(images, WEB).to_numpy(zero_copy_only=False)
        odd = pc.match_substring_regex(images, ODD_AT_URL if is_url(self.image_root) else ODD).to_numpy(zero_copy_only=False)
        odd = odd & ~web
        respelled = pc.match_substring_regex(images, RESPELLED).to_numpy(zero_copy_only=False) & ~web
        root = join(one_spelling(self.image_root), "")
        near = np.arange(len(images)) < looked
        checked: dict[str, SampleError | None] = {}
        others: dict[int, str] = {}
        for i in np.flatnonzero((odd | near | respelled) & ~web).tolist():
            name = images[i].as_py()
            if i in faults or not name:
                continue
            if name not in checked:
                checked[name] = self._refusal(name) if odd[i] or near[i] else None
            if (refusal := checked[name]) is not None:
                faults[i] = str(refusal)
                if isinstance(refusal, OutsideError):
                    outside.append((int(numbers[i]), faults[i]))
            elif respelled[i]:
                others[i] = one_spelling(locate(name, self.image_root)).removeprefix(root)
        if not others:
            return images
        mask = np.zeros(len(images), bool)
        mask[list(others)] = True
        return pc.replace_with_mask(images, pa.array(mask), pa.array(list(others.values()), images.type))

    def _columns(self, table: Table) -> tuple[list[str], str | None]:
        """Caption columns and split column after checking that all named columns exist."""
        captions = self.captions or table.caption_columns() or ["caption"]
        split = self.split or ("split" if "split" in table.names else None)
        options = {self.image: "--image", self.object_id: "--object-id", **dict.fromkeys(captions, "--captions")}
        options.update(dict.fromkeys([split] if split else [], "--split") | dict.fromkeys(self.keep, "--keep"))
        table.require(options)
        check_kept(self.keep, self.object_id)
        return captions, split

    def _refusal(self, image: str) -> SampleError | None:
        """Why an image may not be taken, None where it may."""
        try:
            self.locate(image, self.image_root)
        except SampleError as error:
            return error
        return None

    def _check_inside(self, outside: list[tuple[int, str]], rows: int) -> None:
        """Raise SourceError where most of some rows name images outside of the root."""
        refused = [(f"row {number}", why) for number, why in outside]
        if why := outside_most(self.path, self.image_root, refused, rows):
            raise SourceError(why)

    def _splits(self, batch: Batch, column: str | None, object_id: pa.Array, faults: dict[int, str]) -> pa.Array:
        """Split of each row: as the column says, or by the hash of the object."""
        if column is None:
            texts, name_of = object_id, lambda text: hash_split(text, self.fractions)
        else:
            texts, name_of = self._needed(batch, column, faults), common_split
        found = texts.dictionary_encode()
        names = [name_of(text) for text in found.dictionary.to_pylist()]
        wrong = [i for i, name in enumerate(names) if column is not None and not can_name_split(name)]
        for i in np.flatnonzero(np.isin(found.indices.to_numpy(zero_copy_only=False), wrong)).tolist():
            faults.setdefault(i, f"{names[found.indices[i].as_py()]!r:.80} (column {column!r}) cannot name a split")
        return pa.array(names, pa.string()).take(found.indices)

    def load(self, ref: str) -> bytes:
        """Bytes of an image file or URL. Raises OSError or SampleError, which leave the image out of the set."""
        place = self.locate(ref, self.image_root)
        return self.downloads.fetch(place) if is_web(place) else read_location(place)

    @property
    def at_once(self) -> int:
        """How many images may be fetched at a time."""
        return self.downloads.at_once

    def waits(self, ref: str) -> bool:
        """Whether an image is fetched."""
        return is_web(locate(ref, self.image_root))

    def share(self, processes: int, folder: str) -> TableSource:
        """The same source for one of so many processes."""
        shared = copy.copy(self)
        shared.downloads, shared.skipped = self.downloads.share(processes, folder), []
        return shared

    def write_extras(self, root: str) -> None:
        """Nothing to add."""


def _root_of(path: str) -> str:
    """The folder that a table lies in. Raises SourceError where its files lie in several, whose paths may mean either."""
    folders = {os.path.dirname(file) for file in table_files(path)}
    if len(folders) > 1:
        named = ", ".join(sorted(folders)[:2])
        raise SourceError(
            f"{path} is files of {len(folders)} folders ({named}), and their rows name images: give the folder that these names "
            "are relative to with --image-root."
        )
    return folders.pop()


def _without_users(images: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Ids of images, of URLs without user and password, and where these differ the whole of it, pickled."""
    ids = pc.replace_substring_regex(images, USER.pattern, r"\1")
    if ids.equals(images):
        return ids, pa.nulls(len(images), pa.binary())
    pairs = zip(ids.to_pylist(), images.to_pylist())
    return ids, pa.array([None if name == image else pickle.dumps(image) for name, image in pairs], pa.binary())


def _add(faults: dict[int, str], more: dict[int, str]) -> None:
    """Of several reasons against a row the first is told."""
    for position, why in more.items():
        faults.setdefault(position, why)


def _side_by_side(columns: list[str], found: list[tuple[pa.Array, Any]]) -> tuple[pa.Array, pa.Array]:
    """Captions of several columns by row, in the order of the columns, and the column of each; None for one column alone."""
    rows = [np.repeat(np.arange(len(counts)), counts) for _, counts in found]
    order = pa.array(np.argsort(np.concatenate(rows), kind="stable"))
    total = sum(counts for _, counts in found)
    texts = as_lists(pa.concat_arrays([texts.cast(pa.string()) for texts, _ in found]).take(order), total)
    if len(columns) == 1:
        return texts, pa.nulls(len(texts), TEXTS)
    kind = np.repeat(np.arange(len(columns)), [len(texts) for texts, _ in found])
    return texts, as_lists(pa.array(columns).take(pa.array(kind)).take(order), total)
