"""What a global step sees: a pure function of (seed, step) over the index.

It knows neither workers nor nodes nor time. Nothing is stored between steps, so a run resumes at any position of a
set of any size at once: the order of an epoch is a keyed permutation that is evaluated at single positions
(a Feistel network with cycle walking), not an array that is shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmref.config import Config
from mmref.data.shards import SplitIndex
from mmref.errors import TooFewObjectsError

_U64 = np.uint64
Ints = NDArray[np.int64]


def mix(*parts: int | NDArray) -> NDArray[np.uint64]:
    """64-bit hash of integers or arrays of them (splitmix64 finaliser, chained)."""
    state: NDArray[np.uint64] = np.zeros((), dtype=_U64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ np.asarray(part).astype(_U64)) + _U64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> _U64(27))) * _U64(0x94D049BB133111EB)
            state = state ^ (state >> _U64(31))
    return state


def permute(position: NDArray, size: NDArray | int, key: NDArray | int) -> Ints:
    """Value at `position` of a keyed pseudo-random permutation of 0 .. size - 1, element-wise.

    Args:
        position: ints in [0, size).
        size: one size, or one for each position.
        key: one key, or one for each position; another key is another permutation.
    """
    position, size_, key_ = np.broadcast_arrays(np.asarray(position), np.asarray(size), np.asarray(key))
    value = position.astype(_U64)
    size_u, key_u = size_.astype(_U64), key_.astype(_U64)
    half = np.ones_like(value)  # bits of one half: the domain 4 ** half covers the size
    while bool((small := (_U64(1) << (_U64(2) * half)) < size_u).any()):
        half = half + small.astype(_U64)
    low = (_U64(1) << half) - _U64(1)
    pending = np.ones(value.shape, dtype=bool)
    while True:
        left, right = value >> half, value & low
        for round_ in range(5):
            left, right = right, left ^ (mix(key_u, round_, right) & low)
        value = np.where(pending, (left << half) | right, value)
        pending = pending & (value >= size_u)
        if not pending.any():
            return value.astype(np.int64)


@dataclass(frozen=True)
class Step:
    """The samples of one global step, object-major: sample i is image `i % Q` of object `i // Q`."""

    step: int
    images: Ints  # (n,) image positions in the index
    objects: Ints  # (n,) object rows
    captions: NDArray[np.uint64]  # (n,) draw for the caption: caption number = draw % captions of the image


@dataclass(frozen=True)
class Plan:
    """P objects x Q images of each at every step.

    An epoch visits every object once, in a new order; its last step is filled up with objects from its start, so no
    object is ever dropped. An object's images are visited in turn over the epochs, in an order of its own.
    """

    object_start: Ints  # (m + 1,) first image of each object; images of an object are adjacent
    objects_per_step: int
    images_per_object: int
    seed: int

    def __post_init__(self) -> None:
        if self.n_objects < self.objects_per_step:
            raise TooFewObjectsError(
                f"the split has {self.n_objects} objects, but a step takes {self.objects_per_step} different ones "
                f"(train.global_batch {self.objects_per_step * self.images_per_object} / train.images_per_object "
                f"{self.images_per_object}): set train.global_batch to at most {self.n_objects * self.images_per_object}."
            )

    @property
    def n_objects(self) -> int:
        return len(self.object_start) - 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_objects // self.objects_per_step)

    def __call__(self, step: int) -> Step:
        epoch, within = divmod(step, self.steps_per_epoch)
        position = (within * self.objects_per_step + np.arange(self.objects_per_step)) % self.n_objects
        objects = permute(position, self.n_objects, int(mix(self.seed, epoch, 1)))
        count = self.object_start[objects + 1] - self.object_start[objects]  # (P,) images of each
        visit = epoch * self.images_per_object + np.arange(self.images_per_object)  # (Q,) running visit of an object
        # every pass over an object's images has its own order: pass number = visit // count
        turn = visit[None, :] // count[:, None]
        key = mix(self.seed, objects[:, None], turn, 2)
        chosen = permute(visit[None, :] % count[:, None], count[:, None], key)  # (P, Q)
        images = (self.object_start[objects][:, None] + chosen).reshape(-1)
        objects = np.repeat(objects, self.images_per_object)
        captions = mix(self.seed, step, np.arange(len(images)), 3)
        return Step(step, images.astype(np.int64), objects.astype(np.int64), captions)

    def substitute(self, step: int, position: int, attempt: int) -> int | None:
        """Another image of the same object for a broken sample, by a seeded rule; None when all were tried."""
        planned = self(step)
        row = int(planned.objects[position])
        first, last = int(self.object_start[row]), int(self.object_start[row + 1])
        others = [i for i in range(first, last) if i != int(planned.images[position])]
        if attempt >= len(others):
            return None
        key = int(mix(self.seed, step, position, 4))
        return others[int(permute(np.array([attempt]), len(others), key)[0])]


def build_plan(config: Config, index: SplitIndex) -> Plan:
    """The plan of a run over its train split. Raises TooFewObjectsError."""
    return Plan(index.object_start, config.objects_per_step, config.train.images_per_object, config.train.seed)
