"""Which columns of a table hold images, captions and objects: those that are named, or those that are plainly meant.

A column of images holds bytes, or mappings with `bytes` and `path`, as `datasets` of Hugging Face writes them.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmref.errors import SourceError
from mmref.storage.cells import Row, is_list

CAPTION_NAMES = ("caption", "captions", "text", "texts", "sentence", "sentences", "description", "descriptions")
WRITTEN_LIST = r"""(?s)^\[\s*['"].*['"]\s*\]$"""  # as pandas writes a list into a CSV


@dataclass(frozen=True)
class ImageColumns:
    """Names of columns. captions [] and object_id None: there are none; keep None: all others of single values, of which an
    infinite number is kept as missing and counted in `infinite`."""

    image: str
    captions: list[str] = field(default_factory=list)
    object_id: str | None = None
    split: str | None = None
    keep: list[str] | None = field(default_factory=list)
    item_id: str | None = None  # None: the image's own name, or its row's
    infinite: Counter[str] = field(default_factory=Counter)

    def kept(self, schema: pa.Schema) -> list[str]:
        """Columns to keep beside those that have a meaning."""
        if self.keep is not None:
            return self.keep
        single = [name for name, kind in kinds_of(schema).items() if kind in ("text", "label", "value")]
        return [name for name in single if name not in (self.image, *self.captions, self.object_id, self.split, self.item_id)]

    def left(self, schema: pa.Schema) -> dict[str, str]:
        """Columns that are not read, where all that can be are kept, and why."""
        rest = set(schema.names) - {self.image, *self.others(schema)} if self.keep is None else set()
        return {name: "no single values" for name in schema.names if name in rest}

    def others(self, schema: pa.Schema) -> list[str]:
        """Columns to read beside the images, of a schema that has those which are named."""
        named = [*self.captions, self.object_id, self.split, self.item_id, *self.kept(schema)]
        return [name for name in dict.fromkeys(named) if name is not None and name != self.image]

    def value(self, row: Row, column: str) -> Any:
        """A cell that is kept. Raises SampleError."""
        cell = row.cell(column)
        if self.keep is None and isinstance(cell, float) and math.isinf(cell):
            self.infinite[column] += 1
            return None
        return row.value(column)


def kinds_of(schema: pa.Schema) -> dict[str, str]:
    """What each column holds: image, images, bytes, text, texts, label (a number with a name), value or other."""
    labels = labels_of(schema)
    return {field.name: "label" if field.name in labels else _kind(field.type) for field in schema}


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return "image" if "bytes" in names and _is_binary(kind.field("bytes").type) else "other"
    if _is_binary(kind):
        return "bytes"
    if pa.types.is_dictionary(kind):
        return _kind(kind.value_type)
    if _is_text(kind):
        return "text"
    if is_list(kind):
        return {"text": "texts", "image": "images", "bytes": "images"}.get(_kind(kind.value_type), "other")
    return "other" if pa.types.is_nested(kind) else "value"


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def labels_of(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of the numbers of each column that `datasets` calls a ClassLabel."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: told["names"] for name, told in features.items() if told.get("_type") == "ClassLabel" and told["names"]}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def choose_image(where: str, schema: pa.Schema, named: str | None, option: str = "--image") -> str:
    """The column of images: the one that is named, or the only one. Raises SourceError."""
    kinds = kinds_of(schema)
    if named is not None:
        _require(where, kinds, named, option)
        if kinds[named] not in ("image", "bytes"):
            held = "lists of images, and a row is one image" if kinds[named] == "images" else "no images"
            raise SourceError(f"{where}: the column {named!r} holds {held} ({schema.field(named).type}). {_columns(schema)}")
        return named
    found = [name for name, kind in kinds.items() if kind == "image"]
    found = found or [name for name, kind in kinds.items() if kind == "bytes"]
    if len(found) != 1:
        what = f"{len(found)} columns of images, {', '.join(found)}: name one" if found else "no column of images: name it"
        raise SourceError(f"{where} has {what} with {option}. {_columns(schema)}")
    return found[0]


def choose_captions(where: str, schema: pa.Schema, named: Sequence[str] | None) -> list[str]:
    """The columns of captions: those that are named, or the one that is plainly meant. Raises SourceError, which lists them."""
    kinds = kinds_of(schema)
    for name in named or ():
        _require(where, kinds, name, "--captions")
        if kinds[name] not in ("text", "texts", "label"):
            raise SourceError(
                f"{where}: the column {name!r} holds neither texts nor lists of texts ({schema.field(name).type}). "
                f"{_columns(schema)}"
            )
    if named:
        return list(named)
    texts = [name for name, kind in kinds.items() if kind in ("text", "texts")]
    found = [name for name in texts if name.lower() in CAPTION_NAMES]
    found = found if len(found) == 1 or len(texts) > 1 else texts
    if len(found) != 1:
        many = found or texts
        what = f"{len(many)} columns that may be captions, {', '.join(many)}" if many else "no column of texts"
        raise SourceError(f"{where} has {what}: name those that are with --captions. {_columns(schema)}")
    return found


def captions_if_plain(schema: pa.Schema) -> list[str]:
    """The column of captions that is plainly meant, [] where there is none or it is not clear which."""
    try:
        return choose_captions("", schema, None)
    except SourceError:
        return []


def _require(where: str, kinds: Mapping[str, str], name: str, option: str) -> None:
    if name not in kinds:
        raise SourceError(f"{where} has no column {name!r}, only {', '.join(kinds)}. Name yours with {option}.")


def require_columns(where: str, schema: pa.Schema, options: Mapping[str, str]) -> None:
    """Raise SourceError for the first column that is not there. options: column -> what names it on the command line."""
    kinds = kinds_of(schema)
    for name, option in options.items():
        _require(where, kinds, name, option)


def _columns(schema: pa.Schema) -> str:
    kinds = kinds_of(schema)
    words = {"image": "images", "images": "lists of images", "texts": "lists of texts", "bytes": "bytes", "label": "labels"}
    return f"Its columns: {', '.join(f'{f.name} ({words.get(kinds[f.name], str(f.type))})' for f in schema)}."


def check_no_written_lists(place: str, column: str, captions: pa.Array) -> None:
    """Raise SourceError where every caption of a table's column is a list that was written as a text."""
    if len(captions) and pc.all(pc.match_substring_regex(captions, WRITTEN_LIST)).as_py():
        raise SourceError(
            f"{place}: the captions of column {column!r} are lists that were written as texts, the first "
            f"{captions[0].as_py()!r:.80}. A CSV holds no lists: save the table as Parquet or JSON lines (with pandas, "
            "`to_json(path, orient='records', lines=True)`), or write a row for each caption."
        )
