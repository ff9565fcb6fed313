"""95 % intervals by bootstrap over objects.

An object's captions and images are alike, so queries of one object are not independent: objects are resampled, with
replacement, and take all their queries along (a cluster bootstrap). A replicate's metric is the mean over its queries,
so that an object's weight is its number of queries, as in the metric itself.
"""

import numpy as np

from mmref.errors import EvaluationError
from mmref.evaluate.metrics import METRIC_NAMES, PerQuery

# Counts are drawn this many at a time (32 MB of int64).
_BLOCK_COUNTS = 1 << 22


def bootstrap_ci(
    per_query: PerQuery, objects: np.ndarray, n: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, list[float]]:
    """Percentile interval of every metric: {"R@1": [low, high], ...} in percent.

    Args:
        per_query: results of q queries; those without a hit in the gallery are left out, as in the metrics.
        objects: (q,) object of each query, integers or strings.
        n: replicates.
        seed: the same seed gives the same interval.
        level: share of the replicates inside the interval.
    Raises:
        EvaluationError: no query has a hit in the gallery.
    """
    sums, sizes = _object_sums(per_query.values(), per_query.valid, objects)
    replicates = _replicates(sums, sizes, n, seed)
    return dict(zip(METRIC_NAMES, _intervals(replicates, level), strict=True))


def paired_difference(
    a: PerQuery, b: PerQuery, objects: np.ndarray, n: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, dict[str, float | list[float]]]:
    """How much better b is than a on the same queries: {"R@1": {"mean": float, "ci95": [low, high]}, ...} in points.

    Both systems share every replicate, so what is hard for both cancels. Arguments and errors as in `bootstrap_ci`.

    Raises:
        EvaluationError: the two results are not of the same queries, or no query has a hit in the gallery.
    """
    if len(a) != len(b) or not np.array_equal(a.valid, b.valid):
        raise EvaluationError(
            f"The two results have {int(a.valid.sum())} of {len(a)} and {int(b.valid.sum())} of {len(b)} valid "
            "queries: a paired difference needs the same queries against the same gallery, in the same order."
        )
    sums, sizes = _object_sums(b.values() - a.values(), a.valid, objects)
    means = sums.sum(axis=0) / sizes.sum()
    intervals = _intervals(_replicates(sums, sizes, n, seed), level)
    return {
        name: {"mean": float(mean), "ci95": interval} for name, mean, interval in zip(METRIC_NAMES, means, intervals, strict=True)
    }


def resampled(values: np.ndarray, n: int = 1000, seed: int = 0, level: float = 0.95) -> list[list[float]]:
    """[low, high] of the mean of each column of values (q, c), by resampling rows, which are alone and without NaN."""
    return _intervals(_replicates(values, np.ones(len(values)), n, seed), level)


def _object_sums(values: np.ndarray, valid: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of values (q, 7) and number of valid queries of each object: (o, 7) and (o,) float64."""
    objects = np.asarray(objects)
    if len(objects) != len(valid):
        raise ValueError(f"{len(objects)} objects for {len(valid)} queries")
    if not valid.any():
        raise EvaluationError(f"None of the {len(valid)} queries has a hit in the gallery: there is no interval.")
    _, row = np.unique(objects[valid], return_inverse=True)
    sizes = np.bincount(row).astype(np.float64)
    sums = np.stack([np.bincount(row, weights=column) for column in values[valid].T], axis=1)
    return sums, sizes


def _draw_counts(rng: np.random.Generator, replicates: int, n_objects: int) -> np.ndarray:
    """How often each object is drawn, (replicates, n_objects) int64; a row sums to n_objects."""
    return rng.multinomial(n_objects, np.full(n_objects, 1 / n_objects), size=replicates)


def _replicates(sums: np.ndarray, sizes: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Metrics of n resampled sets of objects, (n, 7)."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_COUNTS // len(sizes))
    parts = []
    for start in range(0, n, block):
        counts = _draw_counts(rng, min(block, n - start), len(sizes)).astype(np.float64)
        parts.append((counts @ sums) / (counts @ sizes)[:, None])
    return np.concatenate(parts)


def _intervals(replicates: np.ndarray, level: float) -> list[list[float]]:
    low, high = np.quantile(replicates, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [[float(a), float(b)] for a, b in zip(low, high, strict=True)]
