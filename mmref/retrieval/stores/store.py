"""What an engine does for us: it takes the rows of an index, and gives the nearest of them that a filter leaves.

Scores are inner products of unit vectors, so cosines. What the first pass finds is compared by references here, with codes that
come along; the engine needs no function of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmref.errors import SearchIndexError, StoreError
from mmref.retrieval.filters import Condition

KEY = "mmref"  # of what says whose rows a table holds, in the engine's own place for such
TABLE = "mmref"  # where a URL names no other
UID = "uid"  # a number that no other item of the index ever had
OWN = (UID, "id", "object_id", "path", "width", "height")  # columns that every row has, before those of metadata
FEATURE, CODES = "feature", ("near", "weights")  # behind them
Conditions = Sequence[Condition]
"""Filters of a search, all of which an item must meet, with values of the columns' types (`mmref.retrieval.filters.typed`)."""


@dataclass(frozen=True)
class About:
    """Whose rows a store holds."""

    items: int
    dim: int
    model: str  # fingerprint of the model that made the features
    generation: int  # of the index
    codes: bool  # whether rows have sparse codes

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str | None, place: str) -> About:
        """Of `to_json`. Raises StoreError for a table that `mmref index export` did not write."""
        try:
            return cls(**json.loads(text or ""))
        except (ValueError, TypeError):
            raise StoreError(f"{place} was not written by `mmref index export`: export the index there first.") from None


@dataclass(frozen=True)
class Found:
    """What a search found, the best first: uids (q, k), -1 where there are fewer, and scores (q, k), minus infinity there; what
    was asked for besides, (q, k, n) each."""

    uids: NDArray[np.int64]
    scores: NDArray[np.float32]
    arrays: dict[str, NDArray[Any]]


class Store(Protocol):
    """A table in an engine. `about` says whose rows it holds, None of a table that is not there yet."""

    about: About | None

    def write(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], about: About) -> None:
        """Put rows in the place of what the table held, as a whole or not at all. Raises StoreError."""

    def says(self, condition: Condition) -> bool:
        """Whether the engine can filter by a condition as the index does. It can by a set of uids."""

    def search(self, queries: NDArray[np.float32], k: int, where: Conditions, arrays: Sequence[str] = ()) -> Found:
        """The k rows of each query with the highest inner product, of equal ones the lower uid first; no row is missed.

        Raises StoreError.
        """

    def count(self, where: Conditions) -> int:
        """Rows that conditions leave. Raises StoreError."""

    def close(self) -> None:
        """Let go of connections and files."""


def check_columns(names: Sequence[str], index: str) -> None:
    """Raise SearchIndexError for metadata that has the name of a column of ours."""
    if taken := [name for name in names if name in (UID, FEATURE, *CODES)]:
        raise SearchIndexError(
            f"{index} has a metadata column {taken[0]!r}, which is the name of a column that an export adds: make the index of a "
            "table in which it has another name."
        )


def padded(found: Sequence[Mapping[str, NDArray[Any]]], k: int, arrays: Sequence[str]) -> Found:
    """Answers of single queries, {"uid", "score", ...}, as one. Of equal scores the lower uid comes first."""
    widths = {name: next((f[name].shape[1:] for f in found if len(f[name])), (0,)) for name in arrays}
    kinds = {name: next((f[name].dtype for f in found), np.dtype(np.float32)) for name in arrays}
    uids = np.full((len(found), k), -1, np.int64)
    scores = np.full((len(found), k), -np.inf, np.float32)
    more = {name: np.zeros((len(found), k, *widths[name]), kinds[name]) for name in arrays}
    for i, one in enumerate(found):
        order = np.lexsort((one["uid"], -one["score"]))[:k]
        uids[i, : len(order)], scores[i, : len(order)] = one["uid"][order], one["score"][order]
        for name in arrays:
            more[name][i, : len(order)] = one[name][order] if len(order) else 0
    return Found(uids, scores, more)
