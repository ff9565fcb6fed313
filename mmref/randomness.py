"""The one source of randomness of a run: every number is a function of (stream, seed, step, position).

Nothing is stored between draws and nothing is drawn in turn. So a number does not depend on the number of workers, on
accumulation, or on where a run was resumed, and a worker draws the numbers of its own samples alone.

A stream is a use of random numbers (`RandomStream`). Two streams share no numbers, whatever the seed. No other module of
mmref computes a seed; tests/test_randomness.py sees to it. Scores have fixed seeds of their own (mmref/evaluate): they
must not change with the run's.

The mixing function is the finalizer of SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
Generators", OOPSLA 2014, with the constants of Stafford's variant 13), applied once for each of the numbers that name a
draw.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # the readers of samples run without PyTorch, which takes seconds to import
    from torch import Tensor

_U64 = np.uint64
_GAMMA, _FIRST, _SECOND = _U64(0x9E3779B97F4A7C15), _U64(0xBF58476D1CE4E5B9), _U64(0x94D049BB133111EB)
_ROUNDS = 5  # of the Feistel network; four already make a permutation that passes for random (Luby and Rackoff 1988)
Number = int | np.integer | NDArray[np.integer]
Draws = NDArray[np.uint64]


class RandomStream(enum.IntEnum):
    """What random numbers are drawn for, and the meaning of step and position where they are more than their names say.

    A new use gets a new number. The numbers in use stay, or every run's results change. The sets of a mixture share
    streams and count their own steps, so that each set keeps the order that it has alone.
    """

    OBJECT_ORDER = 1  # objects of an epoch; step: epoch, position: window of shards
    SHARD_ORDER = 2  # shards of an epoch; step: epoch
    IMAGE_CHOICE = 3  # images of an object in turn; step: pass over its images, position: object
    CAPTION_CHOICE = 4
    SET_TURNS = 5  # which set of a mixture a step takes; step: period of the mixture
    SUBSTITUTES = 7  # images that replace a broken one
    STAND_INS = 8  # objects that replace one without a readable image
    STAND_IN_IMAGES = 9  # images of those; positions: slot of the step, object
    CAPTION_SWAP = 10  # whether a caption is swapped; positions: image, number of the caption, as in the next two
    CAPTION_DONOR = 11  # whose caption it gets; one more position: attempt
    CAPTION_DROP = 12  # which words are dropped; one more position: word
    AUGMENTATION = 13
    WORD_MASKS = 14
    SAMPLED_NEGATIVES = 15
    INITIAL_REFERENCES = 16  # positions: object, reference, component
    INITIAL_WEIGHTS = 17
    DROPOUT = 18  # position: rank
    HARD_GROUPS = 19  # step: epoch; positions: 0 for the order of anchors, 1 of groups, 2 + anchor of its neighbors; neighbor
    LEDGER = 20  # fingerprints of samples that were seen; positions: place in the batch, image
    DOUBTED_PAIRS = 21  # labels of pairs that RDE's two directions disagree on; position: number of the pair
    CHOSEN_OBJECTS = 22  # which objects are trained on where not all are; position: object
    CHOSEN_IMAGES = 23  # which images of them; position: image


def draw(stream: RandomStream, seed: int, step: Number, *position: Number) -> Draws:
    """64-bit draws, uniform over all values. Draws that differ in their last position alone are never equal.

    Args:
        stream: what they are for.
        seed: of the run, any whole number; its lowest 64 bits count.
        step: of the run, or what the stream counts in its place; 0 where a draw never changes.
        position: numbers that tell a step's draws from each other, such as the place of a sample in the global batch
            and that of a word in its caption. Arrays are broadcast against each other. A stream's draws all have
            the same number of positions.

    Returns:
        uint64, of the shape that step and positions have together.
    """
    state: Draws = np.zeros((), dtype=_U64)
    for part in (int(stream), seed, step, *position):
        state = _mix(state, part)
    return state


def uniform(stream: RandomStream, seed: int, step: Number, *position: Number) -> NDArray[np.float64]:
    """Draws in [0, 1) of 53 bits; arguments as of `draw`."""
    return (draw(stream, seed, step, *position) >> _U64(11)).astype(np.float64) * 2.0**-53


def integers(below: int, stream: RandomStream, seed: int, step: Number, *position: Number) -> NDArray[np.int64]:
    """Draws from 0 .. below - 1; arguments as of `draw`. The error of a remainder of 64 bits is below / 2**64."""
    return (draw(stream, seed, step, *position) % _U64(below)).astype(np.int64)


def uniform_tensor(stream: RandomStream, seed: int, step: Number, *position: Number) -> Tensor:
    """fp32 draws in [0, 1) of 24 bits, all that fp32 has there, in host memory; arguments as of `draw`."""
    import torch

    bits = draw(stream, seed, step, *position) >> _U64(40)
    return torch.from_numpy(bits.astype(np.float32)).mul_(2.0**-24)


def normal_tensor(stream: RandomStream, seed: int, step: Number, *position: Number) -> Tensor:
    """fp32 draws from the standard normal distribution by Box and Muller (1958), at most 5.8 from 0, in host memory.

    Arguments as of `draw`.
    """
    import torch

    bits = draw(stream, seed, step, *position)
    top, low = (torch.from_numpy(part.astype(np.float32)) for part in (bits >> _U64(40), bits & _U64(0xFFFFFF)))
    radius = (top + 1) * 2.0**-24  # in (0, 1], where the logarithm is finite
    angle = low * (2 * torch.pi * 2.0**-24)
    return radius.log_().mul_(-2).sqrt_().mul_(angle.cos_())


def torch_seed(stream: RandomStream, seed: int, step: int, *position: int) -> int:
    """Seed for one of PyTorch's own generators, for what draws inside PyTorch; arguments as of `draw`.

    At most 63 bits, as PyTorch takes them. Its generator for the CPU uses the lowest 32 of them.
    """
    return int(draw(stream, seed, step, *position) >> _U64(1))


def permute(place: Number, size: Number, key: Number) -> NDArray[np.int64]:
    """Value at a place of a pseudo-random permutation of 0 .. size - 1, element-wise. A larger size takes no longer.

    A Feistel network over the next power of 4, walked along its cycle until the value is below the size.

    Args:
        place: ints in [0, size).
        size: one size, or one for each place.
        key: a draw, or one for each place. Another key is another permutation.
    """
    keys = [_mix(np.asarray(key).astype(_U64), number) for number in range(_ROUNDS)]
    place, size, _ = np.broadcast_arrays(np.asarray(place), np.asarray(size), keys[0])
    value, size_ = place.astype(_U64), size.astype(_U64)
    half = np.ones_like(value)  # bits of one half: the domain 4 ** half covers the size
    while bool((small := (_U64(1) << (_U64(2) * half)) < size_).any()):
        half = half + small.astype(_U64)
    low = (_U64(1) << half) - _U64(1)
    pending = np.ones(value.shape, dtype=bool)
    while True:
        left, right = value >> half, value & low
        for of_round in keys:
            left, right = right, left ^ (_mix(of_round, right) & low)
        value = np.where(pending, (left << half) | right, value)
        pending = pending & (value >= size_)
        if not pending.any():
            return value.astype(np.int64)


def _mix(state: Draws, part: Number) -> Draws:
    """The state after one more number. Different numbers lead from one state to different states."""
    if isinstance(part, int):
        part = np.asarray(part & 0xFFFFFFFFFFFFFFFF, dtype=_U64)  # a negative number as its two's complement
    with np.errstate(over="ignore"):  # sums and products are meant modulo 2**64
        mixed = (state ^ np.asarray(part).astype(_U64)) + _GAMMA
        mixed = (mixed ^ (mixed >> _U64(30))) * _FIRST
        mixed = (mixed ^ (mixed >> _U64(27))) * _SECOND
        return mixed ^ (mixed >> _U64(31))
