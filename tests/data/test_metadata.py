"""Files without their metadata: the picture stays as it is, to the last bit; nothing else does."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from mmref.data.container import take_apart
from mmref.data.decode import decode_rgb
from mmref.data.metadata import without_metadata

SECRETS = (b"SECRET", b"Canon", b"GPS-IS-HERE", b"photoshop", b"xmpmeta")
XMP = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta>SECRET photoshop</x:xmpmeta>"


def picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((96, 64)).convert(mode)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x010E] = orientation, "Canon", "SECRET"
    tags.get_ifd(0x8825)[1] = "GPS-IS-HERE"
    return tags.tobytes()


def profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(form: str, image: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, form, **options)
    return file.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def jpegs(orientation: int) -> dict[str, bytes]:
    found = {}
    for name, more in (
        ("baseline", {}),
        ("progressive", {"progressive": True}),
        ("restarts", {"restart_marker_rows": 1}),
    ):
        data = saved("JPEG", exif=exif(orientation), icc_profile=profile(), comment=b"SECRET", **more)
        scan = data.index(b"\xff\xda")
        texts = segment(0xE1, XMP) + segment(0xED, b"Photoshop 3.0\0SECRET") + segment(0xEC, b"SECRET")
        preview = segment(0xE0, b"JFXX\0\x10SECRET") + segment(0xE2, b"MPF\0SECRET")
        found[name] = data[:scan] + texts + preview + data[scan:] + saved("JPEG", comment=b"SECRET") + b"SECRET"
    found["cmyk"] = saved("JPEG", picture("CMYK"), exif=exif(orientation))
    thumb = b"JFIF\0\1\1\0\0\1\0\1\2\1SECRET"
    data = saved("JPEG", exif=exif(orientation))
    found["thumbnail"] = data[:2] + segment(0xE0, thumb) + data[20:]
    return found


def pngs(orientation: int) -> dict[str, bytes]:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "SECRET")
    info.add_text("Software", "photoshop " * 100, zip=True)
    info.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta>SECRET</x:xmpmeta>")
    found = {
        mode: saved("PNG", picture(mode), pnginfo=info, exif=exif(orientation), icc_profile=profile() if mode == "RGB" else None)
        for mode in ("RGB", "RGBA", "L", "P", "1")
    }
    data = found["RGB"]
    found["private"] = data[:-12] + chunk(b"prVt", b"SECRET") + chunk(b"tIME", b"SECRET!") + data[-12:] + b"SECRET"
    return found


def webps(orientation: int) -> dict[str, bytes]:
    more = {"exif": exif(orientation), "xmp": b"<x:xmpmeta>SECRET</x:xmpmeta>"}
    found = {
        "lossy": saved("WEBP", icc_profile=profile(), **more),
        "lossless": saved("WEBP", lossless=True, **more),
        "transparent": saved("WEBP", picture("RGBA"), **more),
        "plain": saved("WEBP") + b"SECRET",
    }
    return found if orientation != 1 else found | {"moving": moving("WEBP", **more)}


def moving(form: str, **more: Any) -> bytes:
    frames = [picture(), picture().rotate(180), picture().rotate(90)]
    return saved(form, frames[0], save_all=True, append_images=frames[1:], duration=[40, 80, 120], loop=3, **more)


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", [jpegs, pngs, webps])
def test_the_picture_stays_and_nothing_else(kind: Any, orientation: int) -> None:
    for name, data in kind(orientation).items():
        assert any(secret in data for secret in SECRETS), name
        clean = without_metadata(data)
        assert clean is not None and not [s for s in SECRETS if s in clean], name
        np.testing.assert_array_equal(decode_rgb(clean), decode_rgb(data), err_msg=name)
        before, after = take_apart(data), take_apart(clean)
        assert before and after and after.icc == before.icc, name
        with Image.open(io.BytesIO(clean)) as image:
            image.load()
            turned = 1 if name == "plain" else orientation
            assert dict(image.getexif()) == ({} if turned == 1 else {0x0112: turned}), name
            assert not image.info.keys() & {"comment", "xmp", "photoshop", "Comment", "XML:com.adobe.xmp"}, name
        assert without_metadata(clean) == clean, f"{name}: once is enough"


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations_run_as_before(form: str) -> None:
    data = moving(form, **({"comment": b"SECRET"} if form == "GIF" else {}))
    clean = without_metadata(data)
    assert clean is not None and b"SECRET" not in clean
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(clean)) as after:
        assert after.n_frames == before.n_frames == 3 and after.info["loop"] == before.info["loop"]
        for number in range(3):
            before.seek(number)
            after.seek(number)
            np.testing.assert_array_equal(np.asarray(after.convert("RGBA")), np.asarray(before.convert("RGBA")))
            assert after.info["duration"] == before.info["duration"]


def test_a_gif_of_another_application() -> None:
    data = saved("GIF")
    texts = b"\x21\xff\x0bXMP DataXMP\x06SECRET\0" + b"\x21\xfe\x06SECRET\0" + b"\x21\x01\x0c" + bytes(12) + b"\x06SECRET\0"
    at = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    clean = without_metadata(data[:at] + texts + data[at:] + b"SECRET")
    assert clean is not None and b"SECRET" not in clean
    np.testing.assert_array_equal(decode_rgb(clean), decode_rgb(data))


def test_what_has_to_be_decoded_to_be_without() -> None:
    assert without_metadata(saved("TIFF", exif=exif(1))) is None
    assert without_metadata(b"") is None and without_metadata(b"SECRET" * 9) is None
    try:
        plain, full = saved("AVIF"), saved("AVIF", exif=exif(6))
    except (KeyError, OSError):
        pytest.skip("this Pillow writes no AVIF")
    assert without_metadata(plain) == plain and without_metadata(full) is None


def test_files_of_strangers_cost_no_error() -> None:
    files = [
        *jpegs(6).values(),
        *pngs(6).values(),
        *webps(6).values(),
        moving("GIF", comment=b"SECRET"),
        moving("WEBP"),
    ]
    random = np.random.default_rng(0)
    for data in files:
        for _ in range(60):
            bent = bytearray(data[: random.integers(1, len(data) + 1)])
            for at in random.integers(0, len(bent), 4):
                bent[at] = random.integers(0, 256)
            clean = without_metadata(bytes(bent))
            assert clean is None or isinstance(clean, bytes)
    for run in (b"\xff" * 3_000_000, b"\xff\xd8\xff\xda\0\2" + b"\xff" * 3_000_000, b"GIF89a" + bytes(3_000_000)):
        assert without_metadata(run) is None
