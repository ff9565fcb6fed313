"""Your own data: a CSV, TSV, JSONL or Parquet table with an image, an object id and captions in every row.

Rows with the same image are one image with more captions; rows with the same object id are one object. The image column
holds a path below `image_root` or an http(s) URL; with `allow_outside` any path, and whatever fsspec opens (s3://, gs://, ...).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from mmref.errors import OutsideError, SampleError, SourceError
from mmref.shards.samples import DEFAULT_FRACTIONS, SourceImage, SourceObject, hash_split
from mmref.storage.fetch import locate, locate_inside, outside_most, read_location
from mmref.storage.locations import absolute
from mmref.storage.tables import Row, Table, read_table

RESERVED = ("object_id", "image_id", "captions", "caption_kinds")  # fields that a set writes itself
SPLIT_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}


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
    ) -> None:
        """image, object_id, captions, split: names of columns. Captions None: `caption`, or the list column `captions`;
        split None: `split` if there is one, else a fixed hash of the object id with `fractions`. keep: further columns
        to carry in the sample's json. min_images: objects with fewer usable images are left out. allow_outside: images may lie
        outside of image_root."""
        self.path, self.image, self.object_id, self.captions, self.split = path, image, object_id, captions, split
        root = os.path.dirname(path) if image_root is None else image_root
        self.image_root = absolute(root)  # workers may run in another directory
        self.locate = locate if allow_outside else locate_inside
        self.fractions, self.keep, self.licence, self.min_images = dict(fractions), list(keep), licence, min_images
        self.origin = os.path.basename(path)  # the full path says more of your machine than of the data
        self.skipped: list[str] = []

    def objects(self) -> Iterable[SourceObject]:
        """Objects in the order of the table. A row that lacks its image, object or split, or has a cell of another type, is
        listed and left out, and so is one whose image lies where it may not.

        Raises SourceError: no such file, unknown ending, missing column, object in two splits, image of two objects, most images
        outside of the root.
        """
        table = read_table(self.path)
        caption_columns, split_column = self._columns(table)
        needed = [self.image, self.object_id, *caption_columns, *self.keep, *([split_column] if split_column else [])]
        images: dict[str, SourceImage] = {}  # by their place, as `owner`
        objects: dict[str, SourceObject] = {}
        owner: dict[str, str] = {}
        outside: list[tuple[str, str]] = []
        count = 0
        for row in table.rows(needed):
            count += 1
            try:
                image, object_id = (row.needed(column) for column in (self.image, self.object_id))
                if image not in images:
                    self.locate(image, self.image_root)
                split = self._split_of(row, split_column, object_id)
                texts = {column: row.texts(column) for column in caption_columns}
                extra = {name: row.value(name) for name in self.keep}
            except SampleError as error:
                self.skipped.append(f"row {row.number}: {error}")
                if isinstance(error, OutsideError):
                    outside.append((f"row {row.number}", str(error)))
                continue
            item = objects.setdefault(object_id, SourceObject(split, object_id, []))
            if item.split != split:
                raise SourceError(
                    f"{self.path}, row {row.number}: object {object_id!r} is in {item.split!r} and in {split!r}. "
                    f"Splits are by object: give all of its rows one {split_column}."
                )
            place = locate(image, self.image_root)
            if owner.setdefault(place, object_id) != object_id:
                raise SourceError(
                    f"{self.path}, row {row.number}: image {image!r} belongs to the objects {owner[place]!r} and "
                    f"{object_id!r}. An image shows one object: copy the file under another name if that is meant."
                )
            if place not in images:
                images[place] = SourceImage(image, image, [], [] if len(caption_columns) > 1 else None, extra)
                item.images.append(images[place])
            for column, found in texts.items():
                images[place].captions.extend(found)
                if (kinds := images[place].caption_kinds) is not None:
                    kinds.extend([column] * len(found))
        if why := outside_most(self.path, self.image_root, outside, count):
            raise SourceError(why)
        return list(objects.values())

    def _columns(self, table: Table) -> tuple[list[str], str | None]:
        """Caption columns and split column after checking that all named columns exist."""
        captions = self.captions or table.caption_columns() or ["caption"]
        split = self.split or ("split" if "split" in table.names else None)
        options = {self.image: "--image", self.object_id: "--object-id", **dict.fromkeys(captions, "--captions")}
        options.update(dict.fromkeys([split] if split else [], "--split") | dict.fromkeys(self.keep, "--keep"))
        table.require(options)
        if lost := [name for name in self.keep if name in RESERVED and name != self.object_id]:
            raise SourceError(
                f"--keep {lost[0]}: a sample has a field of that name already, of the set's own: rename the column to keep it."
            )
        return captions, split

    def _split_of(self, row: Row, column: str | None, object_id: str) -> str:
        if column is None:
            return hash_split(object_id, self.fractions)
        name = row.needed(column).lower()
        name = SPLIT_NAMES.get(name, name)
        if not name.replace("_", "").replace("-", "").isalnum():  # it becomes a folder
            raise SourceError(f"{self.path}, row {row.number}: {name!r} (column {column!r}) cannot name a split.")
        return name

    def load(self, ref: str) -> bytes:
        """Bytes of an image file or URL. Raises OSError or SampleError, which leave the image out of the set."""
        return read_location(self.locate(ref, self.image_root))

    def write_extras(self, root: str) -> None:
        """Nothing to add."""
