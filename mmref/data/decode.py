"""Image bytes -> RGB pixels."""

from __future__ import annotations

import io
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mmref.errors import SampleError

cv2.setNumThreads(0)  # readers are processes: OpenCV's own threads would fight over their cores
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # broken images are named by SampleError


def decode_image(data: bytes, height: int, width: int, name: str = "image") -> NDArray[np.uint8]:
    """Decode an image (see `decode_rgb`) and resize it: (height, width, 3) uint8. Raises SampleError."""
    return resize_rgb(decode_rgb(data, name), height, width)


def decode_rgb(data: bytes, name: str = "image") -> NDArray[np.uint8]:
    """Decode JPEG, PNG or WebP to RGB in its own size: (H, W, 3) uint8.

    Grey, palette, CMYK and 16-bit images become RGB; transparent ones are laid on white; photographs are turned upright
    as their Exif orientation says.

    Raises:
        SampleError: the bytes are not a whole image.
    """
    if not data:
        raise SampleError(f"{name}: the image is empty (0 bytes).")
    jpeg = data[:2] == b"\xff\xd8"
    if jpeg and b"\xff\xd9" not in data[-64:]:
        # OpenCV decodes a truncated JPEG to a picture with a grey rest; Pillow refuses it, and takes one whose maker
        # appended something behind the end marker
        pixels: Any = _decode_pillow(data, name)
    else:
        try:
            flags = cv2.IMREAD_COLOR if jpeg else cv2.IMREAD_UNCHANGED  # unchanged would ignore the orientation
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error:
            pixels = None
        if pixels is None:
            pixels = _decode_pillow(data, name)
    if pixels.dtype != np.uint8:
        pixels = (pixels // 257).astype(np.uint8) if pixels.dtype == np.uint16 else pixels.astype(np.uint8)
    return _to_rgb(pixels)


def resize_rgb(rgb: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 -> (height, width, 3) uint8: averaged when it shrinks, bicubic when it grows."""
    if rgb.shape[:2] == (height, width):
        return rgb
    shrinks = rgb.shape[0] * rgb.shape[1] > height * width
    resized: Any = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return resized


def _decode_pillow(data: bytes, name: str) -> Any:
    """What OpenCV cannot read (some CMYK, odd palettes), in OpenCV's channel order."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as image:
            rgba = np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    except UnidentifiedImageError:  # its message holds a memory address: one broken image would count as many
        raise SampleError(f"{name}: not an image of a known format ({len(data)} bytes).") from None
    except Exception as error:  # Pillow raises many kinds for broken bytes
        raise SampleError(f"{name}: not a readable image ({len(data)} bytes): {error}") from None
    return cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA)


def _to_rgb(pixels: Any) -> Any:
    """OpenCV's channels (grey, grey + alpha, BGR, BGRA) to RGB."""
    if pixels.ndim == 2:
        return cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)
    if pixels.shape[2] == 2:  # grey + alpha
        pixels = np.dstack([pixels[..., :1]] * 3 + [pixels[..., 1:]])
    if pixels.shape[2] == 4:
        alpha = pixels[..., 3:].astype(np.float32) / 255
        flat = pixels[..., :3] * alpha + 255 * (1 - alpha)
        pixels = np.round(flat).astype(np.uint8)
    return cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_BGR2RGB)
