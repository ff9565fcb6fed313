"""What is taken for a picture: by its ending, else by its first bytes."""

from __future__ import annotations

import io
import sys
import types

import pytest
from PIL import Image

from mmref.data import kinds

WITH_A_MARK = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "ICO", "PCX", "SGI")


@pytest.mark.parametrize(
    ("kind", "endings"),
    [
        (
            "picture",
            ".jpg .jpeg .jpe .jfif .png .apng .webp .avif .gif .tif .tiff .bmp .jp2 .ppm .pgm .tga .psd .ico .qoi",
        ),
        ("unread", ".heic .heif .hif .jxl .svg .xcf .wmf"),
        ("raw", ".cr2 .nef .dng .arw"),
        ("other", ".txt .mp4 .mov .mpg .pdf .eps .h5 .json .xmp .aae .db .gz .bin .zip"),
        ("unknown", ".dat .1 .jpg_large .part"),
    ],
)
def test_endings_say_what_files_are(kind, endings):
    assert {ending: kinds.kind_of(ending) for ending in endings.split()} == dict.fromkeys(endings.split(), kind)
    assert kinds.kind_of(kinds.ending_of("no-ending")) == "unknown" and kinds.ending_of("a/b.c/IMG_1.JPG") == ".jpg"


@pytest.mark.parametrize("name", WITH_A_MARK)
def test_first_bytes_tell_pictures(name):
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 90, 40)).save(file, name)
    assert kinds.is_picture(file.getvalue()[: kinds.PREFIX])


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"\0",
        b"\xff",
        b"P",
        b"a line of text\n",
        b"%PDF-1.7",
        b"%!PS-Adobe",
        b"\x93NUMPY",
        b"\x89HDF\r\n\x1a\n",
        bytes(32),
    ],
)
def test_first_bytes_of_other_files_do_not(start):
    assert not kinds.is_picture(start)


def test_packages_beside_pillow_are_asked(monkeypatch):
    """With pillow-heif installed its pictures are read."""
    asked = []
    heif = types.SimpleNamespace(register_heif_opener=lambda: asked.append("heif"))
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    kinds.register_plugins.__wrapped__()
    assert asked == ["heif"] and "pillow-heif" in kinds.why_unread(".heic")
