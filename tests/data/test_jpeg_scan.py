"""JPEGs that lost a part of their picture are told from sound ones, whatever program wrote these and whatever they show."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mmref.data.decode import decode_rgb
from mmref.data.jpeg_scan import lost_pixels

SIZE = (400, 300)


def photograph(width: int = SIZE[0], height: int = SIZE[1]) -> np.ndarray:
    """Waves with some noise."""
    down, across = np.mgrid[:height, :width]
    waves = np.dstack([127 + 90 * np.sin(across / 40 + down / 70), 127 + 80 * np.cos(down / 30), across * 250 / width])
    return (waves + np.random.default_rng(0).normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, mode: str = "RGB", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 5] + b"\xff\xd9"


def removed(data: bytes) -> bytes:
    return data[: len(data) * 3 // 10] + data[len(data) * 6 // 10 :]


def zeroed(data: bytes) -> bytes:
    begin, end = len(data) * 3 // 10, len(data) * 6 // 10
    return data[:begin] + bytes(end - begin) + data[end:]


def never_filled(data: bytes) -> bytes:
    """As what allocates a file first leaves one that did not come to its end."""
    return data[: len(data) // 2] + bytes(len(data) - len(data) // 2)


@pytest.mark.parametrize("damage", [cut, removed, zeroed, never_filled])
@pytest.mark.parametrize("options", [{}, {"quality": 95, "subsampling": 0}, {"mode": "L"}, {"restart_marker_rows": 1}])
def test_a_part_that_is_missing_is_noticed(damage: Callable[[bytes], bytes], options: dict[str, Any]) -> None:
    data = encoded(photograph(), **options)
    assert lost_pixels(data) == "" and "missing" in lost_pixels(damage(data))


@pytest.mark.parametrize("damage", [cut, removed])
def test_tables_of_its_own(damage: Callable[[bytes], bytes]) -> None:
    data = encoded(photograph(), optimize=True)
    assert lost_pixels(data) == "" and lost_pixels(damage(data)) == "the picture ends early: its lower part is missing"


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_blocks": 3},
                                     {"progressive": True}])  # fmt: skip
def test_sound_files_stay(mode: str, options: dict[str, Any]) -> None:
    """Gray and white ones too, whose codes are mostly zeros or very few, and all sizes."""
    for width, height in ((1, 1), (8, 8), (17, 33), (64, 1), (1, 300), (123, 57)):
        for pixels in (photograph(width, height), *(np.full((height, width, 3), gray, np.uint8) for gray in (0, 128, 255))):
            for quality in (5, 75, 100):
                assert lost_pixels(encoded(pixels, mode, quality=quality, **options)) == "", (width, height, quality)
    for gray in (0, 128, 255):
        assert lost_pixels(encoded(np.full((1500, 2000, 3), gray, np.uint8), mode, **options)) == ""


def test_sound_files_of_other_programs() -> None:
    for interval in (0, 1, 5):
        _, data = cv2.imencode(".jpg", photograph(), [cv2.IMWRITE_JPEG_RST_INTERVAL, interval])
        assert lost_pixels(data.tobytes()) == ""
    data = encoded(photograph())
    assert lost_pixels(data + bytes(5000)) == lost_pixels(data + data) == "", "something behind its end"
    assert lost_pixels(data[:-2] + bytes(3000) + b"\xff\xff\xd9") == "", "padding before its end"
    assert lost_pixels(data[:-6] + b"\xff\xd9") == "", "a few bytes of its last block"
    assert lost_pixels(data.replace(b"JFIF", b"JF\0\0", 1)) == ""


def test_what_is_not_told() -> None:
    """Damage that a decoder takes for a picture and no check here can tell from one."""
    data = cut(encoded(photograph(), progressive=True))
    assert lost_pixels(data) == "" and decode_rgb(data).shape == (*SIZE[::-1], 3)
    for other in (b"", b"\xff\xd8\xff", encoded(photograph())[:300], b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff" + bytes(50)):
        assert lost_pixels(other) == "", "decoding tells"
