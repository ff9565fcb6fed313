"""Ranking metrics in percent: R@1/5/10, mAP and mINP of the person-retrieval protocol, NDCG@10 and MRR of others.

Every query ranks every gallery item by score, highest first. A hit is the same object. A score of minus infinity says that
the item is not in that query's gallery: it is neither a hit nor before one. Otherwise nothing is filtered out.
Tie rule: of two items with equal scores, the one with the lower gallery index comes first.

A hit is worth 1 in NDCG, whatever its rank, divided by log2(rank + 1); the best ranking has min(hits, 10) of them at its top.
So trec_eval's ndcg_cut_10 counts it, the main metric of BEIR (Thakur et al., NeurIPS 2021) and of retrieval in MTEB
(Muennighoff et al., EACL 2023). MRR is the mean of 1 / rank of the first hit over the whole ranking (trec_eval's recip_rank).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from mmref.errors import EvaluationError

RECALL_AT = (1, 5, 10)
NDCG_AT = 10
MAIN_METRICS = (*(f"R@{k}" for k in RECALL_AT), "mAP", "mINP")  # the columns of tables
FURTHER_METRICS = (f"NDCG@{NDCG_AT}", "MRR")  # told beside them
METRIC_NAMES = (*MAIN_METRICS, *FURTHER_METRICS)

# Rows ranked at a time: their sort keys (8 bytes a score) should stay in the CPU's cache.
_BLOCK_SCORES = 1 << 19

ScoreFn = Callable[[slice, np.ndarray], np.ndarray]
"""(rows of the queries in this chunk, their initial scores (q, G)) -> final scores (q, G)."""


@dataclass(frozen=True)
class PerQuery:
    """What every query achieved, one entry per query in the caller's order; 0 where `valid` is False."""

    first_rank: np.ndarray  # (q,) int64, rank of the best hit, from 1
    ap: np.ndarray  # (q,) float64, average precision in [0, 1]
    inp: np.ndarray  # (q,) float64, inverse negative penalty in [0, 1]: hits / rank of the last hit
    ndcg: np.ndarray  # (q,) float64, NDCG@10 in [0, 1]
    valid: np.ndarray  # (q,) bool, False: the gallery holds no hit, and the query counts in no mean

    def __len__(self) -> int:
        return len(self.valid)

    @property
    def n_excluded(self) -> int:
        """Queries without a single hit in the gallery."""
        return int(len(self.valid) - self.valid.sum())

    def take(self, rows: np.ndarray) -> Self:
        """The queries `rows` (indices or a boolean mask), repeats allowed."""
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))

    @classmethod
    def concatenate(cls, parts: Iterable["PerQuery"]) -> Self:
        """One PerQuery of several, in order."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))

    def values(self) -> np.ndarray:
        """Each query's contribution to each metric, (q, 7) float64 in percent, columns as METRIC_NAMES."""
        recalls = [(self.first_rank <= k) & self.valid for k in RECALL_AT]
        reciprocal = self.valid / np.maximum(self.first_rank, 1)
        return 100.0 * np.stack([*recalls, self.ap, self.inp, self.ndcg, reciprocal], axis=1)


def rank_positives(scores: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of every query's hits, exact under ties.

    Args:
        scores: (q, G) float32, higher is better. Other types are cast to float32 first.
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
    ranks = np.empty(len(columns), dtype=np.int64)
    block = max(1, _BLOCK_SCORES // max(1, n_gallery))
    for start in range(0, len(scores), block):
        stop = min(start + block, len(scores))
        pairs = slice(offsets[start], offsets[stop])
        rows = np.repeat(np.arange(stop - start), np.diff(offsets[start : stop + 1]))
        keys = _sort_keys(scores[start:stop])
        wanted = keys[rows, columns[pairs]]
        keys.sort(axis=1)
        found = 1 + _positions(keys, rows, wanted)
        # One sort orders the ranks within every query: the row is the key's upper part.
        found += rows * (n_gallery + 1)
        found.sort()
        ranks[pairs] = found - rows * (n_gallery + 1)
    return ranks, offsets


def score_ranking(scores: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray) -> PerQuery:
    """Per-query results of one block of scores; arguments and errors as in `rank_positives`."""
    ranks, offsets = rank_positives(scores, query_labels, gallery_labels)
    counts = np.diff(offsets)
    valid = counts > 0
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
    return PerQuery(first_rank, ap, inp, ndcg, valid)


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


def evaluate_features(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    chunk: int = 1024,
    score_fn: ScoreFn | None = None,
    leave_out: ScoreFn | None = None,
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
    Raises:
        EvaluationError: a feature or score is NaN.
    """
    parts = []
    for start in range(0, len(queries), chunk):
        rows = slice(start, min(start + chunk, len(queries)))
        scores = queries[rows] @ gallery.T  # (chunk, Ng)
        if leave_out is not None:
            scores = leave_out(rows, scores)
        if score_fn is not None:
            scores = score_fn(rows, scores)
        parts.append(score_ranking(scores, query_labels[rows], gallery_labels))
    if not parts:
        raise EvaluationError("There is no query to evaluate: the split holds no captions or images.")
    return PerQuery.concatenate(parts)


def _checked(
    scores: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores = np.asarray(scores, dtype=np.float32)
    query_labels, gallery_labels = np.asarray(query_labels), np.asarray(gallery_labels)
    if scores.shape != (len(query_labels), len(gallery_labels)):
        raise ValueError(
            f"scores have shape {scores.shape}, but there are {len(query_labels)} query labels and "
            f"{len(gallery_labels)} gallery labels"
        )
    # `min` passes a NaN on, so one pass finds it without a temporary array.
    if scores.size and np.isnan(scores.min()):
        row, column = np.argwhere(np.isnan(scores))[0]
        raise EvaluationError(
            f"{int(np.isnan(scores).sum())} of {scores.size} scores are NaN (the first: query {row} of this chunk, "
            f"gallery item {column}). A feature is not finite: check the checkpoint and the precision it ran in."
        )
    return scores, query_labels, gallery_labels


def same_object(query_labels: np.ndarray, gallery_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gallery columns of every query's object, as offsets (q + 1,) and columns (n,)."""
    by_label = np.argsort(gallery_labels, kind="stable")
    ordered = gallery_labels[by_label]
    low = np.searchsorted(ordered, query_labels, side="left")
    counts = np.searchsorted(ordered, query_labels, side="right") - low
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    columns = by_label[np.repeat(low - offsets[:-1], counts) + np.arange(offsets[-1])]
    return offsets, columns


def _hits(scores: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `same_object`, without those that are not in the query's gallery."""
    offsets, columns = same_object(query_labels, gallery_labels)
    there = scores[np.repeat(np.arange(len(scores)), np.diff(offsets)), columns] > -np.inf
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
