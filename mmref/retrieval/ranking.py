"""Ranking encoded queries over the arrays of an index: the first pass, and the refinement of its candidates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmref.errors import QueryError
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings, reference_similarity
from mmref.retrieval.chunks import code_arrays
from mmref.retrieval.exact import Floats, Rows, exact, exact_among, gather, gather_features, widened
from mmref.retrieval.results import whole
from mmref.retrieval.segment import Segment, joined_uids
from mmref.retrieval.vectors import Approximate
from mmref.storage.array_file import RowFile, let_go

SUMMED_ROWS = 65_536  # at a time


@dataclass(frozen=True)
class Encoded:
    """Queries as features (q, d), and their codes over the references: sparse ones as the `near` (q, r) object rows and
    the weights of them, `code` (q, r); other kinds as unit rows, `code` (q, c). None: nothing to refine by."""

    features: Floats
    code: Floats | None = None
    near: NDArray[np.int32] | None = None

    def take(self, rows: Sequence[int]) -> Encoded:
        """Some of the queries."""
        code = None if self.code is None else self.code[rows]
        return Encoded(self.features[rows], code, None if self.near is None else self.near[rows])

    @staticmethod
    def join(parts: Sequence[Encoded]) -> Encoded:
        """Queries end to end."""
        code = None if parts[0].code is None else np.concatenate([p.code for p in parts if p.code is not None])
        near = None if parts[0].near is None else np.concatenate([p.near for p in parts if p.near is not None])
        return Encoded(np.concatenate([p.features for p in parts]), code, near)

    def __len__(self) -> int:
        return len(self.features)

    def sparse_codes(self, objects: int) -> Iterator[Floats]:
        """The sparse code of each query over all objects (objects,), in an array that is the next one's, too."""
        assert self.code is not None and self.near is not None
        whole = np.zeros(objects, np.float32)
        for near, code in zip(self.near, self.code):
            whole[near] = code
            yield whole
            whole[near] = 0


class Ranker:
    """Ranks the items of segments; holds no model. Thread-safe.

    Args:
        segments: items end to end.
        approximate: proposes the candidates of the first pass; None: an exact search.
        space: the references, None: nothing to refine by.
        refinement: how candidates are refined.
        text_mean: mean coordinates of sentences, which centre their dense codes.
        top_p: candidates refined where `refinement.top_p` says nothing; 0: all.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        approximate: Approximate | None,
        space: ReferenceSpace | None,
        refinement: RefinementSettings,
        text_mean: Floats | None = None,
        top_p: int = 0,
    ) -> None:
        self.segments, self.approximate = list(segments), approximate
        self.space, self.refinement, self.text_mean, self.top_p = space, refinement, text_mean, top_p
        self.matrices = [s.features for s in segments]
        self._spares = approximate is not None and approximate.spares_memory
        self.uids = joined_uids(segments)

    def __len__(self) -> int:
        return len(self.uids)

    def encode(self, features: Floats, image_share: float) -> Encoded:
        """Query features with their codes. Dense ones are centred by the mean of texts, of images, or between the two."""
        if self.space is None:
            return Encoded(features)
        if self.refinement.kind == "sparse":
            arrays = code_arrays(self.space, self.refinement, features)
            return Encoded(features, arrays["weights"], arrays["near"])
        mean = self.image_mean
        if mean is not None and self.text_mean is not None:
            mean = (1 - image_share) * self.text_mean + image_share * mean
        return Encoded(features, np.asarray(self.space.encode(features, self.refinement, mean)))

    def rank(
        self, queries: Encoded, top: int, refine: bool = True, candidates: int | None = None, among: Rows | None = None
    ) -> tuple[Rows, Floats, Floats, Rows]:
        """Rows, scores, initial scores and initial ranks, (q, top) each; row -1 where an approximate search found none.

        Args:
            among: rising row numbers to search, by default all.
        """
        available = len(self) if among is None else len(among)
        refining = refine and queries.code is not None
        p = self.candidates(candidates, available) if refining else 0
        k = min(max(top, p), available)
        if among is not None:
            initial, rows = self.exact_among(queries.features, among, k)
        elif self.approximate is not None:
            initial, rows = self.approximate.search(queries.features, self._stored("features"), self.uids, k)
        else:
            initial, rows = exact(queries.features, self.matrices, k)
        return self.reranked(rows, initial, self.similarity(queries, rows[:, :p]) if refining else None, top)

    def reranked(self, rows: Rows, initial: Floats, similarity: Floats | None, top: int) -> tuple[Rows, Floats, Floats, Rows]:
        """What `rank` returns, of a first pass (q, k) and S_ref (q, p) of its first p, None where nothing is refined."""
        scores, before = initial, np.broadcast_to(np.arange(1, rows.shape[1] + 1), rows.shape)
        if similarity is not None:
            scores = initial.copy()
            scores[:, : similarity.shape[1]] += self.refinement.weight * similarity
            order = np.lexsort((rows, -scores))
            scores, initial = np.take_along_axis(scores, order, 1), np.take_along_axis(initial, order, 1)
            rows, before = np.take_along_axis(rows, order, 1), np.take_along_axis(before, order, 1)
        return rows[:, :top], scores[:, :top], initial[:, :top], before[:, :top]

    def exact_among(self, features: Floats, among: Rows, k: int) -> tuple[Floats, Rows]:
        """Scores and rows (q, k) of the nearest among rising row numbers, as of `exact.exact_among`."""
        found = exact_among(features, self.matrices, among, k)
        if self._spares:
            let_go(self.matrices)
        return found

    def candidates(self, asked: int | None, available: int) -> int:
        """How many of the first pass are refined."""
        if asked is not None and whole("candidates", asked) < 0:
            raise QueryError(f"candidates is {asked}: give a number of items to refine, or 0 for all.")
        chosen = asked if asked is not None else self.refinement.top_p or self.top_p
        return min(chosen, available) if chosen else available

    def similarity(self, queries: Encoded, rows: Rows, arrays: Mapping[str, NDArray[Any]] | None = None) -> Floats:
        """S_ref in [0, 1] of each query with its own candidates' rows (q, p); 0 where a row is -1.

        Args:
            arrays: what a store gave of the candidates, near and weights (q, p, r) or feature (q, p, d); by default the
                segments are read.
        """
        assert queries.code is not None and self.space is not None
        known = np.maximum(rows, 0)
        found = np.empty(rows.shape, np.float32)
        if queries.near is not None:
            for i, code in enumerate(queries.sparse_codes(self.space.n_objects)):
                near, weights = self.codes(known[i]) if arrays is None else (arrays["near"][i], arrays["weights"][i])  # (p, r)
                found[i] = np.einsum("pr,pr->p", code[near], weights)
        else:
            for i, of in enumerate(queries.code):
                features = gather_features(self._stored("features"), known[i]) if arrays is None else arrays["feature"][i]
                gallery = self.space.encode(features, self.refinement, self.image_mean, gallery=True)
                found[i] = reference_similarity(of[None], gallery)[0]
        return np.where(rows >= 0, np.clip(found, 0, 1), 0).astype(np.float32)

    def _stored(self, name: str) -> list[NDArray[Any] | RowFile]:
        """Arrays of the segments that few rows are taken from: features, near or weights."""
        if self._spares:
            return [s.rows[name] for s in self.segments]
        return [s.features if name == "features" else s.codes[name] for s in self.segments]

    def codes(self, rows: Rows) -> tuple[NDArray[np.int32], Floats]:
        return (
            gather(self._stored("near"), rows),
            gather(self._stored("weights"), rows),
        )

    @cached_property
    def image_mean(self) -> Floats | None:
        """Mean coordinates of all items, which centre dense codes; None for other kinds."""
        if self.space is None or self.refinement.kind != "dense":
            return None
        total: Any = 0
        for matrix in self.matrices:
            for start in range(0, len(matrix), SUMMED_ROWS):
                total = total + self.space.coordinates(widened(matrix[start : start + SUMMED_ROWS])).sum(0, np.float64)
        return (total / len(self)).astype(np.float32)
