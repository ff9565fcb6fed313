"""Draws against a slow twin, their statistics at fixed seeds, and that no other module makes a generator of its own."""

from __future__ import annotations

import ast
import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmref
from mmref.randomness import RandomStream, draw, integers, normal_tensor, permute, torch_seed, uniform, uniform_tensor

STREAMS = list(RandomStream)

# -- what is drawn ---------------------------------------------------------------------------------------------------


PINNED = {
    "OBJECT_ORDER": "e28195ddd9ee4956",
    "SHARD_ORDER": "90a5cb3b55b40acf",
    "IMAGE_CHOICE": "d6383c097c7c0f99",
    "CAPTION_CHOICE": "1af0363017cd7574",
    "SET_TURNS": "e31658d80f98af08",
    "SUBSTITUTES": "2bf6f81349ecc50e",
    "STAND_INS": "617d926e7d57d3ba",
    "STAND_IN_IMAGES": "90430cc9fca3bb12",
    "CAPTION_SWAP": "c6dce91e09e6ee75",
    "CAPTION_DONOR": "9eab99d4522f4b65",
    "CAPTION_DROP": "035dedd5a013a2fd",
    "AUGMENTATION": "e3ca8e994f2737d8",
    "WORD_MASKS": "e10fc2a08299b2b6",
    "SAMPLED_NEGATIVES": "eafece32b2547b56",
    "INITIAL_REFERENCES": "2964261b54de3f26",
    "INITIAL_WEIGHTS": "f4fcb2652433a66d",
    "DROPOUT": "147a2b366ba5f871",
    "HARD_GROUPS": "dd1199c45432d089",
    "LEDGER": "fc48f5ebc4ceca25",
    "DOUBTED_PAIRS": "526ac2c0337a70b4",
    "CHOSEN_OBJECTS": "14c00f0b034c5c81",
    "CHOSEN_IMAGES": "1e5ba957e7a1e915",
}


def test_the_first_draw_of_every_stream_is_what_it_always_was():
    """A change of these numbers changes the results of every run."""
    assert {stream.name: f"{int(draw(stream, 0, 0, 0)):016x}" for stream in RandomStream} == PINNED


def test_other_kinds_of_numbers_are_what_they_always_were():
    assert integers(1000, RandomStream.SAMPLED_NEGATIVES, 3, 7, np.arange(6)).tolist() == [788, 308, 502, 950, 59, 663]
    assert permute(np.arange(12), 12, draw(RandomStream.OBJECT_ORDER, 3, 1, 0)).tolist() == [
        10,
        0,
        3,
        5,
        1,
        11,
        4,
        2,
        7,
        9,
        6,
        8,
    ]
    assert torch_seed(RandomStream.DROPOUT, 3, 7, 1) == 2599837409662524248
    assert uniform(RandomStream.CAPTION_SWAP, 3, 0, 5, 1) == pytest.approx(0.16847734003085824, rel=1e-12)
    assert normal_tensor(RandomStream.INITIAL_REFERENCES, 3, 0, np.arange(3)).tolist() == pytest.approx(
        [1.235412, 1.246497, 1.56778], abs=1e-5
    )


def twin(*parts: int) -> int:
    """`draw` in whole numbers of any size."""
    state, mask = 0, 2**64 - 1
    for part in parts:
        state = ((state ^ (part & mask)) + 0x9E3779B97F4A7C15) & mask
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state


anything = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(STREAMS), st.integers(-(2**70), 2**70), anything, st.lists(anything, max_size=3))
def test_a_draw_equals_its_slow_twin(stream, seed, step, position):
    expected = twin(stream, seed, step, *position)
    assert int(draw(stream, seed, step, *position)) == expected
    arrays = [np.array([part], dtype=np.int64) for part in position]
    if arrays:
        assert draw(stream, seed, step, *arrays).tolist() == [expected]
    assert torch_seed(stream, seed, step, *position) == expected >> 1 < 2**63
    assert integers(7, stream, seed, step, *position) == expected % 7
    assert uniform(stream, seed, step, *position) == (expected >> 11) / 2**53


def test_positions_are_broadcast():
    grid = draw(RandomStream.WORD_MASKS, 3, 9, np.arange(4)[:, None], np.arange(5))
    assert grid.shape == (4, 5) and grid.dtype == np.uint64 and len(set(grid.ravel().tolist())) == 20
    assert int(grid[2, 4]) == int(draw(RandomStream.WORD_MASKS, 3, 9, 2, 4)) != int(draw(RandomStream.WORD_MASKS, 3, 9, 4, 2))
    steps = draw(RandomStream.IMAGE_CHOICE, 3, np.array([[0, 1, 2]]), np.array([[5], [6]]))
    assert steps.shape == (2, 3) and int(steps[1, 2]) == int(draw(RandomStream.IMAGE_CHOICE, 3, 2, 6))


@pytest.mark.parametrize("make", [draw, uniform, uniform_tensor, normal_tensor])
@pytest.mark.parametrize("cuts", [[], [1], [64, 128, 192], [3, 100, 101, 255]])
def test_a_share_is_a_slice_of_the_whole(make, cuts):
    def of(first, last):
        return np.asarray(make(RandomStream.AUGMENTATION, 5, 11, np.arange(first, last)[:, None], np.arange(8)))

    edges = [0, *cuts, 256]
    assert np.array_equal(np.concatenate([of(a, b) for a, b in itertools.pairwise(edges)]), of(0, 256))


# -- streams, seeds and steps do not meet ----------------------------------------------------------------------------


def test_streams_have_numbers_of_their_own():
    assert len({int(stream) for stream in RandomStream}) == len(RandomStream.__members__), "two names for one stream"


@pytest.mark.parametrize("one, other", itertools.combinations(STREAMS, 2), ids=lambda stream: stream.name)
def test_streams_differ_at_seed_0(one, other):
    """No number in common, and none to be guessed from the other's."""
    positions = np.arange(4000)
    first, second = (draw(stream, 0, 0, positions) for stream in (one, other))
    assert not set(first.tolist()) & set(second.tolist())
    x, y = (uniform(stream, 0, 0, positions) for stream in (one, other))
    assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(4000)
    assert abs(differing_bits(first, second) - 32) < 5 * 4 / math.sqrt(4000)


def differing_bits(a, b):
    """Mean number of bits, of 64, in which draws differ: 32 where they have nothing to do with each other."""
    return float(np.unpackbits((a ^ b).view(np.uint8)).sum()) / a.size


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
def test_neighbouring_seeds_steps_and_positions_share_no_draw(stream):
    grids = [draw(stream, seed, np.arange(60)[:, None], np.arange(200)) for seed in (-2, -1, *range(8), 1_763_800_000, 2**62)]
    values = np.concatenate([grid.ravel() for grid in grids])
    assert len(np.unique(values)) == len(values) == 144_000
    # what arithmetic on seeds gets wrong: (seed, step + 1) must not be (seed + 1, step), nor a step a shifted other one
    for a, b in (
        (grids[2], grids[3]),
        (grids[2][1:], grids[2][:-1]),
        (grids[2][1:], grids[3][:-1]),
        (grids[2][1:, :-1], grids[2][:-1, 1:]),
    ):
        a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
        assert abs(differing_bits(a, b) - 32) < 0.3


def test_every_bit_of_seed_step_and_position_counts():
    """A change of one bit changes each bit of a draw in half of the cases."""
    at = np.arange(2000)
    plain = draw(RandomStream.AUGMENTATION, 12, 34, at)
    for bit in range(63):
        for changed in (
            draw(RandomStream.AUGMENTATION, 12 ^ (1 << bit), 34, at),
            draw(RandomStream.AUGMENTATION, 12, 34 ^ (1 << bit), at),
            draw(RandomStream.AUGMENTATION, 12, 34, at ^ (1 << bit)),
        ):
            flips = np.unpackbits((plain ^ changed).view(np.uint8).reshape(-1, 8), axis=1).mean(0)
            assert np.abs(flips - 0.5).max() < 6 * 0.5 / math.sqrt(2000)


# -- distributions ---------------------------------------------------------------------------------------------------


def kolmogorov_smirnov(sample, distribution):
    """Largest distance of an empirical distribution from `distribution`, times the root of the number of samples."""
    x = np.sort(np.asarray(sample, dtype=np.float64).ravel())
    expected, n = distribution(x), len(x)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max((steps[1:] - expected).max(), (expected - steps[:-1]).max())


@pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)
@pytest.mark.parametrize(
    "step, position",
    [(0, (np.arange(20_000),)), (np.arange(20_000), (0,)), (5, (np.arange(200)[:, None], np.arange(100)))],
    ids=["positions", "steps", "two positions"],
)
def test_draws_are_uniform(stream, step, position):
    """By Kolmogorov and Smirnov, and by chi-square on the highest and the lowest bits. Each fails once in 10,000 times."""
    assert kolmogorov_smirnov(uniform(stream, 0, step, *position), lambda x: x) < 2.23
    draws = draw(stream, 0, step, *position).ravel()
    for cells in (draws >> np.uint64(56), draws & np.uint64(255)):
        counts = np.bincount(cells.astype(np.int64), minlength=256)
        expected = len(draws) / 256
        assert ((counts - expected) ** 2 / expected).sum() < 347, "255 degrees of freedom"


def test_uniform_numbers_lie_below_1():
    for x in (
        uniform(RandomStream.AUGMENTATION, 0, 0, np.arange(300_000)),
        uniform_tensor(RandomStream.AUGMENTATION, 0, 0, np.arange(300_000)),
    ):
        assert 0 <= float(x.min()) < 1e-4 and 1 - 1e-4 < float(x.max()) < 1
    assert x.dtype == torch.float32
    at = [p for p in range(200) if int(draw(RandomStream.AUGMENTATION, 0, 0, p)) >> 63]  # the largest halves keep their bits
    assert uniform_tensor(RandomStream.AUGMENTATION, 0, 0, np.array(at)).numpy() == pytest.approx(
        uniform(RandomStream.AUGMENTATION, 0, 0, np.array(at)), abs=2**-24
    )


def test_integers_are_even():
    drawn = integers(1000, RandomStream.SAMPLED_NEGATIVES, 0, 3, np.arange(100_000))
    counts = np.bincount(drawn, minlength=1000)
    assert drawn.dtype == np.int64 and len(counts) == 1000
    assert ((counts - 100) ** 2 / 100).sum() < 1172, "999 degrees of freedom, once in 10,000 times"


def test_normal_numbers_are_normal():
    x = normal_tensor(RandomStream.INITIAL_REFERENCES, 0, 0, np.arange(300)[:, None], np.arange(200))
    assert x.shape == (300, 200) and x.dtype == torch.float32 and torch.isfinite(x).all()
    normal = np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))
    assert kolmogorov_smirnov(x.numpy(), normal) < 2.23
    assert x.abs().max() > 4 and torch.corrcoef(x[:100]).fill_diagonal_(0).abs().max() < 0.35


# -- permutations ----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 4095, 4097, 70_000])
def test_permute_is_a_bijection_around_powers_of_the_domain(size):
    values = permute(np.arange(size), size, 7)
    assert values.dtype == np.int64 and np.array_equal(np.sort(values), np.arange(size))


def test_permute_takes_a_size_and_key_for_each_place():
    sizes, keys = np.array([1, 5, 300, 17, 5]), np.array([3, 9, 2**64 - 1, 0, 8], dtype=np.uint64)
    for place in range(5):
        at = np.minimum(place, sizes - 1)
        together = permute(at, sizes, keys)
        assert together.tolist() == [int(permute(p, int(s), int(k))) for p, s, k in zip(at, sizes, keys, strict=True)]
    turned = permute(np.arange(3)[:, None], 9, keys)
    assert turned.shape == (3, 5) and int(turned[2, 1]) == int(permute(2, 9, 9))


def test_keys_give_different_and_even_orders():
    orders = {tuple(permute(np.arange(20), 20, key).tolist()) for key in range(500)}
    assert len(orders) == 500
    first = Counter(order[0] for order in orders)
    assert len(first) == 20 and max(first.values()) < 60, "every value comes first about 25 times"


def test_every_order_of_a_few_comes_up_alike():
    keys = draw(RandomStream.SUBSTITUTES, 0, 0, np.arange(24_000))
    orders = Counter(map(tuple, permute(np.arange(4), 4, keys[:, None]).tolist()))
    assert len(orders) == 24 and sum((n - 1000) ** 2 / 1000 for n in orders.values()) < 300, "about 1000 of each"


# -- nobody else -----------------------------------------------------------------------------------------------------

GENERATORS = {
    "manual_seed", "manual_seed_all", "default_rng", "RandomState", "SeedSequence", "PCG64", "MT19937", "Philox", "SFC64",
    "Random", "seed",
}  # fmt: skip


def name_of(node):
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def own_seeds(source: str) -> list[int]:
    """Lines that compute a seed, or make a generator out of more than a fixed number or a seed as it is."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Add):
            operands = [name_of(side).lower() for side in (node.left, node.right)]
            found = any(operand == "seed" or operand.endswith("_seed") for operand in operands)
        elif isinstance(node, ast.Call) and name_of(node.func) in GENERATORS:
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            given_ = [a for a in arguments if not (isinstance(a, ast.Call) and name_of(a.func) == "torch_seed")]
            parts = [part for a in given_ for part in ast.walk(a)]
            found = not arguments or any(isinstance(part, ast.BinOp | ast.Call | ast.IfExp) for part in parts)
        elif isinstance(node, ast.Constant):  # the factor of a mixing function
            found = isinstance(node.value, int) and node.value > 2**48
        else:
            found = isinstance(node, ast.Import) and any(alias.name == "random" for alias in node.names)
        if found:
            lines.append(node.lineno)
    return lines


def test_no_other_module_computes_seeds():
    folder = Path(mmref.__file__).parent
    sources = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}
    assert sources.pop("randomness.py") and len(sources) > 50
    assert {name: lines for name, source in sources.items() if (lines := own_seeds(source))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.Generator().manual_seed((self.seed * 3_000_017 + step) % (1 << 62))", "torch.manual_seed(train.seed + 1)",
        "key = config.train.seed * 7", "np.random.default_rng(hash(name))", "np.random.default_rng()", "import random",
        "np.random.default_rng([seed, 2 * step])", "np.random.Generator(np.random.Philox(key=seed ^ step))",
        "rng.seed(int(step))", "state = (state ^ (state >> 30)) * _U64(0xBF58476D1CE4E5B9)",
    ],
)  # fmt: skip
def test_computed_seeds_are_found(line):
    assert own_seeds(line)


@pytest.mark.parametrize(
    "line",
    [
        "torch.manual_seed(torch_seed(RandomStream.DROPOUT, seed, step, rank))", "np.random.default_rng(0).permutation(n * 2)",
        "np.random.default_rng(seed)", "np.random.default_rng([seed, number])", "fresh = [own.train.seed + 1 + i for i in x]",
    ],
)  # fmt: skip
def test_fixed_and_given_seeds_are_left_alone(line):
    assert not own_seeds(line)
