"""Tars as others write them: by webdataset's own writer, in img2dataset's layout or in any other."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, form: str = "JPEG", side: int = 12) -> bytes:
    """A random image, encoded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def write_tar(path: Path, samples: Iterable[dict[str, Any]]) -> Path:
    """A tar of samples: `__key__`, and members by ending (bytes as they are, texts and json encoded by webdataset)."""
    import webdataset

    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def downloaded(number: int, **fields: Any) -> dict[str, Any]:
    """A sample as img2dataset writes it."""
    key, caption = f"{number:09d}", f"a random picture, the one of number {number}"
    told = {
        "url": f"https://example.org/{number}.jpg", "key": key, "status": "success", "error_message": None, "caption": caption,
        "width": 12, "height": 12, "exif": "{}",
    }  # fmt: skip
    return {"__key__": key, "jpg": picture(number), "txt": caption, "json": {**told, **fields}}


def write_downloads(folder: Path, tars: int, images: int, **fields: Any) -> list[Path]:
    """Tars of img2dataset's layout."""
    return [
        write_tar(folder / f"{tar:05d}.tar", (downloaded(tar * images + i, **fields) for i in range(images)))
        for tar in range(tars)
    ]
