"""Image bytes to pixels: formats, colour modes and transparency against Pillow; what is broken is named."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from mmref.data.decode import decode_pixels, decoded
from mmref.data.fit import Fit
from mmref.errors import SampleError

SIDE = 32
RAMP = np.linspace(0, 255, SIDE).astype(np.uint8)


def picture() -> Image.Image:
    """Red rises downwards, green to the right: turned or swapped channels show."""
    red, green = np.broadcast_arrays(RAMP[:, None], RAMP[None, :])
    return Image.fromarray(np.stack([red, green, np.full_like(red, 90)], axis=-1))


def with_alpha(mode: str) -> Image.Image:
    image = picture().convert(mode[:-1])
    image.putalpha(Image.fromarray(np.broadcast_to(RAMP[None, :], (SIDE, SIDE)).copy()))
    return image


def encode(image: Image.Image, form: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def on_white(data: bytes) -> np.ndarray:
    """What Pillow shows of the bytes on a white page: (H, W, 3) int."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGBA")
    page = Image.new("RGBA", image.size, (255, 255, 255, 255))
    page.alpha_composite(image)
    return np.asarray(page.convert("RGB")).astype(int)


ENCODED = {
    "jpeg": lambda: encode(picture(), "JPEG", quality=95),
    "progressive jpeg": lambda: encode(picture(), "JPEG", progressive=True),
    "png": lambda: encode(picture(), "PNG"),
    "webp": lambda: encode(picture(), "WEBP", lossless=True),
    "grey jpeg": lambda: encode(picture().convert("L"), "JPEG"),
    "grey png": lambda: encode(picture().convert("L"), "PNG"),
    "grey and alpha": lambda: encode(with_alpha("LA"), "PNG"),
    "rgba png": lambda: encode(with_alpha("RGBA"), "PNG"),
    "rgba webp": lambda: encode(with_alpha("RGBA"), "WEBP", lossless=True),
    "palette": lambda: encode(picture().quantize(16), "PNG"),
    "palette, one transparent": lambda: encode(picture().quantize(16), "PNG", transparency=3),
    "palette with alphas": lambda: encode(picture().quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "gif": lambda: encode(picture(), "GIF"),
    "cmyk jpeg": lambda: encode(picture().convert("CMYK"), "JPEG", quality=95),
    "1 bit": lambda: encode(picture().convert("1"), "PNG"),
}


@pytest.mark.parametrize("kind", ENCODED)
def test_colours_are_those_of_pillow(kind):
    data = ENCODED[kind]()
    pixels = Fit(SIDE, SIDE).decode(data)
    assert pixels.shape == (SIDE, SIDE, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels - on_white(data)).max() <= 2


@pytest.mark.parametrize("kind", ["rgba png", "grey and alpha", "rgba webp"])
def test_transparent_is_white(kind):
    assert (Fit(SIDE, SIDE).decode(ENCODED[kind]())[:, 0] == 255).all()


def test_16_bit_images_keep_their_range():
    grey = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    pixels = Fit(SIDE, SIDE).decode(encode(Image.fromarray(grey), "PNG"))
    assert np.abs(pixels - grey[..., None] / 257).max() <= 1
    colour = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, 3), dtype=np.uint16)
    pixels = Fit(SIDE, SIDE).decode(cv2.imencode(".png", colour[..., ::-1])[1].tobytes())
    assert np.abs(pixels - colour / 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    data = encode(picture(), "JPEG", quality=95, exif=exif)
    assert np.abs(Fit(SIDE, SIDE).decode(data) - on_white(data)).max() <= 3


@pytest.mark.parametrize("height, width", [(16, 8), (64, 48), (SIDE, SIDE)])
def test_size_is_height_by_width(height, width):
    pixels = Fit(height, width).decode(ENCODED["png"]())
    assert pixels.shape == (height, width, 3)
    expected = np.asarray(picture().resize((width, height), Image.Resampling.BOX)).astype(int)
    assert np.abs(pixels - expected).max() <= 20, "red still rises downwards and green to the right"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_truncated_images_are_named(form, share):
    noise = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), form)
    cut = int(len(data) * share)
    with pytest.raises(SampleError, match=rf"shard.tar:cat 7: .*{cut} bytes"):
        Fit(SIDE, SIDE).decode(data[:cut], "shard.tar:cat 7")


@pytest.mark.parametrize("data", [b"", b"a red circle\n", b"\0" * 300, b"\xff\xd8", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_is_named_and_described_alike_every_time(data):
    said = set()
    for _ in range(3):
        with pytest.raises(SampleError, match=rf"^here: .*{len(data)} bytes") as raised:
            Fit(SIDE, SIDE).decode(data, "here")
        said.add(str(raised.value))
    assert len(said) == 1 and "object at 0x" not in said.pop(), "descriptions are counted as a set"


def test_a_jpeg_with_something_behind_its_end_is_read():
    data = ENCODED["jpeg"]() + b"maker's notes" * 20
    assert np.abs(Fit(SIDE, SIDE).decode(data) - on_white(data)).max() <= 2


def test_an_image_of_the_swapped_size_is_resized():
    lying = picture().resize((2 * SIDE, SIDE))
    assert Fit(2 * SIDE, SIDE).decode(encode(lying, "PNG")).shape == (2 * SIDE, SIDE, 3)


# -- reduced scale ---------------------------------------------------------------------------------------------------


def photograph(width: int, height: int) -> Image.Image:
    """Soft shapes and hard edges, so that a shift of a part of a pixel shows."""
    y, x = np.mgrid[:height, :width]
    waves = 127 + 60 * np.sin(x / 23) + 60 * np.cos(y / 31)
    edges = np.where((x // 61 + y // 47) % 2, 230, 25)
    return Image.fromarray(np.stack([waves, edges, (waves + edges) / 2], axis=-1).clip(0, 255).astype(np.uint8))


def apart(data: bytes, fit: Fit) -> tuple[int, float]:
    """Largest and mean difference that decoding at a part of the size makes."""
    with decoded(data) as whole:
        difference = np.abs(fit(whole).astype(int) - fit.decode(data))
    return int(difference.max()), float(difference.mean())


@pytest.mark.parametrize(("width", "height"), [(1024, 768), (1023, 769), (1021, 763), (513, 1031)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_large_jpeg_is_decoded_at_a_part_of_its_size(width: int, height: int, mode: str) -> None:
    data = encode(photograph(width, height).convert(mode), "JPEG", quality=95)
    fit = Fit(64, 48)
    pixels = decode_pixels(data, shrinks_to=(64, 48))
    divisor = 8 if width > 1000 and height > 1024 else 4
    assert pixels.shape[:2] == (-(-height // divisor), -(-width // divisor)) and (pixels.ndim == 2) == (mode == "L")
    largest, mean = apart(data, fit)
    assert largest <= 16 and mean <= 1.6


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sides_are_those_of_the_upright_picture(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(803, 401), "JPEG", quality=95, exif=exif)
    wide = orientation < 5  # as it is seen
    pixels = decode_pixels(data, shrinks_to=(25, 50) if wide else (50, 25))
    assert pixels.shape[:2] == ((51, 101) if wide else (101, 51))
    assert decode_pixels(data, shrinks_to=(50, 25) if wide else (25, 50)).shape[:2] == ((101, 201) if wide else (201, 101))
    largest, mean = apart(data, Fit(25, 50) if wide else Fit(50, 25))
    assert largest <= 40 and mean <= 3  # a cell of the pattern is four pixels wide


def test_what_is_not_many_times_as_large_stays_bit_for_bit() -> None:
    small, large = photograph(255, 255), photograph(1024, 768)
    for data in (
        encode(small, "JPEG"),
        encode(large, "PNG"),
        encode(large, "WEBP"),
        encode(large.convert("CMYK"), "JPEG"),
        encode(large, "TIFF"),
        encode(large, "JPEG") + b"appended by a camera" * 9,
    ):
        assert apart(data, Fit(64, 64)) == (0, 0)
    data = encode(large, "JPEG")
    assert apart(data, Fit(64, 64, "stretch")) == (0, 0), "as transformers' processors have it"
    assert apart(data, Fit(193, 64)) == (0, 0), "one side is not long enough"
    with pytest.raises(SampleError, match="does not decode"):
        decode_pixels(data[: len(data) // 2], shrinks_to=(64, 64))
