"""Writes one shard: a tar whose bytes depend on the samples alone, and the byte offsets of its members."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image

from mmref.data.container import image_ext
from mmref.data.decode import decode_pixels, image_format
from mmref.data.jpeg_scan import lost_pixels
from mmref.errors import SampleError
from mmref.shards.samples import Source, SourceImage, SourceObject, escape_key
from mmref.storage.fetch import unsigned
from mmref.storage.locations import sha256_of

LOSSY = {"AVIF", "HEIF", "JPEG2000"}  # stored as JPEG, any other as PNG: what others evaluate on, to the last bit
BLOCK = tarfile.BLOCKSIZE
AHEAD = 4  # times as many images as are loaded at once may have come and wait for their turn
Load = Callable[[], bytes]


@dataclass(frozen=True)
class ImageOptions:
    """What happens to an image on its way into the tar."""

    check: bool = True  # decode every image once and leave out what does not decode
    resize_to_px: int | None = None  # re-encode so that the shorter side has at most this many pixels
    quality: int = 90  # JPEG quality of re-encoded images


@dataclass
class ShardResult:
    """A written shard: its manifest entry, index rows (without object_row) and what was left out."""

    entry: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # "image id: reason"


def prepare_image(data: bytes, options: ImageOptions) -> tuple[bytes, str]:
    """Bytes to store and their ending. Other formats, and what is larger than resize_to_px, are encoded again, upright, in
    8 bits and sRGB: they decode to the same picture.

    Raises SampleError for an image that does not decode completely, or is too large to (`MAX_PIXELS`).
    """
    ext = image_ext(data)
    if ext and not options.check and not options.resize_to_px:
        return data, ext
    px = options.resize_to_px
    pixels = decode_pixels(data, shrinks_to=(px, px) if px else None)  # which also holds the size against the limit
    if options.check and (why := lost_pixels(data)):
        raise SampleError(f"image: does not decode completely ({len(data)} bytes): {why}.")
    shrinks = px is not None and min(pixels.shape[:2]) > px
    if ext and not shrinks:
        return data, ext
    lossless = not shrinks and image_format(data) not in LOSSY
    try:
        return _encode(Image.fromarray(pixels), px if shrinks else None, options.quality, lossless)
    except Exception as error:  # sides that a format does not hold, memory
        raise SampleError(f"the image cannot be encoded again: {str(error) or type(error).__name__}") from error


def _encode(image: Image.Image, resize_to_px: int | None, quality: int, lossless: bool) -> tuple[bytes, str]:
    """PNG where the image was kept without loss and stays as large, and where it is transparent; JPEG otherwise."""
    if resize_to_px:
        scale = resize_to_px / min(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    encoded = io.BytesIO()
    if lossless or image.mode == "RGBA":
        image.save(encoded, "PNG")
        return encoded.getvalue(), "png"
    image.save(encoded, "JPEG", quality=quality)
    return encoded.getvalue(), "jpg"


def _clean_captions(image: SourceImage) -> tuple[list[str], list[str] | None]:
    """Captions without the empty ones, with their kinds. Raises SampleError when none is left.

    Duplicates stay: benchmarks count every caption as a query.
    """
    kinds = image.caption_kinds or [""] * len(image.captions)
    kept = [(caption.strip(), kind) for caption, kind in zip(image.captions, kinds, strict=True) if caption.strip()]
    if not kept:
        raise SampleError("no caption with text")
    return [caption for caption, _ in kept], [kind for _, kind in kept] if image.caption_kinds else None


def _prepare(object_id: str, image: SourceImage, load: Load, options: ImageOptions) -> tuple[bytes, str, bytes, int]:
    """(image bytes, ending, json bytes, number of captions). Raises SampleError, or OSError from the source."""
    captions, kinds = _clean_captions(image)
    data, ext = prepare_image(load(), options)
    meta: dict[str, Any] = {"object_id": object_id, "image_id": image.image_id, "captions": captions}
    if kinds is not None:
        meta["caption_kinds"] = kinds
    meta.update({name: value for name, value in image.extra.items() if name not in meta})
    try:
        # What JSON has no type for (times, decimals of a Parquet column) becomes text.
        text = json.dumps(meta, ensure_ascii=False, separators=(",", ":"), default=str).encode()
    except ValueError as error:
        raise SampleError(f"a text cannot be written: {error}") from error
    return data, ext, text, len(captions)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Adds a member and returns the offset of its first payload byte. Time, owner and mode are fixed."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode, info.uid, info.gid = len(data), 0, 0o644, 0, 0
    tar.addfile(info, io.BytesIO(data))
    return tar.offset - -(-len(data) // BLOCK) * BLOCK  # long names take extra headers, so count back from the end


def loaded(source: Source, objects: Iterable[SourceObject]) -> Iterator[tuple[SourceObject, list[Load]]]:
    """Objects, and for each of their images what gives its bytes, or raises as `load` of the source does. Those that take a while
    to come are asked for ahead, as many at a time as the source allows."""
    at_once = getattr(source, "at_once", 1)
    ahead: deque[tuple[SourceObject, list[Load]]] = deque()
    images = 0
    pool = ThreadPoolExecutor(at_once, "load")  # which starts a thread when there is something to do
    try:
        for item in objects:
            ahead.append((item, [_load(source, image, pool) for image in item.images]))
            images += len(item.images)
            while images > AHEAD * at_once:
                images -= len(ahead[0][1])
                yield ahead.popleft()
        yield from ahead
    finally:
        pool.shutdown(cancel_futures=True)


def _load(source: Source, image: SourceImage, pool: ThreadPoolExecutor) -> Load:
    waits = getattr(source, "waits", None)
    # A sample without a caption is left out whatever its image is.
    if waits is not None and any(map(str.strip, image.captions)) and waits(image.ref):
        return pool.submit(source.load, image.ref).result
    return partial(source.load, image.ref)


def write_shard(
    source: Source, objects: Iterable[SourceObject], root: str, file: str, options: ImageOptions, pack: bool = False
) -> ShardResult:
    """Writes `<root>/<file>` under a temporary name and moves it into place.

    An unusable image, or an object with fewer than `source.min_images` usable ones, is left out and listed; any other
    error ends the build.
    """
    path = os.path.join(root, file)
    temporary = f"{path}.{os.getpid()}.tmp"
    result = ShardResult({"file": file})
    try:
        # GNU format: a key may be longer than the 100 characters of a plain header.
        with open(temporary, "wb") as handle, tarfile.open(fileobj=handle, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for item, loads in loaded(source, objects):
                _write_object(source, item, loads, tar, options, result)
        result.entry.update(samples=len(result.rows), bytes=os.path.getsize(temporary), sha256=sha256_of(temporary))
        if pack:
            result.entry["packed"] = f"{file}.gz"
            _pack(temporary, f"{path}.gz")
            os.utime(temporary)  # older than what was packed of it, it would be taken for one of another version
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)
    return result


def _write_object(
    source: Source, item: SourceObject, loads: list[Load], tar: tarfile.TarFile, options: ImageOptions, result: ShardResult
) -> None:
    usable = []
    for image, load in zip(item.images, loads, strict=True):
        try:
            usable.append((image, *_prepare(item.object_id, image, load, options)))
        except (SampleError, OSError) as error:
            result.skipped.append(f"{unsigned(image.image_id)}: {error}")
    if len(usable) < source.min_images:
        reason = f"object {item.object_id} has fewer than {source.min_images} usable images"
        result.skipped += [f"{unsigned(image.image_id)}: {reason}" for image, *_ in usable]
        return
    for image, data, ext, meta, n_captions in usable:
        key = escape_key(image.image_id)
        image_offset = _add(tar, f"{key}.{ext}", data)
        json_offset = _add(tar, f"{key}.json", meta)
        result.rows.append({
            "object_id": item.object_id, "image_id": image.image_id, "key": key,
            "image_offset": image_offset, "image_size": len(data), "image_ext": ext,
            "json_offset": json_offset, "json_size": len(meta), "n_captions": n_captions,
        })  # fmt: skip


def _pack(path: str, target: str) -> None:
    """Gzip with a fixed time and no file name, so that packing twice gives the same bytes."""
    temporary = f"{target}.{os.getpid()}.tmp"
    with (
        open(path, "rb") as source,
        open(temporary, "wb") as handle,
        gzip.GzipFile(filename="", fileobj=handle, mode="wb", compresslevel=9, mtime=0) as packed,
    ):
        shutil.copyfileobj(source, packed)
    os.replace(temporary, target)
