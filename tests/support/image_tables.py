"""Tables whose rows hold images, as people have them: small, of known content."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from support.images import encoded

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT = {"dtype": "string", "_type": "Value"}
FEATURES = {
    "image": {"_type": "Image"}, "text": TEXT, "more": {"feature": TEXT, "_type": "List"},
    "label": {"_type": "ClassLabel", "names": ["cat", "dog", "owl"]}, "weight": {"dtype": "float64", "_type": "Value"},
}  # fmt: skip


def rows_of(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows with an image, two captions and one of three labels."""
    return [
        {
            "image": {"bytes": encoded(first + i), "path": f"{first + i}.png"},
            "text": f"thing {first + i}",
            "more": [f"no {first + i}", "one of many"],
            "label": (first + i) // 4 % 3,
            "weight": float(first + i),
        }
        for i in range(count)
    ]


def write_table(path: Path, rows: list[dict[str, Any]], features: bool = True, group: int = 5) -> Path:
    """A Parquet file, with the description that `datasets` adds."""
    kind = IMAGE if any(isinstance(row["image"], dict) for row in rows) else pa.binary()
    others = pa.Table.from_pylist([{k: v for k, v in row.items() if k != "image"} for row in rows])
    table = others.add_column(0, "image", pa.array([row["image"] for row in rows], kind))
    if features:
        told = {name: FEATURES.get(name, TEXT) for name in table.column_names}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": told}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path
