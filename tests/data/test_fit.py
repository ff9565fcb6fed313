"""Images of any shape in the size of a model."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from PIL import Image

from mmref.data.fit import LONG, Fit


def plainly(rgb, edge, height, width):
    """The shorter side to `edge` by Pillow, then the middle."""
    h, w = rgb.shape[:2]
    sides = (edge, int(edge * max(h, w) / min(h, w)))
    resized = np.asarray(Image.fromarray(rgb).resize(sides if h > w else sides[::-1], Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - height) // 2, (resized.shape[1] - width) // 2
    return resized[top : top + height, left : left + width]


@pytest.mark.parametrize("height, width", [(20, 20 * (LONG + 3)), (13 * (LONG + 1) + 5, 13), (1, 700), (20, 20 * LONG - 7)])
def test_the_middle_of_a_long_image_is_that_of_the_whole(height, width):
    # Smooth, as photographs are: where a filter overshoots, the order in which Pillow takes the two sides shows.
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([128 + 90 * np.sin(x / 9 + c) * np.cos(y / 7) for c in range(3)], -1).astype(np.uint8)
    found = Fit(24, 24, "crop", "bicubic", 32)(rgb)
    expected = plainly(rgb, 32, 24, 24)
    assert found.shape == (24, 24, 3)
    assert found.std() > 5 and np.abs(found.astype(int) - expected).max() <= 1


def test_a_strip_of_one_pixel_takes_no_memory():
    strip = np.zeros((1, 1_000_000, 3), np.uint8)
    tracemalloc.start()
    assert Fit(224, 224, "crop", "bicubic", 224)(strip).shape == (224, 224, 3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # resized as a whole it has 150 GB
