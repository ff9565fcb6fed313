"""Ranking metrics in percent: R@1/5/10, mAP and mINP of the person-retrieval protocol, NDCG@10 and MRR of others.

Every query ranks every gallery item by score, highest first. A hit is the same object. A score of minus infinity says that
the item is not in that query's gallery: it is neither a hit nor before one. Otherwise nothing is filtered out.
Tie rule: of two items with equal scores, the one with the lower gallery index comes first.

A hit is worth 1 in NDCG, whatever its rank, divided by log2(rank + 1); the best ranking has min(hits, 10) of them at its top.
So trec_eval's ndcg_cut_10 counts it, the main metric of BEIR (Thakur et al., NeurIPS 2021) and of retrieval in MTEB
(Muennighoff et al., EACL 2023). MRR is the mean of 1 / rank of the first hit over the whole ranking (trec_eval's recip_rank).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Self, TypeAlias

import numpy as np
from torch import Tensor

from mmref.errors import EvaluationError
from mmref.evaluate import on_device
from mmref.evaluate.shares import ALONE, QueryShare

RECALL_AT = (1, 5, 10)
NDCG_AT = 10
MAIN_METRICS = (*(f"R@{k}" for k in RECALL_AT), "mAP", "mINP")  # the columns of tables
FURTHER_METRICS = (f"NDCG@{NDCG_AT}", "MRR")  # told beside them
METRIC_NAMES = (*MAIN_METRICS, *FURTHER_METRICS)

# Rows ranked at a time: their sort keys (8 bytes a score) should stay in the CPU's cache.
_BLOCK_SCORES = 1 << 19
# The rank of one hit is counted in a pass over its row, which costs as much as to sort this many of the row's scores: measured on
# rows of 500 to 60,000. With few hits in a row, counting is the faster way.
_COUNT_COST = (384, 1 / 48)  # always, and for each score of the row

ScoreFn = Callable[[slice, np.ndarray], np.ndarray]
"""(rows of the queries in this chunk, their initial scores (q, G)) -> final scores (q, G)."""
Scores: TypeAlias = "np.ndarray | Tensor"
"""In memory as NumPy has them, or on a device."""


@dataclass(frozen=True)
class PerQuery:
    """What every query achieved, one entry per query in the caller's order; 0 where `valid` is False."""

    first_rank: np.ndarray  # (q,) int64, rank of the best hit, from 1
    ap: np.ndarray  # (q,) float64, average precision in [0, 1]
    inp: np.ndarray  # (q,) float64, inverse negative penalty in [0, 1]: hits / rank of the last hit
    ndcg: np.ndarray  # (q,) float64, NDCG@10 in [0, 1]
    valid: np.ndarray  # (q,) bool, False: the gallery holds no hit, and the query counts in no mean
    object_rank: np.ndarray  # (q,) int64, rank of the query's object among objects, from 1; 0 where nobody asked for it

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def n_excluded(self) -> int:
        """Queries without a single hit in the gallery."""
        return int(len(self.valid) - self.valid.sum())

    def take(self, rows: np.ndarray) -> Self:
        """The queries `rows` (indices or a boolean mask), repeats allowed."""
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))

    def table(self) -> np.ndarray:
        """All fields as columns, (q, 6) float64, which holds a rank exactly."""
        return np.stack([getattr(self, f.name) for f in fields(self)], axis=1).astype(np.float64)

    @classmethod
    def of_table(cls, table: np.ndarray) -> Self:
        """What `table` was made of."""
        first_rank, ap, inp, ndcg, valid, object_rank = table.T
        return cls(first_rank.astype(np.int64), ap, inp, ndcg, valid > 0, object_rank.astype(np.int64))

    def values(self) -> np.ndarray:
        """Each query's contribution to each metric, (q, 7) float64 in percent, columns as METRIC_NAMES."""
        recalls = [(self.first_rank <= k) & self.valid for k in RECALL_AT]
        reciprocal = self.valid / np.maximum(self.first_rank, 1)
        return 100.0 * np.stack([*recalls, self.ap, self.inp, self.ndcg, reciprocal], axis=1)


def rank_positives(scores: Scores, query_labels: np.ndarray, gallery_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of every query's hits, exact under ties.

    Args:
        scores: (q, G) float32, higher is better. Other types of arrays are cast to float32 first.
        query_labels: (q,) object of each query; integers or strings.
        gallery_labels: (G,) object of each gallery item.
    Returns:
        ranks: (n,) int64 from 1, ascending within a query, queries one after the other.
        offsets: (q + 1,) int64; query i's ranks are ranks[offsets[i]:offsets[i + 1]], empty if it has no hit. A hit whose
            score is minus infinity is none.
    Raises:
        EvaluationError: a score is NaN.
        ValueError: the shapes do not fit together.
    """
    scores, query_labels, gallery_labels = _checked(scores, query_labels, gallery_labels)
    n_gallery = len(gallery_labels)
    offsets, columns = _hits(scores, query_labels, gallery_labels)
    if isinstance(scores, Tensor):
        return _ascending(on_device.count_ranks(scores, offsets, columns), offsets, n_gallery), offsets
    ranks = np.empty(len(columns), dtype=np.int64)
    counts = np.diff(offsets)
    few = counts * (_COUNT_COST[0] + _COUNT_COST[1] * n_gallery) <= n_gallery
    for row in np.flatnonzero(few & (counts > 0)).tolist():
        of_row = slice(offsets[row], offsets[row + 1])
        ranks[of_row] = _counted(scores[row], columns[of_row])
    many = np.flatnonzero(~few)
    block = max(1, _BLOCK_SCORES // max(1, n_gallery))
    for start in range(0, len(many), block):
        rows = many[start : start + block]
        at = np.repeat(np.arange(len(rows)), counts[rows])
        pairs = np.repeat(offsets[rows] - np.cumsum(counts[rows]) + counts[rows], counts[rows]) + np.arange(len(at))
        keys = _sort_keys(scores[rows])
        wanted = keys[at, columns[pairs]]
        keys.sort(axis=1)
        ranks[pairs] = 1 + _positions(keys, at, wanted)
    return _ascending(ranks, offsets, n_gallery), offsets


def _counted(scores: np.ndarray, columns: np.ndarray) -> list[int]:
    """Ranks of the items `columns` in one row of scores (G,): those before an item win a tie with it, those behind it lose."""
    found = []
    for at, own in zip(columns.tolist(), scores[columns], strict=True):
        before = np.count_nonzero(scores[:at] >= own) + np.count_nonzero(scores[at + 1 :] > own)
        found.append(1 + int(before))
    return found


def _ascending(ranks: np.ndarray, offsets: np.ndarray, n_gallery: int) -> np.ndarray:
    """Ranks in ascending order within every query: one sort, in which the query is the key's upper part."""
    upper = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)) * (n_gallery + 1)
    return np.sort(ranks + upper) - upper


def rank_objects(scores: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray) -> np.ndarray:
    """Rank of every query's object among the gallery's objects, (q,) int64 from 1, 0 where the gallery holds none of it.

    An object ranks by its best item, as a search by object does. Of equal scores the item of the lower gallery index is better.

    Args:
        scores: (q, G) float32 without NaN. Others as in `rank_positives`.
    """
    if not len(gallery_labels):
        return np.zeros(len(scores), np.int64)
    by_object = np.argsort(gallery_labels, kind="stable")
    labels, starts = np.unique(gallery_labels[by_object], return_index=True)
    own = np.minimum(np.searchsorted(labels, query_labels), len(labels) - 1)
    found = np.zeros(len(scores), np.int64)
    block = max(1, _BLOCK_SCORES // max(1, len(gallery_labels)))
    for start in range(0, len(scores), block):
        rows = slice(start, start + block)
        # The lowest key of an object is that of its best item, and all keys of a row differ.
        keys = np.minimum.reduceat(_sort_keys(scores[rows])[:, by_object], starts, axis=1)  # (b, objects)
        found[rows] = 1 + (keys < np.take_along_axis(keys, own[rows, None], axis=1)).sum(axis=1)
    return np.where(labels[own] == query_labels, found, 0)


def score_ranking(scores: Scores, query_labels: np.ndarray, gallery_labels: np.ndarray, by_object: bool = False) -> PerQuery:
    """Per-query results of one block of scores; arguments and errors as in `rank_positives`.

    Args:
        by_object: rank objects, too (`rank_objects`), of scores in memory in which no item is left out.
    """
    ranks, offsets = rank_positives(scores, query_labels, gallery_labels)
    counts = np.diff(offsets)
    valid = counts > 0
    object_rank = np.zeros(len(counts), np.int64)
    if by_object:
        object_rank = rank_objects(np.asarray(scores, np.float32), np.asarray(query_labels), np.asarray(gallery_labels))
    first_rank, (ap, inp, ndcg) = np.zeros(len(counts), np.int64), np.zeros((3, len(counts)))
    if valid.any():
        # Queries without hits have empty segments, which `reduceat` cannot express: the valid starts skip them.
        starts, ends, n_hits = offsets[:-1][valid], offsets[1:][valid], counts[valid]
        nth_hit = np.arange(len(ranks)) - np.repeat(starts, n_hits) + 1
        first_rank[valid] = ranks[starts]
        ap[valid] = np.add.reduceat(nth_hit / ranks, starts) / n_hits
        inp[valid] = n_hits / ranks[ends - 1]
        gains = np.where(ranks <= NDCG_AT, 1 / np.log2(ranks + 1.0), 0.0)
        ideal = np.cumsum(1 / np.log2(np.arange(2, NDCG_AT + 2)))
        ndcg[valid] = np.add.reduceat(gains, starts) / ideal[np.minimum(n_hits, NDCG_AT) - 1]
    return PerQuery(first_rank, ap, inp, ndcg, valid, object_rank)


def summarize(per_query: PerQuery, subset: np.ndarray | None = None) -> dict[str, float]:
    """Means over the valid queries (of `subset`, indices or a mask): {"R@1": ..., "MRR": ...} in percent.

    Raises:
        EvaluationError: no valid query is left.
    """
    chosen = per_query if subset is None else per_query.take(subset)
    if not chosen.valid.any():
        raise EvaluationError(
            f"None of the {len(chosen)} queries has an item of the same object in the gallery: there is nothing to "
            "average. Check that queries and gallery come from the same split and share their object ids."
        )
    return dict(zip(METRIC_NAMES, chosen.values()[chosen.valid].mean(axis=0).tolist(), strict=True))


def summarize_objects(per_query: PerQuery) -> dict[str, float]:
    """Share of the valid queries whose object is among the first k objects: {"R@1": ..., "R@5", "R@10"} in percent.

    R@1 is that of items: the first item is the first object's.
    """
    ranks = per_query.object_rank[per_query.valid]
    return {f"R@{k}": 100.0 * float(np.mean(ranks <= k)) for k in RECALL_AT}


def evaluate_features(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    chunk: int = 1024,
    score_fn: ScoreFn | None = None,
    leave_out: ScoreFn | None = None,
    share: QueryShare = ALONE,
    by_object: bool = False,
) -> PerQuery:
    """Rank a gallery for every query by the dot product of features, `chunk` queries at a time.

    Args:
        queries: (Nq, d) float32, L2-normalised where a cosine is meant.
        gallery: (Ng, d) float32.
        query_labels: (Nq,) object of each query; the same text may occur more than once.
        gallery_labels: (Ng,) object of each gallery item.
        chunk: queries scored at a time; memory grows with chunk x Ng, never with Nq x Ng.
        score_fn: turns a chunk's initial scores into final ones, such as `refinement.refined_scores`.
        leave_out: gives initial scores back with minus infinity for what is not in a query's gallery; goes before `score_fn`.
        share: the queries that this process ranks, and where; without the two functions above, which take NumPy's arrays.
            Each part of a share gets the results of all.
        by_object: rank objects, too; as in `score_ranking`.
    Raises:
        EvaluationError: a feature or score is NaN.
    """
    if not len(queries):
        raise EvaluationError("There is no query to evaluate: the split holds no captions or images.")
    parts = []
    score = share.scorer(queries, gallery)
    for rows in share.chunks(len(queries), chunk):
        scores: Any = score(rows)  # (chunk, Ng)
        if leave_out is not None:
            scores = leave_out(rows, scores)
        if score_fn is not None:
            scores = score_fn(rows, scores)
        parts.append(score_ranking(scores, query_labels[rows], gallery_labels, by_object).table())
    return PerQuery.of_table(share.together(parts, len(queries), chunk, len(fields(PerQuery))))


def _checked(scores: Scores, query_labels: np.ndarray, gallery_labels: np.ndarray) -> tuple[Scores, np.ndarray, np.ndarray]:
    if not isinstance(scores, Tensor):
        scores = np.asarray(scores, dtype=np.float32)
    query_labels, gallery_labels = np.asarray(query_labels), np.asarray(gallery_labels)
    if scores.shape != (len(query_labels), len(gallery_labels)):
        raise ValueError(
            f"scores have shape {scores.shape}, but there are {len(query_labels)} query labels and "
            f"{len(gallery_labels)} gallery labels"
        )
    if found := on_device.first_nan(scores) if isinstance(scores, Tensor) else _first_nan(scores):
        count, row, column = found
        raise EvaluationError(
            f"{count} of {scores.shape[0] * scores.shape[1]} scores are NaN (the first: query {row} of this chunk, "
            f"gallery item {column}). A feature is not finite: check the checkpoint and the precision it ran in."
        )
    return scores, query_labels, gallery_labels


def _first_nan(scores: np.ndarray) -> tuple[int, int, int] | None:
    """How many scores are NaN, and row and column of the first; None where none is."""
    # `min` passes a NaN on, so one pass finds it without a temporary array.
    if not scores.size or not np.isnan(scores.min()):
        return None
    row, column = np.argwhere(np.isnan(scores))[0].tolist()
    return int(np.isnan(scores).sum()), row, column


def same_object(query_labels: np.ndarray, gallery_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gallery columns of every query's object, as offsets (q + 1,) and columns (n,)."""
    by_label = np.argsort(gallery_labels, kind="stable")
    ordered = gallery_labels[by_label]
    low = np.searchsorted(ordered, query_labels, side="left")
    counts = np.searchsorted(ordered, query_labels, side="right") - low
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    columns = by_label[np.repeat(low - offsets[:-1], counts) + np.arange(offsets[-1])]
    return offsets, columns


def _hits(scores: Scores, query_labels: np.ndarray, gallery_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `same_object`, without those that are not in the query's gallery."""
    offsets, columns = same_object(query_labels, gallery_labels)
    rows = np.repeat(np.arange(len(scores)), np.diff(offsets))
    own = on_device.pick(scores, rows, columns) if isinstance(scores, Tensor) else scores[rows, columns]
    there = own > -np.inf
    if there.all():
        return offsets, columns
    return np.concatenate([[0], np.cumsum(there)])[offsets], columns[there]


def _sort_keys(scores: np.ndarray) -> np.ndarray:
    """(b, G) int64 whose ascending order is: score descending, then gallery index ascending. All distinct in a row."""
    # Adding 0.0 turns -0.0 into 0.0: they are equal, but their bits are not.
    bits = (scores + np.float32(0.0)).view(np.int32)
    # Negative floats order backwards as integers: flip their magnitude. Then invert all: the best score comes first.
    descending = ~(bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF)))
    return (descending.astype(np.int64) << 32) | np.arange(scores.shape[1], dtype=np.int64)


def _positions(table: np.ndarray, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Column of each value in its row of `table` (b, G), rows ascending; the value is known to be there."""
    width = table.shape[1]
    flat, base = table.ravel(), rows * width
    low, high = np.zeros(len(rows), np.int64), np.full(len(rows), width - 1, np.int64)
    for _ in range(width.bit_length()):
        middle = (low + high) >> 1
        beyond = flat[base + middle] < values
        low = np.where(beyond, middle + 1, low)
        high = np.where(beyond, high, middle)
    return low
