"""Your own data: a CSV, TSV, JSONL or Parquet table with an image, an object id and captions in every row.

Rows with the same image are one image with more captions; rows with the same object id are one object. The image column
holds a path (absolute, or relative to `image_root`) or a URL: http(s), or whatever fsspec opens (s3://, gs://, ...).
"""

from __future__ import annotations

import csv
import difflib
import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_shards.samples import DEFAULT_FRACTIONS, SourceImage, SourceObject, hash_split
from mmref.errors import SourceError
from mmref.locations import absolute, is_url, join, read_bytes

SPLIT_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
TIMEOUT_S = 30  # of one download
ATTEMPTS = 3
ROW_NUMBER = "\0row"  # a name that no column has


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
    ) -> None:
        """image, object_id, captions, split: names of columns. Captions None: `caption`, or the list column `captions`;
        split None: `split` if there is one, else a fixed hash of the object id with `fractions`. keep: further columns
        to carry in the sample's json. min_images: objects with fewer usable images are left out."""
        self.path, self.image, self.object_id, self.captions, self.split = path, image, object_id, captions, split
        root = os.path.dirname(path) if image_root is None else image_root
        self.image_root = absolute(root)  # workers may run in another directory
        self.fractions, self.keep, self.licence, self.min_images = dict(fractions), list(keep), licence, min_images
        self.origin = os.path.basename(path)  # the full path says more of your machine than of the data
        self.skipped: list[str] = []

    def objects(self) -> Iterable[SourceObject]:
        """Objects in the order of the table. Rows without an image or object id are listed and left out.

        Raises SourceError: no such file, unknown ending, missing column, object in two splits, image of two objects.
        """
        names, rows = read_table(self.path)
        caption_columns, split_column = self._columns(names)
        images: dict[str, SourceImage] = {}
        objects: dict[str, SourceObject] = {}
        owner: dict[str, str] = {}
        for row in rows:
            image, object_id = _text(row.get(self.image)), _text(row.get(self.object_id))
            if not image or not object_id:
                self.skipped.append(f"row {row[ROW_NUMBER]}: no {self.object_id if image else self.image}")
                continue
            split = self._split_of(row, split_column, object_id)
            item = objects.setdefault(object_id, SourceObject(split, object_id, []))
            if item.split != split:
                raise SourceError(
                    f"{self.path}, row {row[ROW_NUMBER]}: object {object_id!r} is in {item.split!r} and in {split!r}. "
                    f"Splits are by object: give all of its rows one {split_column}."
                )
            if owner.setdefault(image, object_id) != object_id:
                raise SourceError(
                    f"{self.path}, row {row[ROW_NUMBER]}: image {image!r} belongs to the objects {owner[image]!r} and "
                    f"{object_id!r}. An image shows one object: copy the file under another name if that is meant."
                )
            if image not in images:
                kinds: list[str] | None = [] if len(caption_columns) > 1 else None
                extra = {name: row.get(name) for name in self.keep}
                images[image] = SourceImage(image, image, [], kinds, extra)
                item.images.append(images[image])
            for column in caption_columns:
                texts = _texts(row.get(column))
                images[image].captions.extend(texts)
                if (of_image := images[image].caption_kinds) is not None:
                    of_image.extend([column] * len(texts))
        return list(objects.values())

    def _columns(self, names: list[str]) -> tuple[list[str], str | None]:
        """Caption columns and split column after checking that all named columns exist."""
        captions = self.captions or (["captions"] if "captions" in names and "caption" not in names else ["caption"])
        split = self.split or ("split" if "split" in names else None)
        options = {self.image: "--image", self.object_id: "--object-id", **dict.fromkeys(captions, "--captions")}
        options.update(dict.fromkeys([split] if split else [], "--split") | dict.fromkeys(self.keep, "--keep"))
        for name, option in options.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, 1, 0.5)
                hint = f"Did you mean {near[0]!r}? " if near else ""
                raise SourceError(
                    f"{self.path} has no column {name!r}. {hint}It has: {', '.join(names)}. Name yours with {option}."
                )
        return captions, split

    def _split_of(self, row: dict[str, Any], column: str | None, object_id: str) -> str:
        if column is None:
            return hash_split(object_id, self.fractions)
        name = _text(row.get(column)).lower()
        name = SPLIT_NAMES.get(name, name)
        if not name.replace("_", "").replace("-", "").isalnum():  # it becomes a folder
            raise SourceError(f"{self.path}, row {row[ROW_NUMBER]}: {name!r} (column {column!r}) cannot name a split.")
        return name

    def load(self, ref: str) -> bytes:
        """Bytes of an image file or URL. Raises OSError, which leaves the image out of the set."""
        return read_location(locate(ref, self.image_root))

    def write_extras(self, root: str) -> None:
        """Nothing to add."""


def locate(ref: str, root: str) -> str:
    """Path or URL of an image cell: absolute, or relative to `root`."""
    return ref if is_url(ref) or os.path.isabs(ref) else join(root, ref)


def read_location(path: str) -> bytes:
    """Bytes of a file, an http(s) URL, or whatever fsspec opens. Raises OSError."""
    if path.startswith(("http://", "https://")):
        return _download(path)
    return read_bytes(path)


def _download(url: str) -> bytes:
    """Body of an http(s) URL; network trouble and server errors are tried again. Raises OSError."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS:
                raise
        except (http.client.HTTPException, ValueError) as error:  # cut off in the middle, or no URL at all
            if attempt == ATTEMPTS:
                raise OSError(f"{url} cannot be fetched: {error}") from error
        except OSError:
            if attempt == ATTEMPTS:
                raise
    raise OSError(f"{url} cannot be fetched")


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _texts(value: Any) -> list[str]:
    """Captions of a cell: a text or a list of texts."""
    return [_text(v) for v in value if _text(v)] if isinstance(value, list) else [_text(value)] if _text(value) else []


def read_table(path: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    """Column names and rows; every row also holds its number under ROW_NUMBER. CSV cells stay text: id `007` is not 7.

    Raises SourceError when the file is missing, broken or of another kind.
    """
    readers = {".csv": _csv, ".tsv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    ending = os.path.splitext(path)[1].lower()
    if ending not in readers:
        raise SourceError(f"{path}: the ending says what a table is; expected one of {', '.join(readers)}.")
    try:
        names, rows = readers[ending](path)
    except (OSError, UnicodeError) as error:
        raise _unreadable(path, error) from error

    def named() -> Iterator[dict[str, Any]]:
        try:
            yield from rows
        except (OSError, UnicodeError) as error:
            raise _unreadable(path, error) from error

    return names, named()


def _unreadable(path: str, error: OSError | UnicodeError) -> SourceError:
    if isinstance(error, UnicodeError):
        return SourceError(f"{path} is not UTF-8: {error}. Save it as UTF-8 (in a spreadsheet: `CSV UTF-8`).")
    return SourceError(f"{path} cannot be read: {error}.")


def _open_text(path: str) -> Any:
    if "://" in path:
        import fsspec

        return fsspec.open(path, "rt", encoding="utf-8-sig", newline="").open()
    return open(path, encoding="utf-8-sig", newline="")  # spreadsheets write a byte order mark


def _csv(path: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    delimiter = "\t" if path.lower().endswith(".tsv") else ","
    with _open_text(path) as file:
        names = csv.DictReader(file, delimiter=delimiter).fieldnames
    if not names:
        raise SourceError(f"{path} is empty: the first line must name the columns.")

    def rows() -> Iterator[dict[str, Any]]:
        with _open_text(path) as file:
            for number, row in enumerate(csv.DictReader(file, delimiter=delimiter), 2):  # row 1 names the columns
                yield {**row, ROW_NUMBER: number}

    return list(names), rows()


def _jsonl(path: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    found = []
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise SourceError(f"{path}, line {number} is not JSON: {error}.") from error
            if not isinstance(row, dict):
                raise SourceError(f"{path}, line {number}: expected an object {{...}}, found {type(row).__name__}.")
            found.append({**row, ROW_NUMBER: number})
    names = dict.fromkeys(name for row in found for name in row if name != ROW_NUMBER)
    return list(names), iter(found)


def _parquet(path: str) -> tuple[list[str], Iterator[dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path) if "://" not in path else pq.ParquetFile(_open_binary(path))
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path} is not a Parquet file: {error}.") from error

    def rows() -> Iterator[dict[str, Any]]:
        number = 0
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield {**row, ROW_NUMBER: number}

    return file.schema_arrow.names, rows()


def _open_binary(path: str) -> Any:
    import fsspec

    return fsspec.open(path, "rb").open()
