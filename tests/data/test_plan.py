"""The plan as pure functions: epochs, slices, substitutes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmref.data.plan import MixedPlan, Plan, WindowedOrder
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
    with pytest.raises(TooFewObjectsError, match="the split has no objects"):
        plan([], objects_per_step=1)


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


def stand_ins(made, step, slot):
    """Rows of the objects that may stand in, whose images are given whole."""
    rows = []
    for images in made.stand_ins(step, slot):
        row = int(np.searchsorted(made.object_start, images[0], side="right")) - 1
        assert sorted(images.tolist()) == list(range(made.object_start[row], made.object_start[row + 1]))
        rows.append(row)
    return rows


@settings(max_examples=12, deadline=None)
@given(shapes, st.integers(0, 50))
def test_objects_that_stand_in_are_all_others_and_first_those_of_no_other_slot(shape, step):
    counts, p, q, seed = shape
    made = plan(counts, p, q, seed)
    own = made(step).objects[::q].tolist()
    outside = len(counts) - p
    shares = []
    for slot in range(p):
        rows = stand_ins(made, step, slot)
        assert rows == stand_ins(plan(counts, p, q, seed), step, slot), "seed, step and slot alone decide"
        assert len(rows) == len(set(rows)) and set(rows) == set(range(len(counts))) - {own[slot]}
        assert set(rows[outside:]) == set(own) - {own[slot]}, "the step's own come last"
        shares.append(rows[: outside // p])
    assert len({row for share in shares for row in share}) == p * (outside // p), "a share for each slot"


def test_objects_that_stand_in_are_drawn_anew_for_each_step():
    made = plan([2] * 300)
    firsts = [int(next(made.stand_ins(step, 0))[0]) // 2 for step in range(30)]
    assert len(set(firsts)) > 20


def test_of_a_large_set_some_hundred_objects_are_tried():
    made = plan([3] * 100_000, objects_per_step=64)
    rows = stand_ins(made, 5, 3)
    assert 256 <= len(rows) < 1000 and len(rows) == len(set(rows)) and int(made(5).objects[6]) not in rows


windows = st.tuples(
    st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=6), min_size=1, max_size=9),  # images of objects, by shard
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(windows)
def test_a_windowed_epoch_visits_every_object_from_a_few_shards_at_a_time(case):
    shards, window, objects_per_step, seed = case
    counts = [images for shard in shards for images in shard]
    objects_per_step = min(objects_per_step, len(counts))
    shard_start = starts([len(shard) for shard in shards])
    order = WindowedOrder(shard_start, window, seed)
    made = Plan(starts(counts), objects_per_step, 2, seed, order)
    shard_of = np.searchsorted(shard_start, np.arange(len(counts)), side="right") - 1
    for epoch in range(2):
        assert sorted(order.shards(epoch).tolist()) == list(range(len(shards)))
        place = {shard: i // window for i, shard in enumerate(order.shards(epoch).tolist())}
        seen, reached = set(), 0
        for step in range(epoch * made.steps_per_epoch, (epoch + 1) * made.steps_per_epoch):
            objects = made(step).objects[::2].tolist()
            assert len(set(objects)) == objects_per_step, "a step's objects are different ones"
            used = [place[shard_of[i]] for i in objects]
            fresh = [place[shard_of[i]] for i in objects if i not in seen]
            assert min(fresh) >= reached, "windows follow each other"
            reached = max(used)
            seen |= set(objects)
        assert seen == set(range(len(counts)))


def test_windows_mix_and_differ_between_epochs():
    order = WindowedOrder(starts([50] * 20), 4, 3)
    first = np.concatenate([order(0, at, 50) for at in range(0, 1000, 50)])
    assert sorted(first.tolist()) == list(range(1000))
    assert len(set((first[:100] // 50).tolist())) == 4, "objects of all shards of the window, mixed"
    again = np.concatenate([order(1, at, 50) for at in range(0, 1000, 50)])
    assert (first == again).mean() < 0.05


def test_a_part_of_every_step_comes_from_the_same_shards_of_the_window():
    order, parts = WindowedOrder(starts([50] * 40), 20, 3), 4
    needed = [set() for _ in range(parts)]  # of each part of the steps of the first window
    for first in range(0, 800, 200):
        objects = order(0, first, 200)
        drawn = order.at(0, first + np.arange(200))
        assert sorted(objects) == sorted(drawn) and objects.tolist() != drawn.tolist(), "the step has the same objects"
        for part, own in zip(needed, np.split(objects, parts)):
            part.update((own // 50).tolist())
    assert sum(map(len, needed)) < 2 * 20, [len(part) for part in needed]
    across = order(0, 900, 200)  # half of it is of the second window
    place = {shard: at % 20 for at, shard in enumerate(order.shards(0).tolist())}
    early, late = ([place[shard] for shard in (half // 50).tolist()] for half in np.split(across, 2))
    assert np.mean(early) < 7 and np.mean(late) > 12, "both windows from their beginning to their end"


def test_objects_of_the_same_window_stand_in_first():
    shard_start = starts([10] * 12)
    order = WindowedOrder(shard_start, 3, 4)
    made = Plan(starts([2] * 120), 4, 2, 4, order)
    for step in range(0, 2 * made.steps_per_epoch, 7):
        shards = order.shards(step // made.steps_per_epoch).tolist()
        own = made(step).objects[::2]
        windows = {shards.index(shard) // 3 for shard in (own // 10).tolist()}
        near = 30 * len(windows) - 4
        for slot in (0, 3):
            rows = stand_ins(made, step, slot)
            assert len(rows) == 119 and not set(rows[:-3]) & set(own.tolist())
            share = rows[: near // 4]
            assert {shards.index(row // 10) // 3 for row in share} <= windows, "shards that are at hand"
    alone = Plan(starts([2] * 20), 4, 2, 4, WindowedOrder(starts([4] * 5), 1, 4))
    assert len(stand_ins(alone, 0, 0)) == 19, "a window without others: those of further ones"


def mixture(seed=1):
    plans = [plan(COUNTS, seed=seed), plan([2] * 40, seed=seed), plan([5, 4, 3, 2], seed=seed)]
    return MixedPlan(plans, [0.5, 0.3, 0.2], seed)


def test_a_mixture_gives_each_set_its_share_and_its_own_order():
    made = mixture()
    turns = [made.turn(step) for step in range(2000)]
    assert np.bincount([part for part, _ in turns[:1000]]).tolist() == [500, 300, 200]
    for part in range(3):
        assert [own for p, own in turns if p == part] == list(range(2 * [500, 300, 200][part])), "no step is left out"
    images, objects = made.first_image, made.first_object
    assert images.tolist() == [0, sum(COUNTS), sum(COUNTS) + 80, sum(COUNTS) + 94] and objects[1] == len(COUNTS)
    for step in (0, 7, 999, 1000, 1777):
        part, own = made.turn(step)
        whole, alone = made(step), made.plans[part](own)
        assert whole.step == step
        assert np.array_equal(whole.images - images[part], alone.images)
        assert np.array_equal(whole.objects - objects[part], alone.objects)
    assert [mixture(2).turn(s)[0] for s in range(50)] != [part for part, _ in turns[:50]]


def test_substitutes_in_a_mixture_are_of_the_same_object():
    made = mixture()
    owner = np.repeat(np.arange(len(COUNTS) + 44), [*COUNTS, *[2] * 40, 5, 4, 3, 2])
    for step in range(30):
        planned = made(step)
        for attempt in range(2):
            found = made.substitute(step, 1, attempt)
            if found is not None:
                assert owner[found] == planned.objects[1] and found != planned.images[1]


def test_objects_that_stand_in_in_a_mixture_are_of_the_step_s_set():
    made = mixture()
    for step in range(12):
        part, own = made.turn(step)
        found = [images - made.first_image[part] for images in made.stand_ins(step, 1)]
        alone = list(made.plans[part].stand_ins(own, 1))
        assert len(found) == len(alone) == made.plans[part].n_objects - 1
        assert all(np.array_equal(a, b) for a, b in zip(found, alone))


def test_shares_that_are_no_whole_steps_add_up():
    counts = MixedPlan([plan(COUNTS)] * 3, [1 / 3, 1 / 3, 1 / 3], 0).counts
    assert counts.sum() == 1000 and sorted(counts.tolist()) == [333, 333, 334]


def test_an_object_with_ten_thousand_images_beside_some_with_one():
    made = plan([10_000, 1, 1, 1], objects_per_step=4, images_per_object=2)
    seen: list[int] = []
    for step in range(500):
        planned = made(step)
        images = planned.images[planned.objects == 0].tolist()
        seen += images
        assert all(planned.images[planned.objects == i].tolist() == [9999 + i] * 2 for i in (1, 2, 3))
    assert len(set(seen)) == 1000, "each image of the large object once before any comes again"
