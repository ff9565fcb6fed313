"""Whether a JPEG lost a part of its picture, which decoders do not say: they fill it with gray, or go on with what follows.

Only what no sound file can be is told. A picture in one sequential scan, as cameras and most programs write it, holds the codes
of all its blocks in front of the first marker. In progressive ones each of several scans may end anywhere.
"""

from __future__ import annotations

import io
import math
import re
import struct
from dataclasses import dataclass, field

from PIL import Image

from mmref.data.container import take_apart

SEQUENTIAL = (0xC0, 0xC1)  # frames in Huffman codes whose scans are not parts of a precision
SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # a marker that is none of those between restarts
RESTART = re.compile(rb"\xff[\xd0-\xd7]")
SPARE = b"\xff\x00" * 16  # what a decoder may read beyond the last code, and what an encoder may have cut there
HOLE = bytes(1024)  # a block that a download or a disk never filled in
SCALE = 8  # pixels are not looked at: a decoder that makes few of them takes a fraction of the time
END_OF_BLOCK = 0


@dataclass
class _Scan:
    """What the headers of a JPEG say of its first scan."""

    start: int = 0  # of its codes
    frame: int = 0  # marker
    size: tuple[int, int] = (0, 0)  # height, width
    sampling: list[tuple[int, int]] = field(default_factory=list)  # of each component: across, down
    components: int = 0  # in this scan
    table: int = 0  # of the first component's codes that are not of a mean
    first_symbols: dict[int, int] = field(default_factory=dict)  # of such tables: what the code of zeros means
    interval: int = 0  # blocks together between restarts


def lost_pixels(data: bytes) -> str:
    """Why a JPEG cannot be whole, "" where it may be or is none."""
    container = take_apart(data)
    if container is None or container.kind != "jpg":
        return ""
    try:
        scan = _first_scan(container.data)
    except (struct.error, IndexError):  # cut inside of a header: decoding tells
        return ""
    if scan.frame not in SEQUENTIAL or scan.components != len(scan.sampling) or 0 in scan.size:
        return ""
    end = SCAN_END.search(container.data, scan.start)
    codes = container.data[scan.start : end.start() if end else None]
    missing = _restarts(scan) - len(RESTART.findall(codes))
    if missing > 0:
        return f"a part of the picture is missing: {missing} of {_restarts(scan)} restart markers"
    # Zeros between the last code and an end marker may be an encoder's padding; where zeros mean empty blocks they may be white.
    inside = codes.rstrip(b"\0\xff") if end else codes
    if scan.first_symbols.get(scan.table, END_OF_BLOCK) != END_OF_BLOCK and HOLE in inside:
        return f"a part of the picture is missing: there are {len(HOLE):,} and more zeros in its place"
    return "the picture ends early: its lower part is missing" if _ends_early(container.data[: scan.start] + codes) else ""


def _first_scan(data: bytes) -> _Scan:
    """Raises struct.error or IndexError where the headers are cut."""
    found, position = _Scan(), 2
    while not found.start:
        marker = data[position + 1]
        if data[position] != 0xFF or marker == 0xFF or marker in range(0xD0, 0xD8):  # padding
            position += 1 if marker == 0xFF or data[position] != 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        body, position = data[position + 4 : position + 2 + length], position + 2 + length
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            found.frame, found.size = marker, struct.unpack_from(">HH", body, 1)
            found.sampling = [(body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15) for i in range(body[5])]
        elif marker == 0xC4:
            _take_tables(found, body)
        elif marker == 0xDD:
            (found.interval,) = struct.unpack_from(">H", body)
        elif marker == 0xDA:
            found.start, found.components, found.table = position, body[0], body[2] & 15
    return found


def _take_tables(found: _Scan, body: bytes) -> None:
    """Of tables of codes: each begins with the code of zeros, the shortest."""
    at = 0
    while at + 17 < len(body):
        if body[at] >> 4 == 1:
            found.first_symbols[body[at] & 15] = body[at + 17]
        at += 17 + sum(body[at + 1 : at + 17])


def _restarts(scan: _Scan) -> int:
    """How many markers there are between the intervals of a whole picture."""
    if not scan.interval:
        return 0
    across, down = (1, 1) if scan.components == 1 else (max(sides) for sides in zip(*scan.sampling))
    height, width = scan.size
    units = math.ceil(width / (8 * across)) * math.ceil(height / (8 * down))
    return math.ceil(units / scan.interval) - 1


def _ends_early(data: bytes) -> bool:
    """Whether the codes of a scan end before the picture does. Without an end marker a decoder waits for more, where with one it
    would fill the rest with gray."""
    try:
        with Image.open(io.BytesIO(data + SPARE)) as image:
            image.draft(image.mode, (max(1, image.width // SCALE), max(1, image.height // SCALE)))
            image.load()
    except OSError as error:
        return "truncated" in str(error)
    except Exception:  # Pillow raises many kinds; decoding says what is wrong
        return False
    return False
