"""The order of an epoch that brings confusable objects together: some places of each step are taken by groups of neighbors.

As without groups, an epoch visits every object once. It costs a pass over the objects once an epoch and process, of some
microseconds an object, and 4 bytes an object for each of two epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from mmref.data.neighbors import NONE
from mmref.randomness import RandomStream, draw, permute

Ints = NDArray[np.int64]
ANCHORS_AT_ONCE = 4096  # whose neighbors are put in order together


class GroupedOrder:
    """A permutation of all objects in which each step begins with groups of neighbors; a step beyond the end is filled up from
    the start.

    A group is an object, the anchor, and others that are drawn from its neighbors. Anchors come in an order drawn anew for each
    epoch. Who is in a group already is passed over, so an anchor may have too few neighbors left: it waits until all others have
    been asked. A group that is still short is then filled up with objects as they come.
    """

    def __init__(self, neighbors: NDArray[np.int32], per_step: int, groups: int, size: int, seed: int) -> None:
        """
        Args:
            neighbors: (m, k) rows of the neighbors of each object, NONE where there are fewer.
            per_step: objects P of a step.
            groups: of them, at the beginning of each step; at least 1.
            size: objects of a group.
            seed: of the run.
        """
        self.neighbors, self.n_objects = neighbors, len(neighbors)
        self.per_step, self.groups, self.size, self.seed = per_step, groups, size, seed
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def __call__(self, epoch: int, first: int, count: int) -> Ints:
        return self.at(epoch, (first + np.arange(count)) % self.n_objects)

    def at(self, epoch: int, places: Ints) -> Ints:
        return self._epoch(epoch)[places].astype(np.int64)

    def near(self, epoch: int, first: int, count: int) -> tuple[int, int]:
        return 0, self.n_objects

    def _lay_out(self, epoch: int) -> NDArray[np.int32]:
        """The objects of an epoch in order, (m,)."""
        whole, rest = divmod(self.n_objects, self.per_step)
        in_rest = min(self.groups, rest // self.size)  # groups of the last step, where it is a part of one
        grouped, single = self._groups(epoch, whole * self.groups + in_rest)
        # Groups that had to be filled up came last. Their places are drawn, or the last steps would have them all.
        key = draw(RandomStream.HARD_GROUPS, self.seed, epoch, 1, 0)
        grouped = grouped[permute(np.arange(len(grouped)), len(grouped), key)]
        hard = grouped[: whole * self.groups].reshape(whole, self.groups * self.size)
        easy = single[: whole * (self.per_step - hard.shape[1])].reshape(whole, -1)
        parts = np.concatenate([hard, easy], 1).reshape(-1), grouped[len(grouped) - in_rest :].reshape(-1), single[easy.size :]
        return np.concatenate(parts)

    def _groups(self, epoch: int, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Groups (count, size) of an epoch, and the objects that are in none, in the order of anchors."""
        key = draw(RandomStream.HARD_GROUPS, self.seed, epoch, 0, 0)
        sequence = permute(np.arange(self.n_objects), self.n_objects, key).astype(np.int32)
        taken = bytearray(self.n_objects)
        groups: list[list[int]] = []
        waiting: list[tuple[int, list[int]]] = []
        for anchor, others in self._anchors(epoch, sequence):
            if len(groups) == count:
                break
            if taken[anchor]:
                continue
            free = _free(others, taken, self.size - 1)
            if len(free) < self.size - 1:
                waiting.append((anchor, others))
                continue
            groups.append([anchor, *free])
            for row in groups[-1]:
                taken[row] = 1
        rest = iter(sequence.tolist())
        for anchor, others in waiting:
            if len(groups) == count:
                break
            if taken[anchor]:
                continue
            taken[anchor] = 1
            group = [anchor, *_free(others, taken, self.size - 1)]
            for row in group:
                taken[row] = 1
            while len(group) < self.size:
                row = next(rest)  # there are enough: groups are no more than have place
                if not taken[row]:
                    taken[row] = 1
                    group.append(row)
            groups.append(group)
        free_now = np.frombuffer(taken, dtype=np.uint8) == 0
        return np.array(groups, dtype=np.int32).reshape(count, self.size), sequence[free_now[sequence]]

    def _anchors(self, epoch: int, sequence: NDArray[np.int32]) -> Iterator[tuple[int, list[int]]]:
        """Each object, in order, with its neighbors in an order drawn for the epoch."""
        for start in range(0, len(sequence), ANCHORS_AT_ONCE):
            some = sequence[start : start + ANCHORS_AT_ONCE]
            others = self.neighbors[some]
            drawn = draw(RandomStream.HARD_GROUPS, self.seed, epoch, 2 + some[:, None], np.arange(others.shape[1]))
            yield from zip(some.tolist(), np.take_along_axis(others, drawn.argsort(1, kind="stable"), 1).tolist())


def _free(rows: list[int], taken: bytearray, most: int) -> list[int]:
    """The first `most` rows that are in no group yet."""
    found: list[int] = []
    for row in rows:
        if row != NONE and not taken[row]:
            found.append(row)
            if len(found) == most:
                break
    return found


def groups_of(share: float, per_step: int, size: int) -> int:
    """How many groups of a size come nearest to a share of a step's objects, and have place in it."""
    return min(int(share * per_step / size + 0.5), per_step // size)
