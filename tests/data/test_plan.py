"""The plan as pure functions: permutations, epochs, slices, substitutes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmref.data.plan import Plan, mix, permute
from mmref.errors import TooFewObjectsError


def starts(counts):
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def plan(counts, objects_per_step=3, images_per_object=2, seed=0):
    return Plan(starts(counts), objects_per_step, images_per_object, seed)


COUNTS = [3, 1, 5, 2, 2, 7, 1, 4, 3, 6, 2]

shapes = st.tuples(
    st.lists(st.integers(1, 7), min_size=1, max_size=20), st.integers(1, 20), st.integers(1, 4), st.integers(0, 99)
).filter(lambda x: x[1] <= len(x[0]))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size, key):
    assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 4095, 4097, 70_000])
def test_permute_is_a_bijection_around_powers_of_the_domain(size):
    values = permute(np.arange(size), size, 7)
    assert values.dtype == np.int64 and np.array_equal(np.sort(values), np.arange(size))


def test_permute_takes_a_size_and_key_for_each_position():
    sizes, keys = np.array([1, 5, 300, 17, 5]), np.array([3, 9, 2**64 - 1, 0, 8], dtype=np.uint64)
    for position in range(5):
        at = np.minimum(position, sizes - 1)
        together = permute(at, sizes, keys)
        assert together.tolist() == [
            int(permute(np.array([p]), int(s), int(k))[0]) for p, s, k in zip(at, sizes, keys, strict=True)
        ]


def test_keys_give_different_and_even_orders():
    orders = {tuple(permute(np.arange(20), 20, key).tolist()) for key in range(500)}
    assert len(orders) == 500
    first = Counter(order[0] for order in orders)
    assert len(first) == 20 and max(first.values()) < 60, "every value comes first about 25 times"


def test_mix_is_one_function_of_scalars_and_arrays():
    grid = mix(3, np.arange(4)[:, None], np.arange(5), 1)
    assert grid.shape == (4, 5) and len(set(grid.ravel().tolist())) == 20
    assert int(grid[2, 4]) == int(mix(3, 2, 4, 1)) != int(mix(3, 4, 2, 1))


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_a_step_is_what_it_says(shape):
    counts, p, q, seed = shape
    made = plan(counts, p, q, seed)
    for step in range(2 * made.steps_per_epoch + 1):
        planned = made(step)
        assert planned.step == step and len(planned.images) == len(planned.objects) == len(planned.captions) == p * q
        by_object = planned.objects.reshape(p, q)
        assert (by_object == by_object[:, :1]).all(), "an object's images lie side by side"
        assert len(set(by_object[:, 0].tolist())) == p, "no object twice in a step"
        low, high = made.object_start[planned.objects], made.object_start[planned.objects + 1]
        assert ((low <= planned.images) & (planned.images < high)).all(), "an image is of its object"


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_an_epoch_visits_every_object(shape):
    counts, p, q, seed = shape
    made = plan(counts, p, q, seed)
    for epoch in (0, 1, 5):
        seen = Counter()
        for step in range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch):
            seen.update(set(made(step).objects.tolist()))
        assert set(seen) == set(range(len(counts)))
        assert sum(seen.values()) == made.steps_per_epoch * p and max(seen.values()) <= 2


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_all_images_of_an_object_before_any_again(shape):
    """Over the epochs; the objects that fill up an epoch's last step show the images of that epoch once more."""
    counts, p, q, seed = shape
    made = plan(counts, p, q, seed)
    visits: dict[int, list[int]] = {row: [] for row in range(len(counts))}
    for epoch in range(8):
        in_epoch: dict[int, list[int]] = {}
        for step in range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch):
            planned = made(step)
            for row, images in zip(planned.objects[::q].tolist(), planned.images.reshape(p, q).tolist(), strict=True):
                assert in_epoch.setdefault(row, images) == images
        for row, images in in_epoch.items():
            visits[row] += images
    for row, images in visits.items():
        for start in range(0, len(images) - counts[row] + 1, counts[row]):
            assert len(set(images[start : start + counts[row]])) == counts[row]


def test_passes_over_an_object_s_images_have_their_own_orders():
    made = plan([6, 6, 6], 3, 6)
    orders = {tuple(made(step).images[made(step).objects == 0].tolist()) for step in range(20)}
    assert len(orders) > 15


def test_seed_and_step_alone_decide():
    one, again, other = plan(COUNTS, seed=3), plan(COUNTS, seed=3), plan(COUNTS, seed=4)
    one(17)  # what was asked before leaves no trace
    for step in (0, 5, 123):
        for name in ("images", "objects", "captions"):
            assert np.array_equal(getattr(one(step), name), getattr(again(step), name))
    assert any(not np.array_equal(one(s).objects, other(s).objects) for s in range(3))
    assert not np.array_equal(one(0).captions, one(1).captions)
    epoch = [tuple(np.concatenate([one(e * 4 + s).objects for s in range(4)]).tolist()) for e in range(5)]
    assert len(set(epoch)) == 5, "every epoch has its own order"


def test_captions_are_drawn_evenly():
    made = plan(COUNTS)
    draws = np.concatenate([made(step).captions for step in range(500)]) % np.uint64(3)
    assert np.bincount(draws.astype(int)) == pytest.approx([1000] * 3, rel=0.1)


@pytest.mark.parametrize("step", [10**9, 10**9 + 1, 2**40])
def test_far_steps_are_valid_and_need_no_history(step):
    made = plan([3] * 100_000, objects_per_step=64)
    planned = made(step)
    assert len(set(planned.objects.tolist())) == 64
    assert (made.object_start[planned.objects] <= planned.images).all()
    assert (planned.images < made.object_start[planned.objects + 1]).all()


def test_too_few_objects_says_the_numbers():
    with pytest.raises(TooFewObjectsError) as raised:
        plan(COUNTS, objects_per_step=12, images_per_object=4)
    for part in ("11 objects", "takes 12", "global_batch 48", "images_per_object 4", "at most 44"):
        assert part in str(raised.value)
    assert plan(COUNTS, objects_per_step=11).steps_per_epoch == 1


@settings(max_examples=12, deadline=None)
@given(shapes, st.integers(0, 50))
def test_substitutes_are_all_other_images_of_the_object_once(shape, step):
    counts, p, q, seed = shape
    made = plan(counts, p, q, seed)
    planned = made(step)
    for position in range(p * q):
        row, broken = int(planned.objects[position]), int(planned.images[position])
        tried = [made.substitute(step, position, attempt) for attempt in range(counts[row] - 1)]
        everything = set(range(int(made.object_start[row]), int(made.object_start[row + 1])))
        assert len(tried) == len(set(tried)) and set(tried) == everything - {broken}
        assert made.substitute(step, position, counts[row] - 1) is None
        assert made.substitute(step, position, counts[row] + 5) is None


def test_substitutes_differ_between_positions_and_steps():
    made = plan([40, 40, 40])
    assert len({made.substitute(step, position, 0) for step in range(9) for position in range(6)}) > 30
