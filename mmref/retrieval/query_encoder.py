"""Features and codes of queries: sentences, which are kept for when they are asked again, images, and both mixed."""

from __future__ import annotations

import numbers
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from mmref.errors import QueryError, SampleError
from mmref.export.model import ImageLike, Model
from mmref.retrieval.exact import Floats
from mmref.retrieval.ranking import Encoded, Ranker
from mmref.retrieval.results import Query
from mmref.storage.texts import is_utf8


class QueryEncoder:
    """Encodes for the threads of a searcher. A model is not thread-safe, so one of them uses it at a time.

    Args:
        cached: sentences whose features are kept.
        previous: an encoder of the same model, whose threads may still use it.
    """

    def __init__(self, model: Model, ranker: Ranker, cached: int, previous: QueryEncoder | None) -> None:
        self.model, self.ranker, self.cached = model, ranker, cached
        self._kept: OrderedDict[str, Encoded] = OrderedDict()
        self._lock = threading.Lock()  # of what is kept
        self._encoding: threading.Lock = previous._encoding if previous else threading.Lock()  # of the model

    def encode(self, queries: Sequence[Query]) -> Encoded:
        """Features and codes of queries. Raises QueryError."""
        for query in queries:
            check(query)
        texts = dict.fromkeys(query.text.strip() for query in queries if query.text and query.text.strip())
        known = self._encode_texts(list(texts))
        seen = iter(self._encode_images([query.image for query in queries if query.image is not None]))
        return Encoded.join(
            [
                known[(query.text or "").strip()] if query.image is None else self._mix(query, next(seen)[None], known)
                for query in queries
            ]
        )

    def encode_pixels(self, images: Sequence[ImageLike]) -> Floats:
        """Features (n, d) of images. Raises SampleError."""
        with self._encoding:
            return self.model.encode_images(images)

    def _encode_texts(self, texts: list[str]) -> dict[str, Encoded]:
        with self._lock:
            known = {text: self._kept[text] for text in texts if text in self._kept}
            for text in known:
                self._kept.move_to_end(text)
        missing = [text for text in texts if text not in known]
        if missing:
            with self._encoding:
                features = self.model.encode_text(missing)
            encoded = self.ranker.encode(features, image_share=0.0)
            new = {text: encoded.take([i]) for i, text in enumerate(missing)}
            known |= new
            with self._lock:
                self._kept |= new
                while len(self._kept) > self.cached:
                    self._kept.popitem(last=False)
        return known

    def _encode_images(self, images: list[ImageLike]) -> Floats:
        try:
            return self.encode_pixels(images)
        except SampleError as error:
            raise QueryError(f"the image of the query cannot be used: {error}") from None

    def _mix(self, query: Query, feature: Floats, texts: dict[str, Encoded]) -> Encoded:
        """An image, or the weighted mean of the features of an image and a sentence."""
        text, share = (query.text or "").strip(), 1.0
        if text:
            share = query.image_weight
            feature = share * feature + (1 - share) * texts[text].features
            feature = (feature / max(float(np.linalg.norm(feature)), 1e-12)).astype(np.float32)
        return self.ranker.encode(feature, share)


def check(query: Query) -> None:
    """Raise QueryError where a query cannot be encoded."""
    if query.text is not None and not isinstance(query.text, str):
        raise QueryError(f"the query is {query.text!r:.100}, which is no text: give a sentence as `text`, an image as `image`.")
    if not is_utf8(query.text or ""):
        raise QueryError(f"the query {query.text!a} is no text that UTF-8 can hold.")
    if not (query.text or "").strip() and query.image is None:
        raise QueryError("the query is empty: give a sentence, an image, or both.")
    if not isinstance(query.image_weight, numbers.Real) or not 0 <= query.image_weight <= 1:
        raise QueryError(f"the weight of the image is {query.image_weight!r:.100}: give 0 to 1.")
