"""Which files are pictures that can be read here: by their ending, and by their first bytes where that says nothing.

What is read is what Pillow and OpenCV read as they are installed here. Kinds that only describe pictures (stubs), hold films
or run programs (PostScript) are none.
"""

from __future__ import annotations

import contextlib
import functools
import mimetypes
import os
from collections.abc import Callable
from typing import Literal

PREFIX = 32  # bytes that `is_picture` looks at
OPENCV_ENDINGS = (".hdr", ".pic", ".pam", ".pxm", ".sr", ".exr", ".jxl")  # read where OpenCV also writes them
RAW_ENDINGS = (".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw", ".x3f")
UNREAD = "a kind of picture that nothing here reads"
RAW = "a camera's raw file: export it as JPEG, PNG or TIFF"
NEEDS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "needs pillow-heif"),
    ".avif": "needs a Pillow with AVIF",
    ".jxl": "needs pillow-jxl-plugin",
    ".webp": "needs a Pillow with WebP",
    **dict.fromkeys(RAW_ENDINGS, RAW),
    **dict.fromkeys((".svg", ".wmf", ".emf", ".xcf", ".psb", ".jxr"), UNREAD),
}  # pictures all the same, listed where they cannot be read
SIDECARS = (".xmp", ".aae", ".db", ".ini", ".npy", ".npz", ".parquet", ".safetensors", ".jsonl", ".yaml", ".md")

Kind = Literal["picture", "unread", "raw", "other", "unknown"]


def ending_of(name: str) -> str:
    """The ending of a file's name in lower case, with its dot; "" where it has none."""
    return os.path.splitext(name)[1].lower()


def kind_of(ending: str) -> Kind:
    """What an ending says: a picture that can be read here, one that cannot, a camera's raw file (which begins as a TIFF does,
    and is none), something else, or nothing."""
    if ending in picture_endings():
        return "picture"
    if ending in RAW_ENDINGS:
        return "raw"
    known, packed = _types().guess_type(f"_{ending}")
    if ending in NEEDS or (known or "").startswith("image/"):
        return "unread"
    return "other" if known or packed or ending in SIDECARS else "unknown"


def why_unread(ending: str) -> str:
    """Why pictures of an ending are not read here."""
    return NEEDS.get(ending, UNREAD)


@functools.cache
def picture_endings() -> frozenset[str]:
    """Endings of the pictures that can be read here."""
    from PIL import Image

    known = _formats()
    endings = {ending for ending, name in Image.registered_extensions().items() if name in known}
    import cv2

    return frozenset(endings | {ending for ending in OPENCV_ENDINGS if cv2.haveImageWriter(f"_{ending}")})


def is_picture(prefix: bytes) -> bool:
    """Whether a file that begins with these bytes is a picture that can be read here, of the kinds that the web knows: those of
    others begin as any file may."""
    from PIL import Image

    return any(_accepts(accept, prefix[:16]) for name, accept in _formats().items() if accept and name in Image.MIME)


def _accepts(accept: Callable[[bytes], bool | str], prefix: bytes) -> bool:
    with contextlib.suppress(Exception):  # too short for what it looks at
        return accept(prefix) is True
    return False


@functools.cache
def _formats() -> dict[str, Callable[[bytes], bool | str] | None]:
    """Pillow's formats that are read, and what tells them by their first bytes."""
    from PIL import Image, ImageFile

    register_plugins()
    Image.init()
    return {
        name: accept
        for name, (factory, accept) in Image.OPEN.items()
        if Image.MIME.get(name, "image/").startswith("image/")
        and not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))
    }


@functools.cache
def register_plugins() -> None:
    """Have Pillow read what packages beside it read, where they are installed."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401 -- registers itself


@functools.cache
def _types() -> mimetypes.MimeTypes:
    return mimetypes.MimeTypes()  # Python's own table: the same on every machine
