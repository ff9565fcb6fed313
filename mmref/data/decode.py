"""Image bytes -> RGB pixels: the one decoder of shards, indexes and queries.

JPEG, PNG and WebP are decoded by OpenCV, the quickest; everything else, and what OpenCV refuses, by Pillow. Whichever it is,
depth, transparency, color profile and orientation are dealt with here, so that a picture looks the same in every container.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, TiffImagePlugin

from mmref.data.budget import Room
from mmref.data.colors import on_white, orientation_of, to_8_bit, to_srgb, upright
from mmref.data.container import Container, take_apart
from mmref.data.kinds import register_plugins
from mmref.errors import DecodersBusyError, PixelLimitError, SampleError

MAX_PIXELS = 200_000_000  # the largest photographs of phones; as RGB 600 MB
NO_PICTURES = {"EPS"}  # Pillow would run Ghostscript for it
FOREIGN = (  # beginnings of files that hold pictures for others: what they are, what to do
    (
        re.compile(rb"....ftyp(hei[cxms]|hev[cmxs]|mif1|msf1)", re.DOTALL),
        "HEIC (of phones), which nothing here decodes",
    ),
    (re.compile(rb"\xff\n|\0\0\0\x0cJXL "), "JPEG XL, which nothing here decodes"),
    (re.compile(rb"%PDF|%!PS|\s*<(svg|\?xml|!)"), "a drawing or a page, not pixels"),
)
# The name of a list entry in an AVIF: its orientation lies elsewhere, and a broken Exif would lose the picture.
AVIF_EXIF = re.compile(rb"(infe\x02.{7})Exif", re.DOTALL)
REDUCED = {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
SPARE = 2  # how much longer both sides of a picture are, decoded at a part of its size, than what is made of it
OPENCV_SIZES = (  # width and height in formats that OpenCV reads too
    re.compile(rb"PF\s(?P<width>\d+)\s(?P<height>\d+)\s"),
    re.compile(rb"P7\nWIDTH (?P<width>\d+)\nHEIGHT (?P<height>\d+)\n"),
    re.compile(rb"#\?R.{0,4000}?\n[-+]Y (?P<height>\d+) [-+]X (?P<width>\d+)\n", re.DOTALL),
)

# Sizes are checked here, before anything is decoded; Pillow's own check stays for images inside of images (icons).
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("ignore", module=r"PIL\b")  # of broken Exif and the like: what is broken is named


def calm_opencv() -> None:
    """Keep OpenCV to one thread, and silent, in a process of ours: its threads would fight with other processes over the cores,
    and SampleError names what is broken. A program that imports mmref keeps its own settings."""
    cv2.setNumThreads(0)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode_rgb(data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image to RGB in its own size: (H, W, 3) uint8. See `decoded`."""
    with decoded(data, name, max_pixels) as rgb:
        return rgb


@contextlib.contextmanager
def decoded(
    data: bytes,
    name: str = "image",
    max_pixels: int = MAX_PIXELS,
    patience_s: float | None = None,
    shrinks_to: tuple[int, int] | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """An image in RGB, transparent parts on white: (H, W, 3) uint8, in its own size unless `shrinks_to` is given. See
    `decode_pixels`.

    Within the block it counts among the pixels that are decoded at once (`mmref.data.budget`): make it small there, and
    decode no other.

    Args:
        patience_s: to wait for other images; None: as long as they take.
        shrinks_to: height and width that it is made afterwards, as in `decode_pixels`.

    Raises:
        DecodersBusyError: others are still being decoded. PixelLimitError, SampleError.
    """
    with Room(name, max_pixels, patience_s) as room:
        yield on_white(_pixels(data, name, room, shrinks_to))


def decode_pixels(
    data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS, shrinks_to: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Decode an image of any format that OpenCV or Pillow reads: (H, W) gray, (H, W, 3) RGB, or (H, W, 4) RGBA; uint8.

    Of several pictures in a file (animations, pages) the first is taken. Exif's orientation is applied. Colors of an embedded
    profile become sRGB. Values of 16 bits are divided by 257; see `to_8_bit` for floats and 32 bits. What a broken profile
    or broken Exif says is not known, and costs nothing.

    Args:
        shrinks_to: height and width (upright) that the picture is made afterwards. A JPEG of many times that size is then
            decoded at a half, quarter or eighth of its sides, which takes a fraction of the time. Both sides stay at least
            `SPARE` times as long as what is asked for.

    Raises:
        PixelLimitError: more than `max_pixels` pixels; nothing has been decoded.
        SampleError: the bytes are not a whole image.
    """
    with Room(name, max_pixels) as room:
        return _pixels(data, name, room, shrinks_to)


def image_format(data: bytes) -> str | None:
    """Pillow's name of the format by the file's header, as JPEG; None for what it does not know. Raises PixelLimitError."""
    container = take_apart(data)
    if container is not None:
        return {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[container.kind]
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.format
    except Image.DecompressionBombError as error:
        raise _bomb(error, "image") from None
    except Exception:  # Pillow raises many kinds; decoding says what is wrong
        return None


def webp(rgb: NDArray[np.uint8], longest: int, quality: int) -> bytes:
    """An image (H, W, 3) as WebP, whose longer side is at most `longest` pixels."""
    height, width = rgb.shape[:2]
    scale = min(1.0, longest / max(height, width))
    small = resize_rgb(rgb, max(1, round(height * scale)), max(1, round(width * scale)))
    _, data = cv2.imencode(".webp", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, quality])
    return data.tobytes()


def resize_rgb(rgb: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 -> (height, width, 3) uint8: averaged when it shrinks, bicubic when it grows."""
    if rgb.shape[:2] == (height, width):
        return rgb
    shrinks = rgb.shape[0] * rgb.shape[1] > height * width
    resized: Any = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return resized


def pillow_rgb(image: Image.Image, name: str = "image") -> NDArray[np.uint8]:
    """RGB of an image that Pillow opened, as `decode_rgb` gives it of the file: (H, W, 3) uint8. Raises SampleError."""
    try:
        return on_white(_pillow_pixels(image))
    except Exception as error:  # Pillow decodes now, and raises many kinds for broken bytes
        raise SampleError(f"{name}: does not decode: {_reason(error)}.") from None


def _pillow_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Upright 8-bit sRGB pixels of an image that Pillow opened: gray, RGB or RGBA."""
    image.load()  # turns a TIFF upright, and reads what lies behind the pixels
    icc, exif, mode = image.info.get("icc_profile"), image.info.get("exif"), image.mode
    if mode in ("I", "F") or mode.startswith("I;16"):
        values: NDArray[Any] = np.asarray(image)
        if mode == "I" and image.format == "PPM":  # Pillow's mode for 16 bits, scaled to them
            values = values.astype(np.uint16)
        pixels = to_8_bit(values)
    elif mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        pixels, icc = np.asarray(ImageCms.applyTransform(image, to_rgb)), None
    elif mode == "CMYK" and icc and (shown := to_srgb(np.asarray(image), icc, mode)).shape[2] == 3:
        pixels, icc = shown, None
    else:
        flat = "RGBA" if image.has_transparency_data else "L" if mode in ("1", "L") else "RGB"
        pixels = np.asarray(image.convert(flat))
    return upright(to_srgb(pixels, icc), exif)


def _pixels(data: bytes, name: str, room: Room, shrinks_to: tuple[int, int] | None) -> NDArray[np.uint8]:
    """As `decode_pixels`, once there is room."""
    if not data:
        raise SampleError(f"{name}: the image is empty (0 bytes).")
    try:
        return _decode(data, room, shrinks_to)
    except (SampleError, DecodersBusyError):
        raise
    except Image.DecompressionBombError as error:
        raise _bomb(error, name) from None
    except Exception as error:  # decoders raise every kind for broken bytes
        raise SampleError(f"{name}: does not decode ({len(data)} bytes): {_reason(error, data)}.") from None


def _decode(data: bytes, room: Room, shrinks_to: tuple[int, int] | None) -> NDArray[np.uint8]:
    container = take_apart(data)
    if container is None:
        register_plugins()
        data = AVIF_EXIF.sub(rb"\1free", data) if data[4:8] == b"ftyp" else data
    elif container.size is not None:
        room.take(*container.size)
        pixels = _opencv_container(container, _divisor(container, shrinks_to))
        if pixels is not None:
            return upright(to_srgb(pixels, container.icc), container.exif)
    try:
        with Image.open(io.BytesIO(data if container is None else container.data)) as image:
            room.take(*image.size)
            if image.format in NO_PICTURES:
                raise ValueError(f"{image.format} holds a drawing, not pixels")
            if container is not None:
                image.info.update(icc_profile=container.icc, exif=container.exif)
            # Pillow 13 wraps the brightest colors of a JPEG 2000 of 16 bits around to black.
            wraps = image.format == "JPEG2000" and image.mode in ("LA", "RGB", "RGBA")
            pixels = _opencv(data, cv2.IMREAD_UNCHANGED) if wraps else None
            return _pillow_pixels(image) if pixels is None else to_srgb(pixels, image.info.get("icc_profile"))
    except (PixelLimitError, DecodersBusyError):
        raise
    except Exception:
        pixels = None if container is not None else _opencv_alone(data, room)
        if pixels is None:
            raise
        return pixels


def _bomb(error: Image.DecompressionBombError, name: str) -> PixelLimitError:
    """Of Pillow's own limit, which is twice MAX_PIXELS: it tells how many pixels there are, not the sides."""
    (pixels, *_) = re.findall(r"\d+", str(error))
    return PixelLimitError(f"{name}: {int(pixels):,} pixels, more than are decoded: make it smaller.")


def _divisor(container: Container, shrinks_to: tuple[int, int] | None) -> int:
    """By what the sides of a picture may be divided while it is decoded: 1, 2, 4 or 8."""
    if shrinks_to is None or container.size is None or container.kind != "jpg":
        return 1
    width, height = container.size
    if orientation_of(container.exif) in (5, 6, 7, 8):  # it is turned by a quarter afterwards
        width, height = height, width
    ratio = min(height / shrinks_to[0], width / shrinks_to[1]) / SPARE
    return max((divisor for divisor in REDUCED if divisor <= ratio), default=1)


def _opencv_container(container: Container, divisor: int) -> NDArray[np.uint8] | None:
    """Pixels of a JPEG, PNG or WebP as it lies in the file, sides divided by `divisor`; None for what only Pillow gets right."""
    flags = cv2.IMREAD_UNCHANGED  # transparency and 16 bits
    if container.kind == "jpg":
        if b"\xff\xd9" not in container.data[-64:]:
            # OpenCV decodes a truncated JPEG to a picture with a gray rest; Pillow refuses it, and takes one whose
            # maker appended something behind the end marker.
            return None
        if container.channels == 4:
            return None  # a profile would be one of CMYK, and without one OpenCV's colors are others than of a TIFF
        # Of the two flags for a size the one for gray stays gray alone without IMREAD_ANYCOLOR.
        flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION | REDUCED.get(divisor, 0)
    pixels = _opencv(container.data, flags, container.gray_key)
    if pixels is None or divisor == 1 or container.size is None:
        return pixels
    return _stretched(pixels, container.size, divisor)


def _stretched(pixels: NDArray[np.uint8], size: tuple[int, int], divisor: int) -> NDArray[np.uint8]:
    """Where a side is no multiple of the divisor, the last row or column of a reduced picture lies partly beyond the edge of the
    whole one: the picture is stretched by that part of a pixel, or edges would lie elsewhere than in the whole one."""
    height, width = pixels.shape[:2]
    across, down = size[0] / divisor / width, size[1] / divisor / height
    if across == down == 1:
        return pixels
    # Positions are those of the centers of pixels, so that the left and upper edges stay where they are.
    back = np.array([[across, 0, (across - 1) / 2], [0, down, (down - 1) / 2]])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    stretched: Any = cv2.warpAffine(pixels, back, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    return stretched


def _opencv(data: bytes, flags: int, gray_key: tuple[int, int] | None = None) -> NDArray[np.uint8] | None:
    """What OpenCV decodes, in 8 bits and RGB order; None where it refuses.

    Args:
        gray_key: the value of a gray image that is transparent, and the largest value of its depth.
    """
    try:
        read: Any = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:
        return None
    if read is None:
        return None
    pixels = to_8_bit(read)
    if pixels.ndim == 2 and gray_key is not None:
        value, largest = gray_key
        shown = (read != value * (np.iinfo(read.dtype).max // largest)).astype(np.uint8) * 255
        pixels = np.dstack([pixels, shown])
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] == 2:  # gray + alpha
        return np.dstack([pixels[..., :1]] * 3 + [pixels[..., 1:]])
    order = cv2.COLOR_BGR2RGB if pixels.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
    for top in range(0, len(pixels), 256):  # in place: a copy of a large picture is large
        cv2.cvtColor(pixels[top : top + 256], order, dst=pixels[top : top + 256])
    return pixels


def _opencv_alone(data: bytes, room: Room) -> NDArray[np.uint8] | None:
    """Pixels of what Pillow does not read and OpenCV may; None where it refuses too."""
    try:
        size = _declared_size(data)
    except Exception:  # a header that Pillow stumbled over before
        size = None
    if size is None:
        return None
    room.take(*size)
    return _opencv(data, cv2.IMREAD_UNCHANGED)


def _declared_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) that a file which Pillow cannot read says of itself, where OpenCV may: floats in color, Radiance, PAM."""
    for pattern in OPENCV_SIZES:
        if found := pattern.match(data):
            return int(found["width"]), int(found["height"])
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    directory = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    file = io.BytesIO(data)
    file.seek(directory.next)
    directory.load(file)
    return int(directory[TiffImagePlugin.IMAGEWIDTH]), int(directory[TiffImagePlugin.IMAGELENGTH])


def _reason(error: Exception, data: bytes = b"") -> str:
    """What is wrong, in the same words every time: descriptions of broken images are counted as a set."""
    for begin, what in FOREIGN:
        if begin.match(data):
            return f"it is {what}: convert it to JPEG or PNG"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", str(error)).strip().rstrip(".")
    return text or type(error).__name__
