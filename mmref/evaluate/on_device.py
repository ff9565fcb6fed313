"""What ranking and refinement need of scores that lie on a device: the counterparts of NumPy's in `metrics`, `refinement`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK_VALUES = 1 << 26  # of codes made dense at a time (256 MB)


def first_nan(scores: Tensor) -> tuple[int, int, int] | None:
    """How many scores are NaN, and row and column of the first; None where none is."""
    bad = scores.isnan()
    if not bad.any():
        return None
    row, column = bad.nonzero()[0].tolist()
    return int(bad.sum()), row, column


def pick(scores: Tensor, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float32]:
    """Scores at some places, in memory."""
    at = (torch.from_numpy(x).to(scores.device) for x in (rows, columns))
    return scores[tuple(at)].cpu().numpy()


def count_ranks(scores: Tensor, offsets: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rank of each hit: 1 and the items that come before it, by score, and by index where scores are equal.

    Args:
        scores: (q, G).
        offsets, columns: the hits of row i are the items columns[offsets[i]:offsets[i + 1]].
    Returns:
        (n,) a rank for each of `columns`.
    """
    counts = np.diff(offsets)
    ranks = torch.empty(len(columns), dtype=torch.long, device=scores.device)
    item = torch.arange(scores.shape[1], device=scores.device)
    for nth in range(int(counts.max(initial=0))):  # the nth hit of every row that has so many
        rows = np.flatnonzero(counts > nth)
        pairs = offsets[rows] + nth
        at = torch.from_numpy(columns[pairs]).to(scores.device)[:, None]  # (n, 1)
        some = scores if len(rows) == len(scores) else scores[torch.from_numpy(rows).to(scores.device)]
        own = some.gather(1, at)
        before = (some > own).sum(1) + ((some == own) & (item < at)).sum(1)
        ranks[torch.from_numpy(pairs).to(scores.device)] = 1 + before
    return ranks.cpu().numpy()


def candidates(initial: Tensor, top_p: int) -> Tensor:
    """As `refinement.candidates`: (q, G) bool."""
    if top_p >= initial.shape[1]:
        return torch.ones_like(initial, dtype=torch.bool)
    threshold = initial.topk(top_p, dim=1).values[:, -1:]
    above, at = initial > threshold, initial == threshold
    places = top_p - above.sum(1, keepdim=True)
    return above | (at & (at.cumsum(1) <= places))


@dataclass(frozen=True)
class SparseCodes:
    """Codes over m objects of which r are not zero: their objects and weights, (N, r) each."""

    objects: Tensor
    weights: Tensor
    n_objects: int

    def dense(self, rows: slice) -> Tensor:
        """Some codes, (n, m)."""
        weights = self.weights[rows]
        return weights.new_zeros(len(weights), self.n_objects).scatter_(1, self.objects[rows], weights)


def similarity(queries: Tensor | SparseCodes, gallery: Tensor | SparseCodes) -> Tensor:
    """As `refinement.reference_similarity`: (q, G) in [0, 1]."""
    if isinstance(queries, Tensor) and isinstance(gallery, Tensor):
        return (queries @ gallery.T).add_(1).mul_(0.5).clamp_(0, 1)
    assert isinstance(queries, SparseCodes) and isinstance(gallery, SparseCodes)
    asked, count = queries.dense(slice(None)), len(gallery.weights)
    block = max(1, _BLOCK_VALUES // gallery.n_objects)
    found = [asked @ gallery.dense(slice(start, start + block)).T for start in range(0, count, block)]
    return torch.cat(found, dim=1).clamp_(0, 1)
