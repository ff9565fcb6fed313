"""Folders of random images."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_images(root: Path, numbers: Iterable[int]) -> None:
    """Images of 300 x (20 + number) px named by their number, the odd ones in `deep/`."""
    (root / "deep").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / ("deep" if number % 2 else "") / f"{number:02d}.png")


def encoded(number: int) -> bytes:
    """PNG of 30 x 24 px, another for each number."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (24, 30, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()
