"""Pixels as a file holds them -> 8 bits, sRGB, upright, on white."""

from __future__ import annotations

import functools
import io
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

Pixels = NDArray[np.uint8]

CHANNELS = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's mode of a profile's kind
LIKE_SRGB = 3  # of 255: a profile that moves no color further is left alone, so that the many kinds of sRGB change nothing


def to_8_bit(values: NDArray[Any]) -> Pixels:
    """Values of any depth to 0..255, in the same shape.

    16 bits are divided by 257. The range of floats and of signed or 32-bit integers is not told: it is taken to be 0..1,
    0..255, 0..32767 or 0..65535 where the values fit, and the largest is above half of it (0..1: any); else they are
    stretched from their least to their greatest. What is not finite counts as the least.
    """
    if values.dtype.kind == "b":
        return values.astype(np.uint8) * 255
    if values.dtype.kind == "u" and values.dtype.itemsize == 1:
        return values
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        narrow = np.empty(values.shape, np.uint8)
        return np.floor_divide(values, 257, out=narrow, casting="unsafe")
    finite = np.isfinite(values)
    if not finite.any():
        return np.zeros(values.shape, np.uint8)
    lowest, highest = (np.inf, -np.inf) if values.dtype.kind == "f" else (values.max(), values.min())
    low = float(np.min(values, where=finite, initial=lowest))
    high = float(np.max(values, where=finite, initial=highest))
    tops = [top for top in (1, 255, 32767, 65535) if high <= top and (top == 1 or high > top / 2)]
    start, top = (0.0, float(tops[0])) if low >= 0 and tops else (low, high - low)
    scaled = np.zeros(values.shape, np.uint8)
    for row in range(len(values)) if top > 0 else ():  # a row at a time: floats of a large picture are large
        whole = np.where(finite[row], values[row], low).astype(np.float64)
        scaled[row] = np.clip(np.round((whole - start) * (255 / top)), 0, 255)
    return scaled


def to_srgb(pixels: Pixels, icc: bytes | None, mode: str | None = None) -> Pixels:
    """Colors of a profile as sRGB. A profile that is broken, of other channels, or as good as sRGB changes nothing.

    Args:
        pixels: (H, W) gray, (H, W, 3) RGB, (H, W, 4) RGBA, or with `mode="CMYK"` (H, W, 4) as Pillow holds it.
    """
    if not icc:
        return pixels
    mode = mode or ("L" if pixels.ndim == 2 else "RGB")
    known, to_rgb = _transform(icc)
    if to_rgb is None:
        return pixels
    if mode == "L" and known == "RGB":
        pixels, mode = on_white(pixels), known
    if mode != known:
        return pixels
    colors = pixels[..., :3] if mode == "RGB" else pixels
    done = _apply(to_rgb, colors, mode)
    return np.dstack([done, pixels[..., 3:]]) if mode == "RGB" and pixels.shape[2] == 4 else done


@functools.lru_cache(maxsize=16)
def _transform(icc: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """Pillow's mode of a profile's channels, and the way to sRGB; None where there is nothing to do."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        mode = CHANNELS[profile.profile.xcolor_space.strip()]
        to_rgb = ImageCms.buildTransform(
            profile,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "CMYK":
            return mode, to_rgb
        steps = np.arange(0, 256, 17, dtype=np.uint8)
        colors = np.stack(np.meshgrid(*[steps] * 3), axis=-1).reshape(1, -1, 3) if mode == "RGB" else steps[None]
        moved = np.abs(_apply(to_rgb, colors, mode).astype(int) - (colors if mode == "RGB" else colors[..., None])).max()
        return mode, to_rgb if moved > LIKE_SRGB else None
    except Exception:  # a broken profile tells nothing, whatever is raised about it
        return "", None


def _apply(to_rgb: ImageCms.ImageCmsTransform, colors: Pixels, mode: str) -> Pixels:
    height, width = colors.shape[:2]
    image = Image.frombuffer(mode, (width, height), np.ascontiguousarray(colors), "raw", mode, 0, 1)
    return np.asarray(ImageCms.applyTransform(image, to_rgb))


def orientation_of(exif: bytes | None) -> int:
    """Exif's orientation, 1 to 8; 1 (upright) where there is none, or it is broken."""
    if not exif:
        return 1
    try:
        tags = Image.Exif()
        tags.load(exif)
        orientation = tags.get(ExifTags.Base.Orientation)
    except Exception:  # broken Exif tells nothing, whatever is raised about it
        return 1
    return orientation if isinstance(orientation, int) and orientation in range(1, 9) else 1


def upright(pixels: Pixels, exif: bytes | None) -> Pixels:
    """Turn a photograph as its Exif orientation says; as it is where that is broken."""
    orientation = orientation_of(exif)
    if orientation == 1:
        return pixels
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def on_white(pixels: Pixels) -> Pixels:
    """Gray, RGB or RGBA to (H, W, 3) RGB, transparent parts on white."""
    if pixels.ndim == 2:
        rgb: Any = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
        return rgb
    if pixels.shape[2] == 3:
        return pixels
    flat = np.empty((*pixels.shape[:2], 3), np.uint8)
    for top in range(0, len(pixels), 256):  # what is computed with is as large as a band, not as a large picture
        band, alpha = pixels[top : top + 256], np.ascontiguousarray(pixels[top : top + 256, :, 3])
        for channel in range(3):  # white less what the picture takes from it; OpenCV rounds products of bytes exactly
            taken: Any = cv2.multiply(255 - band[..., channel], alpha, scale=1 / 255)
            flat[top : top + 256, :, channel] = 255 - taken
    return flat
