"""A shard set of random images built in a moment, and the config of a tiny model on it."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmref.config import Config, from_dict, to_dict
from mmref.config.inputs import settled
from mmref.data.shard_set import ShardSet
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.samples import SourceImage, SourceObject

SPLITS = {"train": 14, "val": 4, "test": 4}  # objects of each
COLOURS = ("red", "green", "blue", "grey")
SHAPES = ("circle", "square", "star")


class TinySource:
    """Objects with one to five random 16 px images, in turn PNG, JPEG and WebP; two captions an image."""

    licence, origin, min_images = "CC0-1.0", "random numbers", 1

    def __init__(self, name: str = "tiny", first: int = 0) -> None:
        """first: number of the first object; another one gives other objects."""
        self.name, self.first = name, first
        self.skipped: list[str] = []

    def objects(self) -> Iterable[SourceObject]:
        number = self.first
        for split, count in SPLITS.items():
            for _ in range(count):
                images = []
                for i in range(1 + number % 5):
                    name = f"{COLOURS[number % 4]} {SHAPES[number % 3]} {number}"
                    captions, kinds = [name, f"drawing {i} of a {name}"], ["name", "sentence"]
                    images.append(SourceImage(f"{number}-{i}", 100 * number + i, captions, kinds))
                yield SourceObject(split, f"thing.{number}", images)
                number += 1

    def load(self, ref: int) -> bytes:
        pixels = np.random.default_rng(ref).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, ("PNG", "JPEG", "WEBP")[ref % 3])
        return out.getvalue()

    def write_extras(self, root: str) -> None:
        """Nothing."""


def build_tiny_set(out: Path, source: TinySource | None = None) -> Path:
    build_shards(source or TinySource(), str(out), BuildOptions(min_shards=2, tokenizer_vocab=80, progress=False))
    return out


def damage_image(root: Path, image: int, split: str = "train") -> None:
    """Overwrite the bytes of one image inside its tar; sizes and json stay."""
    index = ShardSet.open(str(root)).index(split)
    with open(index.shard_paths[int(index.shard[image])], "r+b") as file:
        file.seek(int(index.image_offset[image]))
        file.write(b"\0" * int(index.image_size[image]))


def replace_json(root: Path, image: int, text: str, split: str = "train") -> None:
    """Replace the json of one image by `text`, filled up with spaces to the old size."""
    index = ShardSet.open(str(root)).index(split)
    size = int(index.json_size[image])
    assert len(text.encode()) <= size
    with open(index.shard_paths[int(index.shard[image])], "r+b") as file:
        file.seek(int(index.json_offset[image]))
        file.write(text.encode().ljust(size))


VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "patch_size": 8, "image_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
CONVNEXT = {
    "model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip
BERT = {
    "model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 80, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def set_field(values: dict[str, Any], name: str, value: Any) -> None:
    """values["a"]["b"] = value for the name "a.b"."""
    *sections, key = name.split(".")
    for section in sections:
        values = values[section]
    values[key] = value


def tiny_config(root: str | os.PathLike[str], overrides: dict[str, Any]) -> Config:
    """Tiny ViT + BERT without dropout, guidance at full weight from the first step; dotted overrides."""
    values = to_dict(Config())
    base = {
        "data.root": str(root), "data.image_height": 16, "data.image_width": 16, "data.max_tokens": 10,
        "data.crop_padding": 2, "model.vision_config": VIT, "model.text_config": BERT, "model.embed_dim": 8,
        "model.pool": "mean", "loss.guide_from": 0.0, "loss.guide_full": 0.0, "train.global_batch": 8,
        "train.max_steps": 20, "train.warmup_steps": 2,
    }  # fmt: skip
    for name, value in (base | overrides).items():
        set_field(values, name, value)
    return settled(from_dict(values))
