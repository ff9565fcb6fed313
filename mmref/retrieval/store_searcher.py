"""Searching an index whose candidates an engine finds: model, names and thumbnails are of the index, the rest of the store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mmref.errors import QueryError, StoreError
from mmref.retrieval.exact import Floats, Rows
from mmref.retrieval.filters import Condition, Where, matches, read_where, typed
from mmref.retrieval.objects import Objects
from mmref.retrieval.ranking import Encoded
from mmref.retrieval.searcher import Searcher, Selection
from mmref.retrieval.stores.places import open_store
from mmref.retrieval.stores.store import CODES, FEATURE, UID, Store


def open_searcher(index: str | os.PathLike[str], device: str = "auto", store: str | None = None) -> Searcher:
    """A searcher of an index, whose candidates the store at a URL finds where one is given.

    Raises:
        SearchIndexError, StoreError, ExtraMissingError.
    """
    return Searcher(index, device) if store is None else StoreSearcher(index, store, device)


class StoreSearcher(Searcher):
    """As Searcher. A search reads no features and no codes of the index folder.

    Raises:
        StoreError: the store does not answer, or holds the rows of another index, or of another state of it.
    """

    def __init__(self, index: str | os.PathLike[str], store: str, device: str = "auto", cached: int = 4096) -> None:
        self.store: Store = open_store(store)
        self._url = store
        super().__init__(index, device, cached)
        self._check()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.index), self._url, self._asked, self._encoder.cached)

    def _check(self) -> None:
        about, manifest = self.store.about, self.manifest
        if about is None:
            raise StoreError(f"the store has no such table: write it with `mmref index export {self.index} --to ... --out URL`.")
        if (about.model, about.generation, about.items) != (manifest.model, manifest.generation, manifest.items):
            raise StoreError(
                f"the store holds {about.items:,} items of generation {about.generation}, model {about.model[:12]}; "
                f"{self.index} has {manifest.items:,} of generation {manifest.generation}, model {manifest.model[:12]}: export "
                "the index again."
            )

    def reopened(self) -> Searcher:
        """As Searcher.reopened. Raises StoreError until the changed index has been exported."""
        raise StoreError(f"{self.index} has changed: export it again, and start anew.")

    def select(self, where: Where | None = None, within: Sequence[str] | None = None) -> Selection:
        """As Searcher.select; the engine counts."""
        conditions = typed(read_where(where), self.filter_columns, self.index.name)
        if within is not None:
            ids = tuple(map(str, within))
            for item_id in ids:
                self.row(item_id)
            if not ids:
                return Selection(0)
            conditions = (*conditions, Condition("id", "in", ids))
        if unsaid := [one for one in conditions if not self.store.says(one)]:
            uids = self.ranker.uids[matches(unsaid, self.items)].tolist()
            if not uids:
                return Selection(0)
            conditions = (*(one for one in conditions if one not in unsaid), Condition(UID, "in", tuple(uids)))
        return Selection(self.store.count(conditions) if conditions else len(self), conditions=conditions)

    @cached_property
    def objects(self) -> Objects:
        """Raises QueryError: an engine ranks images."""
        raise QueryError("results by object are found in the index itself: leave out --store.")

    def ranked(
        self, queries: Encoded, top: int, refine: bool, candidates: int | None, chosen: Selection
    ) -> tuple[Rows, Floats, Floats, Rows]:
        """As Searcher.ranked."""
        ranker = self.ranker
        refining = refine and queries.code is not None
        p = ranker.candidates(candidates, chosen.items) if refining else 0
        arrays = () if not refining else CODES if queries.near is not None else (FEATURE,)
        found = self.store.search(queries.features, min(max(top, p), chosen.items), chosen.conditions, arrays)
        at = np.minimum(np.searchsorted(ranker.uids, found.uids), len(ranker.uids) - 1)
        known = ranker.uids[at] == found.uids
        if np.any((found.uids >= 0) & ~known):  # -1 where a filter leaves fewer
            raise StoreError(
                f"the store holds items that {self.index} did not have when it was opened: the index was exported again. Start "
                "the service anew."
            )
        rows = np.where(known, at, -1)
        similarity = None
        if refining:
            similarity = ranker.similarity(queries, rows[:, :p], {name: of[:, :p] for name, of in found.arrays.items()})
        return ranker.reranked(rows, found.scores, similarity, top)
