"""A model in use: text and images to features, results refined.

    import mmref
    model = mmref.load("exported")                                 # or a run, or "openai/clip-vit-base-patch32"
    text = model.encode_text(["a red bird with a black mask"])     # (1, d) float32, L2-normalised
    images = model.encode_images(["a.jpg", "b.jpg"])               # (2, d)
    scores = model.refine(text, images)                            # (1, 2), higher is better

Needs no Ray, DeepSpeed or shard set.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mmref.config import Config
from mmref.data.decode import pillow_rgb
from mmref.data.fit import Fit, Fitted
from mmref.data.tokens import Tokens
from mmref.errors import ConfigError, ModelError, SampleError
from mmref.evaluate.features import Encoder, Floats
from mmref.evaluate.refinement import (
    Codes,
    ReferenceSpace,
    RefinementSettings,
    candidates,
    reference_similarity,
    refine,
)
from mmref.model.mmref import MMRef
from mmref.run.exported import AGAIN, read_export
from mmref.storage.fetch import read_location
from mmref.storage.locations import read_bytes
from mmref.storage.texts import is_utf8

T = TypeVar("T")

ImageLike = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[np.uint8] | Fitted
KINDS = "a file or URL, its bytes, an open file, a PIL image, or an RGB array (H, W, 3) uint8"


@dataclass(frozen=True)
class Gallery:
    """Images to be searched: features (g, d), and their codes in the space of references (None: no refinement)."""

    features: Floats
    codes: Codes | None


class Model:
    """A trained model: encoders, references with their object ids, and the refinement chosen on val.

    All features are float32 NumPy arrays, L2-normalised, so that a cosine is a dot product; `torch.from_numpy` shares
    their memory. Not thread-safe: one instance per thread or process.
    """

    def __init__(
        self,
        config: Config,
        module: MMRef,
        tokens: Tokens,
        references: Floats | None,
        object_ids: list[str],
        refinement: RefinementSettings,
        text_mean: Floats | None,
        device: torch.device,
        card: dict[str, Any],
    ) -> None:
        self.config, self.module, self.device = config, module.to(device).eval(), device
        self.references, self.object_ids = references, object_ids  # (m, K, d), None where training set none
        self.refinement, self.text_mean, self.card = refinement, text_mean, card
        self.space = None if references is None or refinement.weight == 0 else ReferenceSpace(references)
        self._encoder = Encoder(self.module, self.module, config.data, tokens, device)

    @property
    def dim(self) -> int:
        """Width d of the shared space."""
        return int(self.module.embed_dim)

    @property
    def close_cosine(self) -> float | None:
        """Cosine with a sentence below which an image is hardly ever the right one, as chosen on val; None where it is not known:
        of pretrained models, of exports before 0.3, of a val split with few captions."""
        close = self.card.get("close_match")
        return float(close["cosine"]) if close else None

    def encode_text(self, texts: Sequence[str], batch: int = 128) -> Floats:
        """n sentences -> (n, d). Longer ones are cut to `config.data.max_tokens` tokens. Raises SampleError that names what is no
        text."""
        if _is_single(texts):
            raise TypeError("encode_text takes a list of sentences: encode_text([sentence]).")
        texts = list(texts)
        for i, text in enumerate(texts):
            _check_text(text, f"text {i}")
        return self._batched(texts, batch, self._encoder.texts)

    def encode_images(self, images: Sequence[ImageLike], batch: int = 128) -> Floats:
        """n images -> (n, d). Raises SampleError that names the image which cannot be read."""
        if _is_single(images):
            raise TypeError("encode_images takes a list of images: encode_images([image]).")
        return self._batched(list(images), batch, lambda part: self._encoder.images(self.pixels(part)))

    def pixels(self, images: Sequence[ImageLike]) -> NDArray[np.uint8]:
        """Decoded and resized images (n, H, W, 3) uint8, as in training. Raises SampleError."""
        fit = Fit.of(self.config.data)
        return np.stack([read_image(image, fit, f"image {i}") for i, image in enumerate(images)])

    def _batched(self, items: list[T], batch: int, encode: Callable[[list[T]], Floats]) -> Floats:
        if batch < 1:
            raise ValueError(f"batch is {batch}: give at least 1.")
        if not items:
            return np.zeros((0, self.dim), np.float32)
        with self._encoder:
            return np.concatenate([encode(items[i : i + batch]) for i in range(0, len(items), batch)])

    def gallery(self, features: Floats) -> Gallery:
        """Prepare image features (g, d) for many calls of `refine`. Raises as `refine`."""
        features = _features(features, self.dim, "images")
        return Gallery(features, None if self.space is None else self.space.encode(features, self.refinement, gallery=True))

    def refine(self, text: Floats, images: Floats | Gallery) -> Floats:
        """Scores (q, g) of text features (q, d) with images: cosines, and on the first candidates the refinement.

        A sentence's scores do not depend on the other sentences of the call. `images` is the whole gallery: dense
        codes are centred by its mean. Raises ValueError for what are no features.
        """
        text = _features(text, self.dim, "text")
        gallery = images if isinstance(images, Gallery) else self.gallery(images)
        scores = text @ gallery.features.T
        if self.space is None or gallery.codes is None or not len(text):
            return scores
        codes = self.space.encode(text, self.refinement, self.text_mean)
        top_p = self.refinement.top_p
        inside = None if top_p is None else candidates(scores, top_p)
        return refine(scores, reference_similarity(codes, gallery.codes), self.refinement.weight, inside)


def _is_single(given: Any) -> bool:
    """Whether one text or image was given in the place of several: some of them can be iterated over too."""
    if isinstance(given, np.ndarray):
        return given.ndim == 0 or (given.ndim == 3 and given.shape[2] == 3)
    one = isinstance(given, str | bytes | bytearray | memoryview | os.PathLike | Image.Image | Fitted) or hasattr(given, "read")
    return one or not isinstance(given, Iterable)


def _features(given: Any, dim: int, name: str) -> Floats:
    """(n, dim) float32. Raises ValueError for anything else."""
    try:
        found = np.asarray(given, np.float32)
        what = f"an array of shape {found.shape}"
    except (TypeError, ValueError, RuntimeError):  # PyTorch's and NumPy's
        found, what = np.zeros(0, np.float32), f"{given!r:.100}"
    if found.ndim != 2 or found.shape[1] != dim:
        raise ValueError(f"{name} must be features (n, {dim}), as `encode_text` and `encode_images` give, and not {what}.")
    return found


def _check_text(text: Any, name: str) -> None:
    """Raise SampleError for what no tokenizer takes, or would take for something else, as it does a pair of texts."""
    if not isinstance(text, str):
        raise SampleError(f"{name} is {text!r:.100}, which is no text.")
    if not is_utf8(text):
        raise SampleError(f"{name}, {text!a:.100}, is no text that UTF-8 can hold.")


def read_image(image: ImageLike, fit: Fit, name: str) -> NDArray[np.uint8]:
    """One image as RGB pixels (height, width, 3). Raises SampleError."""
    if isinstance(image, Fitted):
        return image.pixels
    if isinstance(image, Image.Image):
        image = pillow_rgb(image, name)
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise SampleError(f"{name}: an array must be RGB (H, W, 3) uint8, found {image.shape} {image.dtype}.")
        if not image.size:
            raise SampleError(f"{name}: the image is empty: it has {image.shape[1]}x{image.shape[0]} pixels.")
        return fit(image)
    if hasattr(image, "read"):
        try:
            image = bytes(image.read())
        except (OSError, ValueError, TypeError) as error:  # it is closed, or was opened as a text
            raise SampleError(f"{name}: the open file cannot be read as bytes: {error}.") from None
    if isinstance(image, bytes | bytearray | memoryview):
        return fit.decode(bytes(image), name)
    if not isinstance(image, str | os.PathLike):
        raise SampleError(f"{name} is a {type(image).__name__}: give {KINDS}.")
    try:
        place = os.fspath(image)
        # What is there may also be a pipe, as the shell's <(...) makes.
        data = read_bytes(place) if os.path.exists(place) else read_location(place)
    except OSError as error:
        raise SampleError(f"{image}: cannot be read: {error.strerror or error}.") from None
    return fit.decode(data, place)


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Model:
    """The model of a folder written by `mmref export`. Raises ModelError."""
    found = read_export(Path(path))
    return Model(
        found.config,
        found.module,
        found.tokens,
        found.references,
        found.object_ids,
        _refinement(found.card, path),
        found.text_mean,
        torch.device(device),
        found.card,
    )


def _refinement(card: dict[str, Any], folder: str | os.PathLike[str]) -> RefinementSettings:
    """Raises ModelError where the card of an export has none that can be read."""
    try:
        return RefinementSettings(**card["refinement"])
    except (KeyError, TypeError, ConfigError) as error:
        raise ModelError(f"{folder}/config.json is damaged: its refinement cannot be read ({error}). {AGAIN}") from None
