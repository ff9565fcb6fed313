"""Captions of a sample: those that can be used, and, to measure how much of that training bears, made worse on purpose.

What `data.caption_noise` does to a caption is a pure function of (seed, image, number of the caption): a wrong caption is
wrong each time it comes up, as in a set that was annotated badly, and the same on any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from mmref.config import DataConfig
from mmref.data.sample_reader import SampleReader, SplitIndex
from mmref.errors import SampleError
from mmref.randomness import RandomStream, draw, uniform

DONORS = 20  # images whose captions are tried before a caption is left as it is


def usable_captions(meta: dict[str, Any], name: str) -> list[tuple[str, str]]:
    """(caption, kind) of a sample's non-empty captions. Raises SampleError when there is none."""
    captions = meta.get("captions") or []
    kinds = list(meta.get("caption_kinds") or [])
    kinds += [""] * (len(captions) - len(kinds))  # a caption is worth more than its kind
    usable = [(c.strip(), k) for c, k in zip(captions, kinds) if isinstance(c, str) and c.strip()]
    if not usable:
        raise SampleError(f"{name}: no caption (found {captions!r}).")
    return usable


def shortest(captions: Iterable[str]) -> str:
    """What a picture is labelled with: the caption of the fewest characters, of equally long ones the first in the order of their
    text; "" of none."""
    return min(captions, key=lambda caption: (len(caption), caption), default="")


class CaptionNoise:
    """Replaces captions by those of other objects, or drops words from them."""

    def __init__(self, config: DataConfig, seed: int, index: SplitIndex, samples: SampleReader) -> None:
        self.rate, self.kind, self.seed = config.caption_noise, config.caption_noise_kind, seed
        self.index, self.samples = index, samples

    def __call__(self, caption: str, image: int, number: int) -> str:
        """The caption of number `number` of an image of the index as training sees it."""
        if self.rate == 0:
            return caption
        return self._swap(caption, image, number) if self.kind == "swap" else self._drop(caption, image, number)

    def _swap(self, caption: str, image: int, number: int) -> str:
        """With probability `rate` a caption of a random image of another object."""
        if uniform(RandomStream.CAPTION_SWAP, self.seed, 0, image, number) >= self.rate:
            return caption
        row = int(self.index.object_row[image])
        first, last = int(self.index.object_start[row]), int(self.index.object_start[row + 1])
        others = len(self.index) - (last - first)
        for attempt in range(DONORS if others else 0):
            drawn = int(draw(RandomStream.CAPTION_DONOR, self.seed, 0, image, number, attempt))
            donor = drawn % others
            donor += last - first if donor >= first else 0  # the object's own images are stepped over
            try:
                captions = usable_captions(self.samples.read_meta(donor), f"image {donor}")
            except SampleError:
                continue  # counted when the plan comes to that image itself
            return captions[(drawn >> 32) % len(captions)][0]
        return caption

    def _drop(self, caption: str, image: int, number: int) -> str:
        """Each word is left out with probability `rate`; one word always stays."""
        words = caption.split()
        drawn = uniform(RandomStream.CAPTION_DROP, self.seed, 0, image, number, np.arange(len(words)))
        kept = drawn >= self.rate
        kept[int(drawn.argmax())] = True
        return " ".join(word for word, keep in zip(words, kept) if keep)
