"""JPEGs decoded at a part of their size against decoding all of it: time, and how far the resized pixels are apart.

    python benchmarks/decode.py --photos photos.tar --side 2048 --targets 64 128 224 384 --out decode.json

Photographs (of a tar or a folder) are laid side by side to one of `--side` pixels, since public sets hold small ones. The two
ways run in turns over the rounds; time is processor time of decoding and resizing, the median of the rounds. For comparison it
tells how far bicubic resizing is from averaging on the same pixels.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from output import write_figures
from PIL import Image

from mmref.data.decode import calm_opencv, decode_rgb, decoded, resize_rgb

Pixels = NDArray[np.uint8]


def photographs(place: Path) -> list[bytes]:
    """JPEGs of a tar or a folder, at most as many as a mosaic takes."""
    if place.is_dir():
        return [path.read_bytes() for path in sorted(place.rglob("*.jpg"))[:400]]
    with tarfile.open(place) as tar:
        members = (member for member in tar if member.name.endswith((".jpg", ".jpeg")))
        return [tar.extractfile(member).read() for member, _ in zip(members, range(400))]  # type: ignore[union-attr]


def mosaic(photos: list[bytes], side: int) -> Pixels:
    """Photographs side by side: (side, side, 3)."""
    rows: list[Pixels] = []
    row: list[Pixels] = []
    images = [decode_rgb(data) for data in photos]
    height = min(len(image) for image in images)
    position = 0
    while sum(map(len, rows)) < side:
        row.append(images[position % len(images)][:height])
        position += 1
        if sum(image.shape[1] for image in row) >= side:
            rows.append(np.hstack(row)[:, :side])
            row = []
    return np.ascontiguousarray(np.vstack(rows)[:side])


def reduced(data: bytes, target: int) -> Pixels:
    """Decoded as what is made small afterwards."""
    with decoded(data, shrinks_to=(target, target)) as rgb:
        return resize_rgb(rgb, target, target)


def timed(make: Callable[[], Pixels]) -> tuple[Pixels, float]:
    """Pixels, and milliseconds of processor time."""
    began = time.process_time()
    made = make()
    return made, 1e3 * (time.process_time() - began)


def compare(data: bytes, target: int, rounds: int) -> dict[str, float]:
    """Both ways for one target side."""
    times: dict[str, list[float]] = {"whole": [], "reduced": []}
    for _ in range(rounds):
        whole, whole_ms = timed(lambda: resize_rgb(decode_rgb(data), target, target))
        small, small_ms = timed(lambda: reduced(data, target))
        times["whole"].append(whole_ms)
        times["reduced"].append(small_ms)
    apart = np.abs(whole.astype(int) - small)
    bicubic = np.asarray(Image.fromarray(decode_rgb(data)).resize((target, target), Image.Resampling.BICUBIC))
    return {
        "whole ms": median(times["whole"]), "reduced ms": median(times["reduced"]),
        "ratio": median(a / b for a, b in zip(times["reduced"], times["whole"])),
        "mean difference": float(apart.mean()), "largest difference": int(apart.max()),
        "bicubic's mean difference": float(np.abs(whole.astype(int) - bicubic).mean()),
    }  # fmt: skip


def main() -> None:
    """Parses options and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="tar or folder of JPEGs")
    parser.add_argument("--side", type=int, nargs="+", default=[2048])
    parser.add_argument("--targets", type=int, nargs="+", default=[64, 128, 224, 384])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="JSON file of the figures")
    args = parser.parse_args()
    calm_opencv()
    photos, found = photographs(args.photos), dict[str, Any]()
    for side in args.side:
        file = io.BytesIO()
        Image.fromarray(mosaic(photos, side)).save(file, "JPEG", quality=92)
        found |= {f"{side} to {target}": compare(file.getvalue(), target, args.rounds) for target in args.targets}
    write_figures(found, args.out)


if __name__ == "__main__":
    main()
