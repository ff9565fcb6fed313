"""Folders of random images."""

from __future__ import annotations

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
