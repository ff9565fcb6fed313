"""How far features lie from transformers' own, for every family of pretrained models.

    python benchmarks/pretrained_parity.py
    python benchmarks/pretrained_parity.py --model openai/clip-vit-base-patch32 --images photos/*.jpg

Without --model: small models of random weights in the layout of a hub, and pictures of many shapes. The other side is
transformers alone: the model's own image processor and tokenizer, `get_image_features` and `get_text_features`,
L2-normalised. Needs no Ray.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from support.pretrained import FAMILIES, PHOTOGRAPHS, TEXTS, own_features, save_pretrained
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

import mmref


def difference(model: str, images: list[bytes], texts: list[str]) -> tuple[float, float]:
    """Largest difference of a number in the features of images and of texts."""
    ours = mmref.load(model, device="cpu")
    image, text = own_features(model, images, texts)
    return float(np.abs(ours.encode_images(images) - image).max()), float(np.abs(ours.encode_text(texts) - text).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a pretrained model, by hub id or folder")
    parser.add_argument("--images", nargs="+", type=Path, help="image files (default: made-up ones)")
    args = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    images = [path.read_bytes() for path in args.images] if args.images else PHOTOGRAPHS
    print("| family | image | text |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for family in [args.model] if args.model else FAMILIES:
            place = args.model or str(save_pretrained(family, Path(folder) / family.replace(" ", "-")))
            image, text = difference(place, images, TEXTS)
            print(f"| {family} | {image:.1e} | {text:.1e} |", flush=True)


if __name__ == "__main__":
    main()
