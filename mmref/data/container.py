"""What the files of a shard (JPEG, PNG, WebP) say of their picture, read without decoding it.

Texts, profiles and camera data are taken off here: a decoder that stumbles over one of them would lose a sound picture.
"""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_PROFILE_BYTES = 4_000_000  # of a color profile that is unpacked; printers' are about 2 MB
MAX_PARTS = 100_000  # of a file that are looked at: millions of empty ones would cost seconds
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}  # chunks that the picture is made of
JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers that begin a frame with its size
JPEG_LENGTHLESS = {0x01, *range(0xD0, 0xD8)}
JPEG_TEXTS = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # not APP0 and APP14: they tell how colors are stored


@dataclass
class Container:
    """A file taken apart."""

    kind: str  # jpg, png, webp
    data: bytes  # the file without what is not its picture
    size: tuple[int, int] | None = None  # width, height; None where the header is broken
    channels: int = 0  # of a JPEG
    exif: bytes | None = None
    icc: bytes | None = None  # color profile
    gray_key: tuple[int, int] | None = None  # of a PNG in gray: the value that is transparent, and the largest value
    _profile: list[bytes] = field(default_factory=list)  # parts of a JPEG's profile, each after its number


def image_ext(data: bytes) -> str | None:
    """jpg, png or webp by the first bytes; None for anything else."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "jpg" if data[:3] == b"\xff\xd8\xff" else "png" if data[:8] == b"\x89PNG\r\n\x1a\n" else None


def take_apart(data: bytes) -> Container | None:
    """The parts of a JPEG, PNG or WebP; None for anything else. Broken parts are passed over: decoding tells."""
    kind = image_ext(data)
    if kind is None:
        return None
    found = Container(kind, data)
    with contextlib.suppress(struct.error, IndexError):  # cut inside a header
        {"jpg": _jpeg, "png": _png, "webp": _webp}[kind](found)
    return found


def _jpeg(found: Container) -> None:
    data, kept, position, begin = found.data, [], 2, 0
    for _ in range(MAX_PARTS):
        if position + 4 > len(data) or data[position] != 0xFF:
            break
        marker = data[position + 1]
        if marker == 0xFF or marker in JPEG_LENGTHLESS:  # padding, or a marker that stands alone
            position += 1 if marker == 0xFF else 2
        elif marker == 0xDA:  # the picture begins
            break
        else:
            end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            if marker in JPEG_SIZES and found.size is None:
                height, width, found.channels = struct.unpack_from(">HHB", data, position + 5)
                found.size = width, height
            elif marker in JPEG_TEXTS:
                _jpeg_text(found, data[position + 4 : end])
                kept.append(data[begin:position])
                begin = end
            position = end
    parts = sorted(found._profile)
    if parts and parts[0][1] == len(parts):
        found.icc = b"".join(part[2:] for part in parts)
    if kept:
        found.data = b"".join([*kept, data[begin:]])


def _jpeg_text(found: Container, text: bytes) -> None:
    if text.startswith(b"Exif\0") and found.exif is None:
        found.exif = text
    elif text.startswith(b"ICC_PROFILE\0") and len(text) > 14:
        found._profile.append(text[12:])  # number, how many, content


def _png(found: Container) -> None:
    data, kept, begin = found.data, [], 0
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    found.size = width, height
    for name, start, end in png_chunks(data):
        if name in PNG_PIXELS:
            if name == b"tRNS" and color == 0:
                found.gray_key = int.from_bytes(data[start : start + 2], "big"), (1 << depth) - 1
            continue
        if name == b"eXIf":
            found.exif = data[start:end]
        elif name == b"iCCP":
            found.icc = _unpack(data[start:end].partition(b"\0")[2][1:])
        kept.append(data[begin : start - 8])
        begin = end + 4
    if kept:
        found.data = b"".join([*kept, data[begin:]])


def png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(name, begin, end) of the content of each whole chunk."""
    position = 8
    for _ in range(MAX_PARTS):
        if position + 12 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data):
            break
        yield name, position + 8, position + 8 + length
        position += 12 + length


def _unpack(packed: bytes) -> bytes | None:
    try:
        return zlib.decompressobj().decompress(packed, MAX_PROFILE_BYTES)
    except zlib.error:
        return None


def _webp(found: Container) -> None:
    sizes = []
    for name, start, end in webp_chunks(found.data, 12):
        body = found.data[start:end]
        if name == b"VP8X":
            sizes.append((1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")))
        elif name == b"VP8L":
            (bits,) = struct.unpack_from("<I", body, 1)
            sizes.append(((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1))
        elif name == b"VP8 ":
            width, height = struct.unpack_from("<HH", body, 6)
            sizes.append((width & 0x3FFF, height & 0x3FFF))
        elif name == b"EXIF":
            found.exif = body
        elif name == b"ICCP":
            found.icc = body
    found.size = max(sizes, key=lambda size: size[0] * size[1]) if sizes else None


def webp_chunks(data: bytes, position: int) -> Iterator[tuple[bytes, int, int]]:
    """(name, begin, end) of the content of each chunk from a position on; the last may end behind the file."""
    for _ in range(MAX_PARTS):
        if position + 8 > len(data):
            break
        name, length = struct.unpack_from("<4sI", data, position)
        yield name, position + 8, position + 8 + length
        position += 8 + length + (length & 1)
