"""Features of a split: every image, and every distinct caption once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mmref.config import DataConfig
from mmref.data.augment import normalize
from mmref.data.captions import shortest, usable_captions
from mmref.data.fit import Fit
from mmref.data.sample_reader import RawSample, SampleReader, SplitIndex, sound
from mmref.data.tokens import Tokens
from mmref.errors import SampleError

Floats = NDArray[np.float32]
Part = TypeVar("Part")
Ready = TypeVar("Ready")
DECODE_THREADS = 4
LONG = 128  # tokens from which on padding that no feature sees is cut off: below, results stay what they were to the last bit


@dataclass
class Queries:
    """Captions of a split. Equal texts are encoded once: `text[i]` is the distinct text of caption i."""

    texts: list[str]  # distinct captions
    text: NDArray[np.int64]  # (q,) index into texts of each caption
    kinds: NDArray[np.str_]  # (q,) kind of each caption, "" where the set has none
    objects: NDArray[np.int64]  # (q,) object row
    images: NDArray[np.int64]  # (q,) image the caption was written for, an index into the split
    skipped: list[str] = field(default_factory=list)  # samples without a caption or with a broken record

    def shortest(self, row: int) -> str:
        """The shortest caption of an object row, as of `captions.shortest`; "" where it has none."""
        return shortest(self.texts[i] for i in np.unique(self.text[self.objects == row]))


def read_queries(
    index: SplitIndex, reader: SampleReader | None = None, records: Iterable[dict[str, Any] | SampleError] | None = None
) -> Queries:
    """Every usable caption of a split, in index order.

    Args:
        reader: one of the split, such as with a cache.
        records: the json of all its samples, where they have been read.
    """
    if records is None:
        records = (reader or SampleReader(index)).read_metas(range(len(index)))
    captions: list[str] = []
    kinds: list[str] = []
    images: list[int] = []
    skipped: list[str] = []
    for i, meta in enumerate(records):
        try:
            usable = usable_captions(sound(meta), f"image {index.image_ids[i]}")
        except SampleError as error:
            skipped.append(str(error))
            continue
        captions += [c for c, _ in usable]
        kinds += [k for _, k in usable]
        images += [i] * len(usable)
    texts, text = np.unique(np.array(captions, dtype=object), return_inverse=True)
    at = np.array(images, dtype=np.int64)
    return Queries(list(texts), text.reshape(-1), np.array(kinds), np.asarray(index.object_row)[at].astype(np.int64), at, skipped)


def read_pixels(reader: SampleReader, rows: Sequence[int], data: DataConfig) -> tuple[NDArray[np.uint8], list[str]]:
    """Decoded images (n, H, W, 3) and for each "" or what is wrong with it (its pixels are then zero)."""

    fit = Fit.of(data)

    def one(i: int, found: RawSample | SampleError) -> tuple[NDArray[np.uint8], str]:
        try:
            raw = sound(found)
            return fit.decode(raw.image_bytes, f"image {raw.meta.get('image_id', i)}"), ""
        except SampleError as error:
            return np.zeros((fit.height, fit.width, 3), np.uint8), str(error)

    def some(part: list[int]) -> list[tuple[NDArray[np.uint8], str]]:
        return list(map(one, part, reader.read_all(part)))

    rows = [int(i) for i in rows]
    share = max(1, -(-len(rows) // DECODE_THREADS))  # side by side: what lies together comes in one request
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        parts = pool.map(some, [rows[at : at + share] for at in range(0, len(rows), share)])
        done = [found for part in parts for found in part]
    return np.stack([pixels for pixels, _ in done]), [problem for _, problem in done]


def ahead(parts: Iterable[Part], prepare: Callable[[Part], Ready]) -> Iterator[Ready]:
    """What `prepare` makes of each part, in order: a thread prepares the next one while the caller works with one."""
    current: Future[Ready] | None = None
    with ThreadPoolExecutor(1) as thread:
        for part in parts:
            following = thread.submit(prepare, part)
            if current is not None:
                yield current.result()
            current = following
        if current is not None:
            yield current.result()


class Encoder:
    """Images and texts to features with a model (or engine) in evaluation mode.

    A context manager: training mode is back afterwards whatever happens.
    """

    def __init__(self, model: Callable, module: torch.nn.Module, data: DataConfig, tokens: Tokens, device: torch.device) -> None:
        self.model, self.module, self.data, self.tokens = model, module, data, tokens
        self.device = device
        self.trims_texts = bool(getattr(getattr(module, "backbone", None), "trims_texts", False))

    def __enter__(self) -> Encoder:
        self._was_training = self.module.training
        self.module.eval()
        return self

    def __exit__(self, *_: object) -> None:
        self.module.train(self._was_training)

    @torch.no_grad()
    def images(self, pixels: NDArray[np.uint8]) -> Floats:
        """(n, H, W, 3) uint8 -> (n, d) normalised."""
        x = normalize(torch.from_numpy(pixels).to(self.device), self.data)
        return self.model(x).image.float().cpu().numpy()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Floats:
        """n captions -> (n, d) normalised."""
        ids, mask = self.tokens(list(texts))
        if self.tokens.max_tokens >= LONG and self.trims_texts:  # BERT reads 512 tokens, and captions have ten
            longest = max(1, int(mask.sum(1).max()))
            ids, mask = ids[:, :longest], mask[:, :longest]
        ids_t, mask_t = (torch.from_numpy(a).to(self.device).long() for a in (ids, mask))
        return self.model(None, ids_t, mask_t).text.float().cpu().numpy()
