"""What a global step sees: a pure function of (seed, step) over the index.

It knows neither workers nor nodes nor time. Nothing is stored between steps, so a run resumes at any position of a
set of any size at once: the order of an epoch is a keyed permutation that is evaluated at single places
(mmref/randomness.py), not an array that is shuffled.

For sets on object storage the order of an epoch keeps a window (`WindowedOrder`): a few shards at a time, drawn by the
seed, so that a node can hold them on its disk. With a file of neighbors it brings confusable objects together
(mmref/data/hard_groups.py). Several sets take turns by weight (`MixedPlan`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mmref.config import Config
from mmref.data.hard_groups import GroupedOrder, groups_of
from mmref.data.neighbors import read_neighbors
from mmref.data.sample_reader import SplitIndex
from mmref.errors import TooFewObjectsError
from mmref.randomness import RandomStream, draw, permute

STAND_INS = 256  # objects that are tried, at least, where a set has so many, before a step is given up as unreadable
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """The samples of one global step, object-major: sample i is image `i % Q` of object `i // Q`."""

    step: int
    images: Ints  # (n,) image positions in the index
    objects: Ints  # (n,) object rows
    captions: NDArray[np.uint64]  # (n,) draw for the caption: caption number = draw % captions of the image


class Order(Protocol):
    """The order in which an epoch visits the objects."""

    def __call__(self, epoch: int, first: int, count: int) -> Ints:
        """Objects (count,) at places first, first + 1, ... of an epoch, all different, in any order that is always the same. The
        last step asks beyond its end."""

    def at(self, epoch: int, places: Ints) -> Ints:
        """Objects at some places of an epoch."""

    def near(self, epoch: int, first: int, count: int) -> tuple[int, int]:
        """Places [low, high) of an epoch whose objects are read at the same time as those at first, first + 1, ..."""


@dataclass(frozen=True)
class ShuffledOrder:
    """A permutation of all objects; a step beyond the end is filled up from the start."""

    n_objects: int
    seed: int

    def __call__(self, epoch: int, first: int, count: int) -> Ints:
        return self.at(epoch, (first + np.arange(count)) % self.n_objects)

    def at(self, epoch: int, places: Ints) -> Ints:
        return permute(places, self.n_objects, draw(RandomStream.OBJECT_ORDER, self.seed, epoch, 0))

    def near(self, epoch: int, first: int, count: int) -> tuple[int, int]:
        return 0, self.n_objects


class WindowedOrder:
    """Shards in seeded order, `window` of them at a time; objects permuted inside a window.

    A step reads from one window, or from two where one ends. A step beyond the end of the epoch is moved back to it, so
    that it does not ask for shards of the start again.

    Which objects a step has is drawn from all of the window. In the step they lie as they do in the window, shard after
    shard: so the same part of every step comes from the same shards, and a node, which has one part of it, fetches those.
    """

    def __init__(self, shard_start: Ints, window: int, seed: int, by_shard: NDArray[np.int32] | None = None) -> None:
        """`shard_start` (S + 1,): the place of each shard's first object, and the number of objects; `by_shard` (m,): the object
        at each place, None where rows of objects are their places."""
        self.shard_start, self.window, self.seed, self.by_shard = shard_start, window, seed, by_shard
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def __call__(self, epoch: int, first: int, count: int) -> Ints:
        window, inside, size = self._permuted(epoch, self._within(first, count) + np.arange(count))
        # By the share of their window that lies before them: so where a step has the end of one window and the beginning of the
        # next, either is spread over all of the step.
        by_place = np.argsort(inside / size, kind="stable")
        return self._objects(epoch, window[by_place], inside[by_place])

    def at(self, epoch: int, places: Ints) -> Ints:
        window, inside, _ = self._permuted(epoch, places)
        return self._objects(epoch, window, inside)

    def _permuted(self, epoch: int, places: Ints) -> tuple[Ints, Ints, Ints]:
        """For places of an epoch: the window, the place in it of the object that comes there, and the window's size."""
        window_at = self._epoch(epoch)[2]
        window = np.searchsorted(window_at, places, side="right") - 1
        size = window_at[window + 1] - window_at[window]
        key = draw(RandomStream.OBJECT_ORDER, self.seed, epoch, window)
        return window, permute(places - window_at[window], size, key), size

    def _objects(self, epoch: int, window: Ints, inside: Ints) -> Ints:
        """The objects at places of windows, in which shard follows shard."""
        shards, shard_at, window_at = self._epoch(epoch)
        place = window_at[window] + inside  # among the epoch's objects, shard after shard
        shard = np.searchsorted(shard_at, place, side="right") - 1
        found = self.shard_start[shards[shard]] + place - shard_at[shard]
        return found if self.by_shard is None else self.by_shard[found].astype(np.int64)

    def near(self, epoch: int, first: int, count: int) -> tuple[int, int]:
        window_at, first = self._epoch(epoch)[2], self._within(first, count)
        low = np.searchsorted(window_at, first, side="right") - 1
        high = np.searchsorted(window_at, first + count, side="left")
        return int(window_at[low]), int(window_at[high])

    def _within(self, first: int, count: int) -> int:
        """The first place of a step, moved back where it would reach beyond the end of the epoch."""
        return min(first, int(self.shard_start[-1]) - count)

    def shards(self, epoch: int) -> Ints:
        """Shards in the order of an epoch."""
        return self._epoch(epoch)[0]

    def _lay_out(self, epoch: int) -> tuple[Ints, Ints, Ints]:
        """Shards of an epoch in order, and the place of the first object of each shard and of each window."""
        count = len(self.shard_start) - 1
        shards = permute(np.arange(count), count, draw(RandomStream.SHARD_ORDER, self.seed, epoch))
        shard_at = np.concatenate([[0], np.cumsum(np.diff(self.shard_start)[shards])])
        return shards, shard_at, shard_at[np.append(np.arange(0, count, self.window), count)]


@dataclass(frozen=True)
class Plan:
    """P objects x Q images of each at every step.

    An epoch visits every object once, in a new order; its last step is filled up, so no object is ever dropped. An
    object's images are visited in turn over the epochs, in an order of its own; where it has fewer than Q, they repeat.
    """

    object_start: Ints  # (m + 1,) first image of each object; images of an object are adjacent
    objects_per_step: int
    images_per_object: int
    seed: int
    order: Order | None = None  # ShuffledOrder by default

    def __post_init__(self) -> None:
        if not self.n_objects:
            raise TooFewObjectsError("the split has no objects.")
        if self.n_objects < self.objects_per_step:
            raise TooFewObjectsError(
                f"the split has {self.n_objects} objects, but a step takes {self.objects_per_step} different ones "
                f"(train.global_batch {self.objects_per_step * self.images_per_object} / train.images_per_object "
                f"{self.images_per_object}): set train.global_batch to at most {self.n_objects * self.images_per_object}."
            )
        if self.order is None:
            object.__setattr__(self, "order", ShuffledOrder(self.n_objects, self.seed))

    @property
    def n_objects(self) -> int:
        return len(self.object_start) - 1

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_objects // self.objects_per_step)

    def __call__(self, step: int) -> Step:
        epoch, within = divmod(step, self.steps_per_epoch)
        assert self.order is not None
        objects = self.order(epoch, within * self.objects_per_step, self.objects_per_step)
        count = self.object_start[objects + 1] - self.object_start[objects]  # (P,) images of each
        visit = epoch * self.images_per_object + np.arange(self.images_per_object)  # (Q,) running visit of an object
        # Every pass over an object's images has its own order; the number of the pass is visit // count.
        turn = visit[None, :] // count[:, None]
        key = draw(RandomStream.IMAGE_CHOICE, self.seed, turn, objects[:, None])
        chosen = permute(visit[None, :] % count[:, None], count[:, None], key)  # (P, Q)
        images = (self.object_start[objects][:, None] + chosen).reshape(-1)
        objects = np.repeat(objects, self.images_per_object)
        captions = draw(RandomStream.CAPTION_CHOICE, self.seed, step, np.arange(len(images)))
        return Step(step, images.astype(np.int64), objects.astype(np.int64), captions)

    def substitute(self, step: int, position: int, attempt: int) -> int | None:
        """Another image of the same object for a broken sample, by a seeded rule; None when all were tried."""
        planned = self(step)
        row = int(planned.objects[position])
        first, last = int(self.object_start[row]), int(self.object_start[row + 1])
        others = [i for i in range(first, last) if i != int(planned.images[position])]
        if attempt >= len(others):
            return None
        return others[int(permute(attempt, len(others), draw(RandomStream.SUBSTITUTES, self.seed, step, position)))]

    def stand_ins(self, step: int, slot: int) -> Iterator[Ints]:
        """Objects that may take the place of the object at `slot` of a step when none of its images can be read: the images of
        one after the other, in the order in which they are to be used.

        They are drawn by the seed from the objects outside the step, those that are read at the same time first, and each slot
        has a share of its own of them: two slots that need one do not take the same. When a share is used up, those of the
        other slots follow, and the step's own objects at last. An object that is in a step twice is right as well: what is a
        positive is told by the object.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        assert self.order is not None
        first, count = within * self.objects_per_step, self.objects_per_step
        own = self.order(epoch, first, count)
        drawn: list[int] = []
        key = draw(RandomStream.STAND_INS, self.seed, step)
        for low, high in (self.order.near(epoch, first, count), (0, self.n_objects)):
            some = np.arange(min(high - low, 2 * count + STAND_INS))
            drawn += self.order.at(epoch, low + permute(some, high - low, key)).tolist()
        taken = set(own.tolist())
        outside = [row for row in dict.fromkeys(drawn) if row not in taken]
        for turn in range(count):
            yield from self._images(step, slot, outside[(slot + turn) % count :: count])
        yield from self._images(step, slot, np.roll(own, -slot)[1:].tolist())

    def _images(self, step: int, slot: int, objects: list[int]) -> Iterator[Ints]:
        """All images of each object in a seeded order."""
        for row in objects:
            start, size = int(self.object_start[row]), int(self.object_start[row + 1] - self.object_start[row])
            yield start + permute(np.arange(size), size, draw(RandomStream.STAND_IN_IMAGES, self.seed, step, slot, row))


PERIOD = 1000  # steps in which each set of a mixture has its share exactly


class MixedPlan:
    """Several sets take turns: a step's samples are of one set, drawn by the seed so that each has its share of the steps.

    So the negatives of a step are of its own set, the hard ones. Images and objects are numbered through over the sets.
    """

    def __init__(self, plans: list[Plan], shares: list[float], seed: int) -> None:
        """`shares` of the steps, one for each plan, 1 in all."""
        self.plans, self.seed = plans, seed
        exact = np.array(shares) * PERIOD
        counts = np.floor(exact).astype(np.int64)
        counts[np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]] += 1  # largest remainders
        self.counts = counts
        self.first_image = np.cumsum([0, *(int(p.object_start[-1]) for p in plans)])
        self.first_object = np.cumsum([0, *(p.n_objects for p in plans)])
        self.objects_per_step, self.images_per_object = plans[0].objects_per_step, plans[0].images_per_object
        self._period = lru_cache(maxsize=2)(self._turns)

    def _turns(self, period: int) -> Ints:
        """The set of each step of a period, (PERIOD,)."""
        shuffled = permute(np.arange(PERIOD), PERIOD, draw(RandomStream.SET_TURNS, self.seed, period))
        return np.searchsorted(np.cumsum(self.counts), shuffled, side="right")

    def turn(self, step: int) -> tuple[int, int]:
        """The set of a step, and how many steps that set has had before."""
        period, at = divmod(step, PERIOD)
        turns = self._period(period)
        part = int(turns[at])
        return part, period * int(self.counts[part]) + int((turns[:at] == part).sum())

    def __call__(self, step: int) -> Step:
        part, own = self.turn(step)
        planned = self.plans[part](own)
        return Step(step, planned.images + self.first_image[part], planned.objects + self.first_object[part], planned.captions)

    def substitute(self, step: int, position: int, attempt: int) -> int | None:
        """As Plan.substitute."""
        part, own = self.turn(step)
        found = self.plans[part].substitute(own, position, attempt)
        return None if found is None else found + int(self.first_image[part])

    def stand_ins(self, step: int, slot: int) -> Iterator[Ints]:
        """As Plan.stand_ins: objects of the step's own set."""
        part, own = self.turn(step)
        for images in self.plans[part].stand_ins(own, slot):
            yield images + self.first_image[part]


def windowed_order(shard: NDArray[np.int32], window: int, seed: int) -> WindowedOrder:
    """The order of objects (m,) in windows of shards, of which `shard` is the one that holds the first image of each.

    In a set that was built objects lie shard after shard. In one whose tars were indexed in place they do not, and the order of
    its objects by shard takes four bytes of memory for each.
    """
    by_shard = None
    if (np.diff(shard) < 0).any():
        by_shard = np.argsort(shard, kind="stable").astype(np.int32)
        shard = shard[by_shard]
    shard_start = np.append(np.flatnonzero(np.diff(shard, prepend=-1)), len(shard))
    return WindowedOrder(shard_start, window, seed, by_shard)


def _part_of(config: Config, number: int) -> str:
    """Which of several sets is too small, and whether its objects were drawn; empty of a single one."""
    data = config.data
    if not data.mix:
        return ""
    drawn = f"`data.max_objects` {data.max_objects} draws them from all sets together; " if data.max_objects else ""
    return f"{[data.root, *data.mix][number]}: {drawn}"


def build_plan(config: Config, index: SplitIndex) -> Plan | MixedPlan:
    """The plan of a run over its training index (`train_index`). Raises TooFewObjectsError, NeighborsError."""
    data, seed = config.data, config.train.seed
    hard = read_neighbors(data.neighbors, index).rows if data.neighbors and data.hard_share else None
    groups = groups_of(data.hard_share, config.objects_per_step, data.group_size)
    bounds = [*index.first_objects, index.n_objects]
    plans = []
    for first, last in itertools.pairwise(bounds):
        start = index.object_start[first : last + 1]
        order: Order | None = None
        if data.window_shards:
            order = windowed_order(index.shard[start[:-1]], data.window_shards, seed)
        if hard is not None:
            rows = hard[first:last]
            rows = np.where(rows < 0, rows, rows - first).astype(np.int32)
            order = GroupedOrder(rows, config.objects_per_step, groups, data.group_size, seed)
        own = start - start[0] if first else start
        try:
            plans.append(Plan(own, config.objects_per_step, config.train.images_per_object, seed, order))
        except TooFewObjectsError as error:
            raise TooFewObjectsError(f"{_part_of(config, len(plans))}{error}") from None
    if len(plans) == 1:
        return plans[0]
    shares = list(data.mix.values())
    return MixedPlan(plans, [1 - sum(shares), *shares], seed)
