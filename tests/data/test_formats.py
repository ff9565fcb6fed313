"""One picture in every container, depth, mode, profile and orientation: decoded, stored in a shard, resized, and as a query."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms, features

from mmref.data.colors import on_white, to_8_bit
from mmref.data.decode import MAX_PIXELS, decode_pixels, decode_rgb, image_format
from mmref.data.fit import Fit
from mmref.errors import PixelLimitError, SampleError
from mmref.export.model import read_image
from mmref.retrieval.service.answering import FORMATS, decode_query
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.problems import Refused
from mmref.shards.tar_writer import ImageOptions, prepare_image

HEIGHT, WIDTH = 48, 64
ORIENTATION = 0x112


def color() -> np.ndarray:
    """Red rises to the right, green downwards; the upper left corner is dark red, so that turned pictures show."""
    down, right = np.mgrid[0:HEIGHT, 0:WIDTH]
    rgb = np.stack([right * 4, down * 5, np.full_like(down, 90)], axis=-1).astype(np.uint8)
    rgb[:16, :16] = [160, 20, 30]
    return rgb


RGB = color()
GRAY = np.asarray(Image.fromarray(RGB).convert("L"))
BILEVEL = np.where(GRAY > 100, 255, 0).astype(np.uint8)
ALPHA = np.broadcast_to(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, WIDTH)).copy()
PALETTE = Image.fromarray(RGB).quantize(256)
SHOWN = (RGB * (ALPHA / 255)[..., None] + 255 * (1 - ALPHA / 255)[..., None]).round()


def pil(image: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    if form == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, form, **options)
    return file.getvalue()


def opencv(pixels: np.ndarray, ending: str) -> bytes:
    if pixels.ndim == 3:
        pixels = np.ascontiguousarray(pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]])
    return cv2.imencode(ending, pixels)[1].tobytes()


def lab() -> Image.Image:
    srgb, target = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(Image.fromarray(RGB), srgb, target, outputMode="LAB")


def mode(name: str) -> Image.Image:
    return Image.fromarray(RGB).convert(name)


def rgba() -> np.ndarray:
    return np.dstack([RGB, ALPHA])


def frames(form: str, **options: Any) -> bytes:
    """The picture, and then another one."""
    return pil(RGB, form, save_all=True, append_images=[Image.fromarray(255 - RGB)], **options)


def raw_tiff(values: np.ndarray) -> bytes:
    """A TIFF of 16 bits in the order of large computers."""
    return pil(Image.frombytes("I;16B", (WIDTH, HEIGHT), values.astype(">u2").tobytes()), "TIFF")


wide = RGB.astype(np.uint16) * 257
wide_gray = GRAY.astype(np.uint16) * 257
# name: (bytes, the picture, largest and mean difference)
FILES: dict[str, tuple[Callable[[], bytes], np.ndarray, float, float]] = {
    "jpeg": (lambda: pil(RGB, "JPEG", quality=95, subsampling=0), RGB, 12, 2),
    "progressive jpeg": (lambda: pil(RGB, "JPEG", quality=95, subsampling=0, progressive=True), RGB, 12, 2),
    "gray jpeg": (lambda: pil(GRAY, "JPEG", quality=95), GRAY, 8, 2),
    "cmyk jpeg": (lambda: pil(mode("CMYK"), "JPEG", quality=95), RGB, 40, 4),
    "mpo": (lambda: frames("MPO", quality=95, subsampling=0), RGB, 80, 4),
    "png": (lambda: pil(RGB, "PNG"), RGB, 0, 0),
    "gray png": (lambda: pil(GRAY, "PNG"), GRAY, 0, 0),
    "1-bit png": (lambda: pil(Image.fromarray(BILEVEL).convert("1"), "PNG"), BILEVEL, 0, 0),
    "palette png": (lambda: pil(PALETTE, "PNG"), np.asarray(PALETTE.convert("RGB")), 0, 0),
    "rgba png": (lambda: pil(rgba(), "PNG"), SHOWN, 1, 1),
    "16-bit gray png": (lambda: pil(Image.fromarray(wide_gray), "PNG"), GRAY, 0, 0),
    "16-bit png": (lambda: opencv(wide, ".png"), RGB, 0, 0),
    "16-bit rgba png": (lambda: opencv(rgba().astype(np.uint16) * 257, ".png"), SHOWN, 1, 1),
    "animated png": (lambda: frames("PNG"), RGB, 0, 0),
    "webp": (lambda: pil(RGB, "WEBP", lossless=True), RGB, 0, 0),
    "rgba webp": (lambda: pil(rgba(), "WEBP", lossless=True, exact=True), SHOWN, 1, 1),
    "animated webp": (lambda: frames("WEBP", lossless=True), RGB, 0, 0),
    "tiff": (lambda: pil(RGB, "TIFF"), RGB, 0, 0),
    "packed tiff": (lambda: pil(RGB, "TIFF", compression="tiff_lzw"), RGB, 0, 0),
    "tiff of pages": (lambda: frames("TIFF"), RGB, 0, 0),
    "1-bit tiff": (lambda: pil(Image.fromarray(BILEVEL).convert("1"), "TIFF", compression="group4"), BILEVEL, 0, 0),
    "palette tiff": (lambda: pil(PALETTE, "TIFF"), np.asarray(PALETTE.convert("RGB")), 0, 0),
    "gray and alpha tiff": (lambda: pil(mode("LA"), "TIFF"), GRAY, 0, 0),
    "rgba tiff": (lambda: pil(rgba(), "TIFF"), SHOWN, 1, 1),
    "cmyk tiff": (lambda: pil(mode("CMYK"), "TIFF"), RGB, 2, 1),
    "ycbcr tiff": (lambda: pil(mode("YCbCr"), "TIFF"), RGB, 3, 2),
    "lab tiff": (lambda: pil(lab(), "TIFF"), RGB, 40, 3),
    "16-bit gray tiff": (lambda: pil(Image.fromarray(wide_gray), "TIFF"), GRAY, 0, 0),
    "16-bit gray tiff, big end first": (lambda: raw_tiff(wide_gray), GRAY, 0, 0),
    "16-bit tiff": (lambda: opencv(wide, ".tiff"), RGB, 1, 1),
    "signed 16-bit tiff": (
        lambda: opencv((GRAY.astype(np.int32) * 32767 // 255).astype(np.int16), ".tiff"),
        GRAY,
        1,
        1,
    ),
    "32-bit tiff": (lambda: pil(wide_gray.astype(np.int32), "TIFF"), GRAY, 1, 1),
    "float tiff, 0 to 1": (lambda: pil(GRAY.astype(np.float32) / 255, "TIFF"), GRAY, 1, 1),
    "float tiff, 0 to 255": (lambda: pil(GRAY.astype(np.float32), "TIFF"), GRAY, 1, 1),
    "float tiff in color": (lambda: opencv(RGB.astype(np.float32) / 255, ".tiff"), RGB, 1, 1),
    "double tiff in color": (lambda: opencv(RGB / 255, ".tiff"), RGB, 1, 1),
    "radiance": (lambda: opencv(RGB.astype(np.float32) / 255, ".hdr"), RGB, 4, 2),
    "gray pfm": (lambda: pil(Image.fromarray(GRAY.astype(np.float32) / 255), "PPM"), GRAY, 1, 1),
    "pfm": (lambda: opencv(RGB.astype(np.float32) / 255, ".pfm"), RGB, 1, 1),
    "pam": (lambda: opencv(RGB, ".pam"), RGB, 0, 0),
    "ppm": (lambda: pil(RGB, "PPM"), RGB, 0, 0),
    "16-bit pgm": (lambda: b"P5 64 48 65535 " + wide_gray.astype(">u2").tobytes(), GRAY, 0, 0),
    "dark 16-bit pgm": (lambda: b"P5 64 48 65535 " + np.full((48, 64), 200, ">u2").tobytes(), GRAY * 0, 0, 0),
    "bmp": (lambda: pil(RGB, "BMP"), RGB, 0, 0),
    "palette bmp": (lambda: pil(PALETTE, "BMP"), np.asarray(PALETTE.convert("RGB")), 0, 0),
    "1-bit bmp": (lambda: pil(Image.fromarray(BILEVEL).convert("1"), "BMP"), BILEVEL, 0, 0),
    "tga": (lambda: pil(RGB, "TGA"), RGB, 0, 0),
    "rgba tga": (lambda: pil(rgba(), "TGA"), SHOWN, 1, 1),
    "ico": (lambda: pil(RGB, "ICO", sizes=[(WIDTH, HEIGHT)]), RGB, 0, 0),
    "qoi": (lambda: pil(RGB, "QOI"), RGB, 0, 0),
    "sgi": (lambda: pil(RGB, "SGI"), RGB, 0, 0),
    "dds": (lambda: pil(RGB, "DDS"), RGB, 0, 0),
    "gif": (lambda: pil(PALETTE, "GIF"), np.asarray(PALETTE.convert("RGB")), 0, 0),
    "gray gif": (lambda: pil(GRAY, "GIF"), GRAY, 0, 0),
    "animated gif": (lambda: pil(GRAY, "GIF", save_all=True, append_images=[Image.fromarray(255 - GRAY)]), GRAY, 0, 0),
    "jpeg 2000": (lambda: pil(RGB, "JPEG2000"), RGB, 0, 0),
    "16-bit jpeg 2000": (lambda: opencv(wide, ".jp2"), RGB, 1, 1),
    "16-bit gray jpeg 2000": (lambda: opencv(wide_gray, ".jp2"), GRAY, 1, 1),
    "avif": (lambda: pil(RGB, "AVIF", quality=100, subsampling="4:4:4"), RGB, 14, 2),
}


def distance(found: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    wanted = wanted if wanted.ndim == 3 else np.dstack([wanted] * 3)
    assert found.dtype == np.uint8 and found.shape == wanted.shape
    difference = np.abs(found.astype(float) - wanted)
    return difference.max(), difference.mean()


@pytest.mark.parametrize("kind", FILES)
def test_a_picture_is_the_same_in_every_file(kind):
    make, wanted, largest, mean = FILES[kind]
    data = make()
    pixels = decode_rgb(data)
    assert distance(pixels, wanted) <= (largest, max(mean, largest))
    assert distance(pixels, wanted)[1] <= mean
    stored, ext = prepare_image(data, ImageOptions())
    assert image_format(stored) == {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[ext]
    if ext == "jpg":  # a lossy format that a shard does not hold is encoded again
        assert distance(decode_rgb(stored), pixels)[1] <= 2
    else:
        assert np.array_equal(decode_rgb(stored), pixels)
    small, _ = prepare_image(data, ImageOptions(resize_to_px=24))
    half = np.asarray(Image.fromarray(pixels).resize((32, 24), Image.Resampling.BICUBIC))
    assert distance(decode_rgb(small), half)[1] <= 4
    if image_format(data) in FORMATS:
        assert np.array_equal(decode_query(data, Limits(pixels=10_000), Fit(*pixels.shape[:2])), pixels)
    if image_format(data) not in (None, "JPEG2000"):
        with Image.open(io.BytesIO(data)) as image:
            assert distance(read_image(image, Fit(HEIGHT, WIDTH), "query"), pixels)[0] <= 2


STORED = {  # what a camera held in each way writes, of the upright picture
    1: lambda p: p, 2: lambda p: p[:, ::-1], 3: lambda p: p[::-1, ::-1], 4: lambda p: p[::-1], 5: lambda p: p.swapaxes(0, 1),
    6: np.rot90, 7: lambda p: p[::-1, ::-1].swapaxes(0, 1), 8: lambda p: np.rot90(p, -1),
}  # fmt: skip
TURNED = {"JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {},
          "AVIF": {"quality": 100, "subsampling": "4:4:4"}}  # fmt: skip


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", TURNED)
def test_pictures_are_upright_in_every_file(form, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = pil(np.ascontiguousarray(STORED[orientation](RGB)), form, exif=exif, **TURNED[form])
    pixels = decode_rgb(data)
    assert distance(pixels, RGB)[1] <= 2
    assert distance(decode_rgb(prepare_image(data, ImageOptions())[0]), pixels)[1] <= 2
    half = np.asarray(Image.fromarray(pixels).resize((32, 24), Image.Resampling.BICUBIC))
    assert distance(decode_rgb(prepare_image(data, ImageOptions(resize_to_px=24))[0]), half)[1] <= 4
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(read_image(image, Fit(HEIGHT, WIDTH), "query"), pixels)


def swapping_profile() -> bytes:
    """A color profile whose red is the blue of sRGB."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("form", TURNED)
@pytest.mark.parametrize("channels", ["RGB", "RGBA"])
def test_colors_of_a_profile_become_srgb(form, channels):
    if form == "JPEG" and channels == "RGBA":
        pytest.skip("a JPEG has no alpha")
    image = Image.fromarray(RGB if channels == "RGB" else rgba())
    red, green, blue, *alpha = image.split()
    swapped = Image.merge(channels, [blue, green, red, *alpha])
    data = pil(swapped, form, icc_profile=swapping_profile(), **TURNED[form])
    pixels = decode_rgb(data)
    assert distance(pixels, RGB if channels == "RGB" else SHOWN)[1] <= 2
    assert distance(decode_rgb(prepare_image(data, ImageOptions())[0]), pixels)[1] <= 2
    half = np.asarray(Image.fromarray(pixels).resize((32, 24), Image.Resampling.BICUBIC))
    assert distance(decode_rgb(prepare_image(data, ImageOptions(resize_to_px=24))[0]), half)[1] <= 4
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(read_image(opened, Fit(HEIGHT, WIDTH), "query"), pixels)


@pytest.mark.parametrize("profile", [b"broken", bytes(1_500_000), "sRGB", "gray picture"])
@pytest.mark.parametrize("form", TURNED)
def test_a_profile_that_tells_nothing_changes_nothing(form, profile):
    pixels = GRAY if profile == "gray picture" else RGB
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    icc = srgb if isinstance(profile, str) else profile
    plain = decode_rgb(pil(pixels, form, icc_profile=b"", **TURNED[form]))
    assert np.array_equal(decode_rgb(pil(pixels, form, icc_profile=icc, **TURNED[form])), plain)


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize(
    "between",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"{} " * 1_000_000)),
        chunk(b"tEXt", b"Comment\0" + b"x" * 5_000_000),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x/>" * 20_000_000)),
        chunk(b"iCCP", b"scanner\0\0" + zlib.compress(bytes(70_000_000))),
        chunk(b"iCCP", b"no end"),
        chunk(b"tEXt", b"checksum\0wrong")[:-1] + b"!",
        chunk(b"pHYs", b"short"),
        chunk(b"eXIf", b"nonsense"),
        chunk(b"acTL", struct.pack(">II", 0, 0)),
    ],
    ids=["text", "long text", "xmp", "profile", "broken profile", "checksum", "short", "exif", "animation"],
)
def test_what_is_beside_the_pixels_of_a_png_costs_nothing(between):
    data = pil(RGB, "PNG")
    data = data[:33] + between + data[33:]
    assert np.array_equal(decode_rgb(data), RGB)
    assert prepare_image(data, ImageOptions()) == (data, "png")
    assert np.array_equal(decode_query(data, Limits(pixels=10_000), Fit(HEIGHT, WIDTH)), RGB)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize("at, broken", [(0, b"nonsense"), (4, b"\x7f\xff\xff\xff"), (8, b"\xff\xff"), (10, b"\xff" * 20)])
def test_broken_exif_costs_nothing(form, at, broken):
    exif = Image.Exif()
    exif[0x132] = "2020:01:01 00:00:00"
    data = pil(RGB, form, exif=exif, **TURNED[form])
    begin = data.index(b"MM\0*") + at
    data = data[:begin] + broken + data[begin + len(broken) :]
    assert distance(decode_rgb(data), RGB)[1] <= 2
    assert distance(decode_rgb(prepare_image(data, ImageOptions(resize_to_px=24))[0]), RGB[1::2, 1::2])[1] <= 6


@pytest.mark.parametrize("bits, values", [(1, 2), (2, 4), (4, 16), (8, 256), (16, 65536)])
def test_a_gray_png_with_one_transparent_value(bits, values):
    row = np.linspace(0, values - 1, 8).astype(int)
    packed = int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(bits, "big")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 1, bits, 0, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"tRNS", struct.pack(">H", row[2]))
    data += chunk(b"IDAT", zlib.compress(b"\0" + packed)) + chunk(b"IEND", b"")
    wanted = np.where(row == row[2], 255, (row * 255 / (values - 1)).astype(int))
    assert np.abs(decode_rgb(data)[0, :, 0].astype(int) - wanted).max() <= 1


def test_alpha_is_rounded_as_with_floats():
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    share = alpha.astype(np.float32) / 255
    wanted = np.round(value * share + 255 * (1 - share))
    found = on_white(np.stack([value, value, value, alpha], axis=-1).astype(np.uint8))
    assert np.array_equal(found, np.repeat(wanted[..., None], 3, axis=-1))


def test_values_of_other_ranges():
    ramp = np.linspace(0, 1, 512).reshape(1, 512)
    wanted = np.round(ramp * 255)
    for values in (
        ramp * 2 - 1,
        ramp * 1e6,
        (ramp * 4e9).astype(np.uint32),
        ramp * 1.3,
        ramp.astype(np.float16),
        ramp * 32767,
    ):
        assert np.abs(to_8_bit(values) - wanted).max() <= 1, values.max()
    assert np.abs(to_8_bit(ramp / 4) - wanted / 4).max() <= 1, "dark stays dark"
    odd = np.array([[np.nan, 0.0, 1.0, np.inf]], np.float32)
    assert to_8_bit(odd).tolist() == [[0, 0, 255, 0]]
    assert to_8_bit(np.full((2, 2), np.nan)).tolist() == [[0, 0], [0, 0]] == to_8_bit(np.full((2, 2), -7.0)).tolist()
    assert to_8_bit(np.array([[False, True]])).tolist() == [[0, 255]]


# -- what is not decoded ----------------------------------------------------------------------------------------------


def huge(side: int) -> dict[str, bytes]:
    """Small files that say they are side x side."""
    gif = bytearray(pil(GRAY, "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp = bytearray(pil(RGB, "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    tiff = bytearray(pil(GRAY, "TIFF"))
    for tag in (0x100, 0x101):
        at = tiff.index(struct.pack("<HHI", tag, 4, 1)) + 8
        tiff[at : at + 4] = struct.pack("<I", side)
    jpeg = bytearray(pil(GRAY, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", side, side)
    bits = (side - 1) | (side - 1) << 14 | 1 << 28
    webp = b"WEBPVP8L" + struct.pack("<I", 14) + b"\x2f" + struct.pack("<I", bits & 0xFFFFFFFF) + bytes(9)
    return {
        "png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)) + bytes(40),
        "jpeg": bytes(jpeg), "gif": bytes(gif), "bmp": bytes(bmp), "tiff": bytes(tiff),
        "webp": b"RIFF" + struct.pack("<I", len(webp)) + webp,
        "radiance": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y %d +X %d\n" % (side, side) + bytes(40),
        "pfm": b"PF\n%d %d\n-1\n" % (side, side) + bytes(40),
    }  # fmt: skip


@pytest.mark.parametrize("kind", huge(100))
@pytest.mark.parametrize("side", [16_000, 24_000])
def test_a_picture_of_too_many_pixels_is_not_decoded(kind, side, monkeypatch):
    if kind == "webp" and side > 1 << 14:
        pytest.skip("no WebP is so large")
    data = huge(side)[kind]
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("it was decoded"))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(PixelLimitError, match=rf"^photo 7: ({side} x {side}|{side**2:,}) pixels, more than .*: make it smaller"):
        decode_rgb(data, "photo 7")
    with pytest.raises(PixelLimitError, match="pixels"):
        prepare_image(data, ImageOptions(resize_to_px=32))
    if kind not in ("radiance", "pfm"):
        with pytest.raises(Refused) as refused:
            decode_query(data, Limits(), Fit(32, 32))
        assert (refused.value.problem.status, refused.value.problem.error) == (413, "ImageTooLarge")


@pytest.mark.parametrize("begin, part", [(b"\xff\xd8\xff", b"\xff"), (b"\x89PNG\r\n\x1a\n", chunk(b"tEXt", b"")),
                                         (b"RIFF\0\0\0\0WEBP", b"none\0\0\0\0"), (b"<?xml", b"<!---->")])  # fmt: skip
def test_a_file_of_countless_parts_is_given_up(begin, part):
    with pytest.raises(SampleError, match=r"^here: does not decode"):
        decode_rgb(begin + part * 300_000, "here")


def test_the_limit_is_the_callers():
    data = pil(RGB, "PNG")
    assert decode_rgb(data, max_pixels=WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(PixelLimitError, match="64 x 48 pixels, more than the 3,071 that are decoded"):
        decode_rgb(data, max_pixels=WIDTH * HEIGHT - 1)
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


@pytest.mark.parametrize(
    "data, said",
    [
        (b"\0\0\0\x18ftypheic" + bytes(400), "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40), "HEIC"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"%PDF-1.7\n" + bytes(40), "a drawing"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a drawing"),
        (b'<?xml version="1.0"?>\n<!-- made by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>', "a drawing"),
    ],
)
def test_files_that_nothing_here_decodes_are_told_by_name(data, said):
    with pytest.raises(SampleError, match=rf"^here: .*it is {said}.*: convert it to JPEG or PNG"):
        decode_rgb(data, "here")


@pytest.mark.parametrize("kind", ["AVIF", "BLP", "TIFF", "GIF", "JPEG2000", "ICO", "TGA", "DDS", "PCX"])
def test_whatever_is_broken_in_a_file_it_is_named(kind):
    data = pil(PALETTE if kind == "BLP" else RGB, kind)
    random = np.random.default_rng(0)
    broken = [data[: len(data) * share // 100] for share in (2, 30, 60, 90)]
    for _ in range(40):
        bent = np.frombuffer(data, np.uint8).copy()
        bent[random.integers(0, min(len(bent), 300), 6)] = random.integers(0, 256, 6)
        broken.append(bent.tobytes())
    refused = 0
    for number, bytes_ in enumerate(broken):
        try:
            assert decode_rgb(bytes_, "here").ndim == 3
        except SampleError as error:
            assert str(error).startswith("here: ") and " at 0x" not in str(error)
            refused += 1
        assert number != 3 or refused == 4, "none that was cut short is taken for a whole one"


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("deep"), OverflowError("large"), struct.error("short"),
                                   NotImplementedError("of <_io.BytesIO object at 0x7f00>"), KeyError(7)])  # fmt: skip
def test_whatever_a_decoder_raises_costs_one_image(error, monkeypatch):
    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(SampleError, match=r"^here: does not decode \(\d+ bytes\): .") as raised:
        decode_pixels(pil(RGB, "BMP"), "here")
    assert "0x" not in str(raised.value)
