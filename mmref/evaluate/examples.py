"""Which queries the report shows as pictures: by a rule over the ranks of their first right results, not by hand."""

from __future__ import annotations

import numpy as np

OPENING = 3  # queries at the top of the report
MOVES = {"up": 1, "down": -1, "same": 0}  # what refinement did to the first right result: sign of rank before - rank after
_SEED = 0


def count_moves(before: np.ndarray, after: np.ndarray) -> dict[str, int]:
    """How many queries refinement did each of MOVES to; those without a right image in the gallery are left out.

    before, after: (q,) ranks of the first right result, from 1; 0 where the gallery has none.
    """
    change = np.sign(before - after)[before > 0]
    return {name: int((change == sign).sum()) for name, sign in MOVES.items()}


def choose_opening(before: np.ndarray, after: np.ndarray, shown: int) -> list[int]:
    """Queries for the top of the report: one of each of MOVES, and any others where there is none of a kind.

    Of each kind the first in an order that a fixed seed shuffles, in which queries with a right image among the `shown` first
    results, before or after, come before the rest: two rows without one say little.
    """
    order = np.random.default_rng(_SEED).permutation(np.flatnonzero(before > 0))
    visible = np.minimum(before, after)[order] <= shown
    order = np.concatenate([order[visible], order[~visible]])
    change = np.sign(before - after)[order]
    chosen = [int(i) for sign in MOVES.values() for i in order[change == sign][:1]]
    others = order[~np.isin(order, chosen)][: OPENING - len(chosen)]
    return [*chosen, *others.tolist()]


def choose_further(before: np.ndarray, after: np.ndarray, count: int, chosen: list[int]) -> list[int]:
    """`count` more queries than those `chosen`: half, if there are as many, where refinement moved the first right result."""
    rng = np.random.default_rng(_SEED)
    left = np.setdiff1d(np.arange(len(before)), chosen)
    moved = rng.permutation(left[before[left] != after[left]])[: count // 2]
    others = rng.permutation(np.setdiff1d(left, moved))[: count - len(moved)]
    return [*moved.tolist(), *others.tolist()]
