"""Tables with small random images: the quickest way to a shard set of known content."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.sources.table import TableSource


@pytest.fixture
def encode() -> Callable[..., bytes]:
    def make(seed: int, form: str = "PNG", mode: str = "RGB", side: int = 12) -> bytes:
        """A random image in a format and colour mode."""
        pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(out, form)
        return out.getvalue()

    return make


@pytest.fixture
def make_table(tmp_path: Path, encode: Callable[..., bytes]) -> Callable[..., Path]:
    def make(objects: int = 20, folder: str = "table") -> Path:
        """JSONL of `objects` objects with three images each, two captions an image; returns its path."""
        root = tmp_path / folder
        root.mkdir()
        rows = []
        for number in range(objects):
            for i in range(3):
                name = f"{number}.{i} é.png"
                (root / name).write_bytes(encode(number * 3 + i))
                captions = {"name": f"thing {number}", "detail": f"{i} of them"}
                rows.append({"image": name, "object_id": f"o.{number}/x", **captions, "colour": "red"})
        path = root / "table.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    return make


@pytest.fixture
def build_table(tmp_path: Path, make_table: Callable[..., Path]) -> Callable[..., Path]:
    def build(out: str = "set", table: Path | None = None, workers: int = 0, **options: object) -> Path:
        """Builds the table's set below tmp_path and returns its folder."""
        source = TableSource(str(table or make_table()), captions=["name", "detail"], keep=["colour"])
        chosen = {"min_shards": 2, "progress": False, **options}
        build_shards(source, str(tmp_path / out), BuildOptions(workers=workers, **chosen))
        return tmp_path / out

    return build
