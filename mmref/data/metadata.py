"""An image file without what is not its picture: camera data, places, texts, previews, whatever stands behind its end.

The picture is not encoded again. What it needs to look as it did stays: the color profile, and of Exif the orientation alone.
"""

from __future__ import annotations

import re
import struct
import zlib

from mmref.data.colors import orientation_of
from mmref.data.container import image_ext, png_chunks, take_apart, webp_chunks

PNG_SHOWN = {  # chunks that say how a PNG looks
    b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT", b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"bKGD",
    b"pHYs", b"sBIT",
}  # fmt: skip
WEBP_FRAME = {b"VP8 ", b"VP8L", b"ALPH"}
WEBP_SHOWN = {*WEBP_FRAME, b"VP8X", b"ANIM", b"ANMF", b"ICCP"}
WEBP_EXIF, WEBP_XMP = 0x08, 0x04  # flags of VP8X
GIF_LOOPS = (b"NETSCAPE2.0", b"ANIMEXTS1.0")  # the extensions that say how often an animation runs
# In the picture itself 255 is followed by 0, or begins a restart.
JPEG_MARKER = re.compile(rb"\xff([^\x00\xd0-\xd7\xff])")
AVIF_EXTRA = re.compile(rb"Exif|application/rdf|\xbez\xcf\xcb\x97\xa9B\xe8\x9cq\x99\x94\x91\xe3\xaf\xac|x:xmpmeta")


def without_metadata(data: bytes) -> bytes | None:
    """The file without metadata; None where that cannot be had without decoding it: another format, or a broken file."""
    kind = image_ext(data)
    try:
        if kind is not None:
            container = take_apart(data)
            orientation = orientation_of(container.exif if container else None)
            return {"jpg": _jpeg, "png": _png, "webp": _webp}[kind](data, orientation)
        if data[:6] in (b"GIF87a", b"GIF89a"):
            return _gif(data)
    except (struct.error, IndexError, ValueError):
        return None
    is_plain_avif = data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis") and not AVIF_EXTRA.search(data)
    return data if is_plain_avif else None


def _exif(orientation: int) -> bytes:
    """Exif of an orientation alone, as a TIFF header and one entry."""
    return b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


def _jpeg(data: bytes, orientation: int) -> bytes | None:
    """Tables, frames and scans up to the end of the picture; a second picture (a preview, a film) begins behind it."""
    exif = b"Exif\0\0" + _exif(orientation)
    kept = [data[:2]]
    begun, scan = orientation == 1, False
    position = 2
    while found := JPEG_MARKER.search(data, position):
        if scan:
            kept.append(data[position : found.start()])
        marker = found[1][0]
        scan = marker == 0xDA
        if marker == 0xD9:
            return b"".join([*kept, b"\xff\xd9"])
        length = int.from_bytes(data[found.end() : found.end() + 2], "big")
        position = found.end() + length
        if length < 2 or position > len(data):
            return None
        if not begun and marker != 0xE0:
            kept.append(b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif)
            begun = True
        kept.append(_jpeg_segment(marker, data[found.end() + 2 : position]))
    return None


def _jpeg_segment(marker: int, content: bytes) -> bytes:
    """A segment as it stays, b"" for one that goes."""
    if marker == 0xE0 and content.startswith(b"JFIF\0"):
        content = content[:12] + b"\0\0"  # no preview
    elif marker == 0xE2 and content.startswith(b"ICC_PROFILE\0"):
        pass
    elif marker == 0xEE and content.startswith(b"Adobe"):
        content = content[:12]
    elif 0xE0 <= marker <= 0xEF or marker == 0xFE:
        return b""
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def _png(data: bytes, orientation: int) -> bytes | None:
    parts, ended = [data[:8]], False
    for name, start, end in png_chunks(data):
        if name in PNG_SHOWN:
            parts.append(data[start - 8 : end + 4])
        if name == b"IHDR" and orientation != 1:
            exif = _exif(orientation)
            check = zlib.crc32(b"eXIf" + exif)
            parts.append(struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", check))
        if name == b"IEND":
            ended = True
            break
    return b"".join(parts) if ended else None


def _webp(data: bytes, orientation: int) -> bytes | None:
    end = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    parts = _webp_parts(data[:end], 12, WEBP_SHOWN)
    if not parts:
        return None
    if parts[0][0] == b"VP8X":
        flags = parts[0][1][0] & ~(WEBP_EXIF | WEBP_XMP) | (WEBP_EXIF if orientation != 1 else 0)
        parts[0] = b"VP8X", bytes((flags,)) + parts[0][1][1:10]
        if orientation != 1:
            parts.append((b"EXIF", _exif(orientation)))
    body = b"WEBP" + b"".join(_webp_chunk(name, content) for name, content in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _webp_parts(data: bytes, position: int, shown: set[bytes]) -> list[tuple[bytes, bytes]]:
    """Chunks that stay, with those of each frame of an animation. Raises ValueError where one is cut."""
    parts = []
    for name, start, end in webp_chunks(data, position):
        content = data[start:end]
        if len(content) < end - start:
            raise ValueError("cut")
        if name not in shown:
            continue
        if name == b"ANMF":
            content = content[:16] + b"".join(_webp_chunk(*part) for part in _webp_parts(content, 16, WEBP_FRAME))
        parts.append((name, content))
    return parts


def _webp_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack("<4sI", name, len(content)) + content + b"\0" * (len(content) & 1)


def _gif(data: bytes) -> bytes | None:
    """Pictures, how long each is shown, and loops; no comments, texts or other applications' data."""
    position = 13 + _gif_colors(data[10])
    kept = [data[:position]]
    while True:
        kind = data[position]
        if kind == 0x3B:
            return b"".join([*kept, b"\x3b"])
        if kind == 0x2C:
            begin = position + 10 + _gif_colors(data[position + 9]) + 1
        elif kind == 0x21:
            begin = position + 2
        else:
            return None
        end = _gif_blocks_end(data, begin)
        loops = data[position + 1] == 0xFF and data[begin + 1 : begin + 12] in GIF_LOOPS
        if kind == 0x2C or data[position + 1] == 0xF9 or loops:
            kept.append(data[position:end])
        position = end


def _gif_colors(packed: int) -> int:
    """Bytes of the color table that a descriptor announces."""
    return 3 << ((packed & 7) + 1) if packed & 0x80 else 0


def _gif_blocks_end(data: bytes, position: int) -> int:
    while data[position]:
        position += 1 + data[position]
    return position + 1
