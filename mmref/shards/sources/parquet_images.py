"""`mmref shards build table` of Parquet files whose rows hold the images themselves; a file, a glob, or a folder of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from mmref.errors import SourceError
from mmref.shards.samples import DEFAULT_FRACTIONS, SPLIT_NAMES, Source, check_kept
from mmref.shards.sources.image_columns import (
    ImageColumns,
    captions_if_plain,
    choose_captions,
    choose_image,
    kinds_of,
    require_columns,
)
from mmref.shards.sources.image_rows import Locate, ParquetPart, first_value, list_rows
from mmref.shards.sources.listed import ListedImage, ListedSource, split_name
from mmref.shards.sources.table import TableSource
from mmref.storage.fetch import locate, locate_inside
from mmref.storage.files import folder_of
from mmref.storage.locations import absolute, folder_name
from mmref.storage.tables import PARQUET, check_same_columns, parquet_files, told_by_folders

SPLIT = re.compile(rf"(?:^|[/._-])(train|val|test|{'|'.join(SPLIT_NAMES)})(?=[/._-]|$)")  # in a file's name
OPTIONS = (  # of `table` that mean something where rows hold their images, so that nothing is fetched
    "image", "object_id", "captions", "split", "image_root", "fractions", "keep", "licence", "min_images", "allow_outside",
)  # fmt: skip
DEFAULT_IMAGE, DEFAULT_OBJECT = "image", "object_id"


def table_source(path: str, **options: Any) -> Source:
    """What reads a table: rows that name images, or that hold them. Raises SourceError."""
    files = parquet_files(path)
    if files and embedded_column(files[0], options.get("image", DEFAULT_IMAGE)):
        return ParquetImages(path, **{name: value for name, value in options.items() if name in OPTIONS})
    return TableSource(path, **options)


def embedded_column(file: str, named: str) -> str | None:
    """The column of a Parquet file that holds images, None where there is none such: `named`, or the only one of mappings with
    bytes where the name is the default one. Bytes that are a text are a path. Raises SourceError."""
    part = ParquetPart(file, "")
    kinds = kinds_of(part.schema)
    found = [name for name, kind in kinds.items() if kind == "image"]
    if named not in kinds and named == DEFAULT_IMAGE and len(found) == 1:
        return found[0]
    if kinds.get(named) == "images":
        choose_image(file, part.schema, named)  # which says what is wrong with it
    if kinds.get(named) == "bytes" and not _is_text(first_value(part, named)):
        return named
    return named if kinds.get(named) == "image" else None


def _is_text(value: bytes | None) -> bool:
    try:
        return value is not None and bool(value.decode())
    except UnicodeDecodeError:
        return False


def open_parts(
    place: str,
    files: list[str],
    where: Locate,
    splits_by_name: bool = False,
    scratch: str | None = None,
    image_root: str | None = None,
) -> list[ParquetPart]:
    """The files of one kind of rows that a place names, whose ids begin with their paths below it. Raises SourceError where their
    columns differ.

    Args:
        scratch: a folder for images that could only be read slowly one by one.
        image_root: what the paths of images are relative to that are not inside; else the folder of their own file.
    """
    parts: list[ParquetPart] = []
    below = f"{folder.rstrip('/')}/" if (folder := folder_of(place, PARQUET)) else ""
    for file, columns in zip(files, told_by_folders(place, files)):
        name = file.removeprefix(below).removesuffix(".parquet")
        told = SPLIT.search(name.lower()) if splits_by_name else None
        split, pack = split_name(told[1]) if told else None, pack_name(scratch, f"{len(parts)}")
        parts.append(ParquetPart(file, name, split, image_root, where, pack, columns))
    check_same_columns({part.path: part.schema.names for part in parts})
    return parts


def pack_name(scratch: str | None, name: str) -> str:
    """The file in a scratch folder for the images of a part, "" where there is no such folder."""
    return os.path.join(scratch, f"{name}.bin") if scratch else ""


class ParquetImages(ListedSource):
    """A row an image, or one more caption of it. The options are those of `TableSource`.

    Args:
        strict: objects and captions are needed. Else they are taken where they are, and all columns of single values are kept.
        item_id: column with the images' ids.
    """

    def __init__(
        self,
        path: str,
        image: str = DEFAULT_IMAGE,
        object_id: str = DEFAULT_OBJECT,
        captions: list[str] | None = None,
        split: str | None = None,
        image_root: str | None = None,
        fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
        keep: Iterable[str] = (),
        licence: str = "not stated",
        min_images: int = 1,
        allow_outside: bool = False,
        strict: bool = True,
        item_id: str | None = None,
    ) -> None:
        super().__init__("table", folder_name(path), licence, min_images, fractions)
        self.path, self.image, self.object_id, self.captions, self.split = path, image, object_id, captions, split
        self.image_root = absolute(image_root) if image_root is not None else None
        self.scratch: str | None = None  # a folder that whoever builds a set gives
        self.keep, self.allow_outside, self.strict, self.item_id = list(keep), allow_outside, strict, item_id

    def images(self) -> Iterable[ListedImage]:
        """Rows in order. Raises SourceError: a column is missing, a file damaged, or files have other columns."""
        files = parquet_files(self.path)
        where = locate if self.allow_outside else locate_inside
        parts = open_parts(self.path, files, where, not self.strict, self.scratch, self.image_root)
        image = embedded_column(files[0], self.image) or choose_image(self.path, parts[0].schema, self.image)
        columns = self._strict(image, parts[0].schema) if self.strict else self._lenient(image, parts[0].schema)
        return list_rows(parts, columns, self, self.strict)

    def _strict(self, image: str, schema: pa.Schema) -> ImageColumns:
        split = self.split or ("split" if "split" in schema.names else None)
        if self.object_id not in schema.names:
            raise SourceError(
                f"{self.path} has no column {self.object_id!r}, only {', '.join(schema.names)}. Name yours with --object-id. "
                "Where no column says which object an image shows, `mmref shards build dataset` takes each image for one."
            )
        require_columns(
            self.path, schema, dict.fromkeys([split] if split else [], "--split") | dict.fromkeys(self.keep, "--keep")
        )
        check_kept(self.keep, self.object_id)
        return ImageColumns(image, choose_captions(self.path, schema, self.captions), self.object_id, split, self.keep)

    def _lenient(self, image: str, schema: pa.Schema) -> ImageColumns:
        named = {self.object_id: "--object-column"} if self.object_id != DEFAULT_OBJECT else {}
        require_columns(self.path, schema, named | ({self.item_id: "--id-column"} if self.item_id is not None else {}))
        object_id = self.object_id if self.object_id in schema.names else None
        found = ImageColumns(image, captions_if_plain(schema), object_id, None, None, self.item_id, self.infinite)
        self.columns_left = found.left(schema)
        return found
