"""Ranking objects by their best image: as deep into the ranking of images as it takes to meet enough objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mmref.retrieval.exact import Floats, Rows
from mmref.retrieval.ranking import Encoded, Ranker

FIRST = 8  # images of the first look for each object wanted
DEEPER = 8  # times as many images in each further look


class Objects:
    """Which items are of which object.

    Args:
        object_ids: of each item, null where none is known.
    """

    def __init__(self, object_ids: pa.ChunkedArray) -> None:
        encoded = pc.dictionary_encode(object_ids.combine_chunks())
        self.ids: pa.Array = encoded.dictionary
        self.of: Rows = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        self._rows: Rows = np.argsort(self.of, kind="stable")
        self._edges: Rows = np.searchsorted(self.of[self._rows], np.arange(len(self.ids) + 1))

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, number: int) -> Rows:
        """Rising rows of the items of an object."""
        return self._rows[self._edges[number] : self._edges[number + 1]]

    def count(self, rows: Rows) -> int:
        """How many objects some items are of; rows of -1 are none."""
        of = self.of[rows[rows >= 0]]
        return len(np.unique(of[of >= 0]))


@dataclass(frozen=True)
class RankedObject:
    """An object found, by its number, and its best images, the best first: rows, scores and initial scores (n,) each, and
    places (n,) among all its images before refinement, from 1."""

    number: int
    best_initial: float  # of all images that were ranked
    rank_before: int  # among objects, by that
    rows: Rows
    scores: Floats
    initial: Floats
    before: Rows


def rank_objects(
    ranker: Ranker,
    objects: Objects,
    queries: Encoded,
    top: int,
    images: int,
    refine: bool = True,
    candidates: int | None = None,
    among: Rows | None = None,
) -> list[list[RankedObject]]:
    """The best objects of each query, with up to `images` images of each; of equal scores the object indexed first.

    The score of an object is that of its best image, and images are scored as `Ranker.rank` does. `top` objects are found
    wherever there are as many, however many images the first have. Items of no object are passed over.
    """
    available = len(ranker) if among is None else len(among)
    top = min(top, len(objects) if among is None else objects.count(among))
    if not top:
        return [[] for _ in range(len(queries))]
    # What is refined is among what is looked at, so that all the rest comes behind it, by the initial score.
    refined = ranker.candidates(candidates, available) if refine and queries.code is not None else 0
    depth = min(max(FIRST * top, refined), available)
    ranked = ranker.rank(queries, depth, refine, candidates, among)
    answers = []
    for q in range(len(queries)):
        one, looked, within = queries.take([q]), depth, among
        found: Sequence[np.ndarray] = [part[q] for part in ranked]
        while objects.count(found[0]) < top:  # for each query alone: the whole index may be ranked
            if looked == available:  # an approximate search has not come across the rest
                within = np.arange(available)
            looked = min(DEEPER * looked, available)
            found = [part[0] for part in ranker.rank(one, looked, refine, candidates, within)]
        best = _grouped(objects, *found)[:top]
        answers.append([_with_images(ranker, objects, one, object_, images, among) for object_ in best])
    return answers


def _grouped(objects: Objects, rows: Rows, scores: Floats, initial: Floats, before: Rows) -> list[RankedObject]:
    """Objects in the order of their first image among ranked ones (t,), with all their images among them."""
    of = np.where(rows >= 0, objects.of[rows], -1)
    places = np.flatnonzero(of >= 0)
    places = places[np.argsort(of[places], kind="stable")]  # an object's images side by side, the best first
    numbers, starts = np.unique(of[places], return_index=True)
    groups = np.split(places, starts[1:])
    earliest = np.array([before[group].min() for group in groups])
    rank_before = np.argsort(np.argsort(earliest)) + 1
    found = []
    for at in np.argsort([group[0] for group in groups]).tolist():
        group = groups[at]
        inside = np.argsort(np.argsort(before[group])) + 1
        known = int(numbers[at]), float(initial[group].max()), int(rank_before[at])
        found.append(RankedObject(*known, rows[group], scores[group], initial[group], inside))
    return found


def _with_images(
    ranker: Ranker, objects: Objects, query: Encoded, found: RankedObject, images: int, among: Rows | None
) -> RankedObject:
    """An object with `images` images: the first of those that it was found with, and where they are too few the best of its
    others, none of which was refined."""
    held = len(found.rows)
    parts: list[NDArray[Any]] = [found.rows, found.scores, found.initial, found.before]
    if held < images:
        rest = np.setdiff1d(objects.rows(found.number), found.rows, assume_unique=True)
        rest = rest if among is None else np.intersect1d(rest, among, assume_unique=True)
        more = min(images - held, len(rest))
        if more:
            (scores,), (rows,) = ranker.exact_among(query.features, rest, more)
            further = [rows, scores, scores, np.arange(held + 1, held + more + 1)]
            parts = [np.concatenate([first, last]) for first, last in zip(parts, further)]
    return RankedObject(found.number, found.best_initial, found.rank_before, *(part[:images] for part in parts))
