"""Pixels that are decoded at once: many images in a small room, the largest alone, waiting that ends."""

from __future__ import annotations

import io
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from mmref.data import budget, decode, fit
from mmref.data.budget import PixelBudget
from mmref.data.colors import on_white, to_8_bit
from mmref.data.fit import Fit
from mmref.errors import DecodersBusyError, PixelLimitError


def png(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (side, side), (10, 20, 30, 40)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def room(monkeypatch) -> PixelBudget:
    """1,600 pixels."""
    small = PixelBudget(1600)
    monkeypatch.setattr(budget, "BUDGET", small)
    return small


def test_no_more_is_decoded_at_once_than_there_is_room_for(room, monkeypatch):
    most, resize = [], fit.resize_rgb

    def noted(rgb, *size):
        most.append(room.used)
        threading.Event().wait(0.01)
        return resize(rgb, *size)

    monkeypatch.setattr(fit, "resize_rgb", noted)
    images = [png(side) for side in (10, 20, 30, 100, 1, 25) * 4]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda data: Fit(8, 8).decode(data), images))
    assert {one.shape for one in found} == {(8, 8, 3)} and len(most) == len(images)
    assert max(most) <= 1600 and room.used == 0, "100 x 100 are more than all of it, and are decoded all the same"


def test_waiting_for_room_ends(room):
    busy = pytest.raises(DecodersBusyError, match="still being decoded after")
    with decode.decoded(png(30)), busy, decode.decoded(png(30), patience_s=0.01):
        pytest.fail("there was no room")
    with decode.decoded(png(100)), decode.decoded(png(20), patience_s=0):
        pass  # the largest leaves some to the small
    assert room.used == 0


def test_room_is_left_whatever_happens(room):
    for data in (png(30)[:60], b"", b"no image", png(30)[:40]):
        with pytest.raises(decode.SampleError):
            decode.decode_rgb(data)
    with pytest.raises(PixelLimitError):
        decode.decode_rgb(png(30), max_pixels=899)
    with pytest.raises(ZeroDivisionError), decode.decoded(png(30)):
        raise ZeroDivisionError
    assert room.used == 0


@pytest.mark.parametrize("change, values, bytes_each", [
    (on_white, np.full((2000, 1000, 4), 77, np.uint8), 3), (to_8_bit, np.full((2000, 1000, 4), 777, np.uint16), 4),
])  # fmt: skip
def test_what_is_computed_with_is_small_beside_the_picture(change, values, bytes_each):
    tracemalloc.start()
    try:
        change(values)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.6 * bytes_each * 2_000_000
