"""Lines of JSON that pyarrow reads as Python's `json` does: an object a line, and of each column texts, whole numbers or lists
of texts alone. Of anything else pyarrow changes what a cell says (1 beside 2.5 becomes 1.0) or names no line.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.json

TEXTS = pa.list_(pa.string())


def count_lines(block: bytes) -> int:
    """Lines of a text, the last of which may lack its end."""
    ends = block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
    return ends + (len(block) > 0 and block[-1:] not in (b"\n", b"\r"))


def json_kinds(block: bytes) -> pa.Schema | None:
    """Names of the columns and what their cells are, as the first lines of a table say; None where they are not plain."""
    try:
        found = pyarrow.json.read_json(pa.py_buffer(block), _options(block)).schema
    except pa.ArrowInvalid:
        return None
    # Texts that look like times are texts, and so is what has said nothing yet.
    unsure = [pa.types.is_timestamp(field.type) or pa.types.is_null(field.type) for field in found]
    return pa.schema([field.with_type(pa.string()) if text else field for field, text in zip(found, unsure)])


def holds_no_other(block: bytes, kinds: pa.Schema) -> bool:
    """Whether the lines of a block have no other columns than the known ones."""
    return _read(block, pyarrow.json.ParseOptions(explicit_schema=kinds, unexpected_field_behavior="error")) is not None


def plain_columns(block: bytes, kinds: pa.Schema, columns: Sequence[str]) -> dict[str, pa.Array] | None:
    """Cells of columns, (lines,); None where a line is not plain."""
    fields = [pa.field(name, kinds.field(name).type if name in kinds.names else pa.string()) for name in columns]
    if any(field.type not in (pa.string(), pa.int64(), TEXTS) for field in fields):
        return None
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
    table = _read(block, options)
    return None if table is None else {name: table.column(name).combine_chunks() for name in columns}


def _read(block: bytes, options: pyarrow.json.ParseOptions) -> pa.Table | None:
    lines = count_lines(block)
    text = block.replace(b"\r\n", b"\n") if b"\r" in block else block
    # pyarrow also takes two objects in a line, or one in several.
    if b"\r" in text or not text.startswith(b"{") or text.count(b"}\n{") != lines - 1 or text.rstrip(b"\n")[-1:] != b"}":
        return None
    try:
        table = pyarrow.json.read_json(pa.py_buffer(text), _options(text), options)
    except pa.ArrowInvalid:
        return None
    return table if len(table) == lines else None


def _options(block: bytes) -> pyarrow.json.ReadOptions:
    return pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1)
