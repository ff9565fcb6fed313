"""What thresholds of `mmref index duplicates` give on an index: groups, the largest of them, and how many are copies.

    mmref index data_shards/emoji --model runs/emoji --out emoji-index
    python benchmarks/duplicates.py emoji-index --out duplicates.json
    python benchmarks/duplicates.py --random 50000 --out random.json

An image of a group counts as a copy of the one that is kept when their small pictures, drawn on white at 64 x 64, differ by at
most 4 of 255 on average. So features are held against pixels, which no model has made. --random compares features of a size
that no index here has.
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np
from output import write_figures
from PIL import Image

from mmref.retrieval.duplicates import Components, Found, find_duplicates, join_near

SIDE, MOST_DIFFERENCE = 64, 4.0
THRESHOLDS = (1.0, 0.9999, 0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.9)
LOOKED_AT = 2000  # images that are not the one kept, evenly over the groups


def pixels(found: Found, group: int, member: int) -> np.ndarray:
    """(SIDE, SIDE, 3) of a thumbnail."""
    image = Image.open(io.BytesIO(found.thumbnail(group, member))).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB").resize((SIDE, SIDE)), np.float32)


def share_of_copies(found: Found) -> float | None:
    """Of the images that are not kept, how many look as the one kept of their group."""
    others = [(i, j) for i, group in enumerate(found.groups) for j in range(1, len(group.members))]
    chosen = others[:: max(1, len(others) // LOOKED_AT)]
    copies = [np.abs(pixels(found, i, j) - pixels(found, i, 0)).mean() <= MOST_DIFFERENCE for i, j in chosen]
    return float(np.mean(copies)) if copies else None


def compare_random(count: int, dim: int = 256) -> dict[str, float]:
    """Seconds of comparing random features, of which a hundredth come twice."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((count, dim), dtype=np.float32)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    features[count // 2 :][: count // 100] = features[: count // 100]
    groups, wall, cpu = Components(count), time.perf_counter(), time.process_time()
    join_near(groups, [features], 0.97, None, np.arange(count))
    return {
        "items": count,
        "groups": len(groups.rows()),
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("index", nargs="?")
    parser.add_argument("--random", type=int, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("duplicates.json"))
    args = parser.parse_args()
    if args.random:
        write_figures(compare_random(args.random), args.out)
        return
    rows = []
    for above in THRESHOLDS:
        began = time.perf_counter()
        found = find_duplicates(args.index, above)
        seconds = time.perf_counter() - began
        rows.append(
            {
                "above": above,
                "groups": len(found.groups),
                "images": len(found.members()),
                "not_kept": len(found.left_out()),
                "largest": max((len(group.members) for group in found.groups), default=0),
                "several_objects": sum(group.several("object_id") for group in found.groups),
                "copies": share_of_copies(found),
                "seconds": seconds,
            }
        )
        print(rows[-1], flush=True)
    write_figures({"items": found.items, "thresholds": rows}, args.out)


if __name__ == "__main__":
    main()
