"""How an image of any size becomes one of the size that a model sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmref.config import DataConfig
from mmref.data.decode import decoded, resize_rgb

LONG = 8
"""Of an image that is longer than so many times its shorter side the middle alone is resized, or a strip of a pixel's width would
take gigabytes. Noise may then differ a little from what transformers gives, which cuts after resizing."""


@dataclass(frozen=True)
class Fit:
    """Height and width in pixels, and the rule by which an image gets them.

    `area` squeezes both sides as `resize_rgb` does, `stretch` by a filter of Pillow, `crop` resizes the shorter side to `edge`
    and takes the center. The last two give the very pixels that transformers' image processors do, which models were trained
    with: filters differ by more than a model is indifferent to.
    """

    height: int
    width: int
    rule: str = "area"
    resample: str = "bicubic"
    edge: int = 0

    @classmethod
    def of(cls, data: DataConfig) -> Fit:
        """The rule of a settled config."""
        return cls(data.image_height, data.image_width, data.resize, data.resample, data.resize_edge)

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 -> (height, width, 3) uint8."""
        if self.rule == "area":
            return resize_rgb(rgb, self.height, self.width)
        if self.rule == "stretch":
            return self._filtered(rgb, self.height, self.width)
        height, width = rgb.shape[:2]
        shorter, longer = min(height, width), max(height, width)
        long_side = int(self.edge * longer / shorter)
        if long_side > LONG * self.edge:
            return _center(self._middle(rgb, long_side), self.height, self.width)
        sides = (self.edge, long_side) if height <= width else (long_side, self.edge)
        return _center(self._filtered(rgb, *sides), self.height, self.width)

    def _middle(self, rgb: NDArray[np.uint8], long_side: int) -> NDArray[np.uint8]:
        """The resized image without the ends of its longer side, which would be cut off: they are never computed."""
        height, width = rgb.shape[:2]
        tall = height > width
        kept = min(self.height if tall else self.width, long_side)
        start = (long_side - kept) // 2
        longer = max(height, width)
        first, last = start * longer / long_side, (start + kept) * longer / long_side
        size, box = ((self.edge, kept), (0, first, width, last)) if tall else ((kept, self.edge), (first, 0, last, height))
        return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling[self.resample.upper()], box))

    def decode(self, data: bytes, name: str = "image") -> NDArray[np.uint8]:
        """Pixels (height, width, 3) uint8 of an encoded image. Raises SampleError."""
        # The filters of Pillow take every pixel: a model that was trained with them gets what transformers would give it.
        shrinks_to = (self.height, self.width) if self.rule == "area" else None
        with decoded(data, name, shrinks_to=shrinks_to) as rgb:
            return self(rgb)

    def _filtered(self, rgb: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
        if rgb.shape[:2] == (height, width):
            return rgb
        kind = Image.Resampling[self.resample.upper()]
        return np.asarray(Image.fromarray(rgb).resize((width, height), kind))


@dataclass(frozen=True)
class Fitted:
    """Pixels (height, width, 3) uint8 that have the model's size already, as `Fit` gives them."""

    pixels: NDArray[np.uint8]


def _center(rgb: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """The middle of an image, black where it is smaller than what is cut out."""
    missing = max(0, height - rgb.shape[0]), max(0, width - rgb.shape[1])
    if any(missing):  # the odd pixel goes before, as in transformers
        before = [(gap + 1) // 2 for gap in missing]
        rgb = np.pad(rgb, ((before[0], missing[0] - before[0]), (before[1], missing[1] - before[1]), (0, 0)))
    top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
    return np.ascontiguousarray(rgb[top : top + height, left : left + width])
