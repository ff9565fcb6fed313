"""Groups of neighbors in the steps of a plan: who meets whom, and that nothing else changes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmref.config import config_hash
from mmref.data.hard_groups import GroupedOrder, groups_of
from mmref.data.neighbors import NONE, Neighbors, index_fingerprint, read_neighbors
from mmref.data.plan import MixedPlan, Plan, build_plan
from mmref.data.reader import StepReader
from mmref.data.shard_set import ShardSet, data_fingerprint, train_index
from mmref.errors import ConfigError, NeighborsError


def some_neighbors(m, k, seed=0, gaps=False):
    """Random other objects of each, without repeats; with gaps some have fewer, or none."""
    rng = np.random.default_rng(seed)
    rows = np.full((m, k), NONE, dtype=np.int32)
    for i in range(m):
        others = rng.permutation([j for j in range(m) if j != i])[: rng.integers(0, k + 1) if gaps else k]
        rows[i, : len(others)] = others
    return rows


def clusters(m, size):
    """Objects in clusters of like ones, each of which has all others of its cluster as neighbors."""
    return np.array([[j for j in range(i - i % size, i - i % size + size) if j != i] for i in range(m)], dtype=np.int32)


def plan(rows, p, groups, size, seed=0, images=None):
    start = np.concatenate([[0], np.cumsum(images or [2] * len(rows))]).astype(np.int64)
    return Plan(start, p, 1, seed, GroupedOrder(rows, p, groups, size, seed))


cases = st.integers(2, 40).flatmap(
    lambda m: st.tuples(
        st.just(m), st.integers(2, m), st.integers(1, 8), st.integers(2, 6), st.floats(0.05, 1), st.integers(0, 9)
    )
)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_an_epoch_visits_every_object_once_and_no_step_has_one_twice(case):
    m, p, k, size, share, seed = case
    groups = groups_of(share, p, size)
    if not groups:
        return
    made = plan(some_neighbors(m, k, seed, gaps=True), p, groups, size, seed)
    for epoch in (0, 3):
        steps = [made(epoch * made.steps_per_epoch + i).objects for i in range(made.steps_per_epoch)]
        assert all(len(set(step.tolist())) == p for step in steps)
        assert sorted(np.concatenate(steps)[:m].tolist()) == list(range(m)), "filled up behind the last object alone"


@pytest.mark.parametrize("share, groups", [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_as_many_groups_in_every_step_as_the_share_says(share, groups):
    """In clusters of four every group can be a whole cluster, while few groups have been formed."""
    size, p, m = 4, 16, 160
    assert groups_of(share, p, size) == groups
    made = plan(clusters(m, size), p, groups, size, seed=3)
    for step in range(3 * made.steps_per_epoch):
        of = Counter((made(step).objects // size).tolist())
        assert sum(count == size for count in of.values()) >= groups, step
        if share <= 0.5:
            assert sum(count == size for count in of.values()) <= groups + 1, "the others are drawn uniformly"


def test_groups_differ_between_epochs_and_neighbors_take_turns():
    rows = some_neighbors(60, 8)
    made = plan(rows, 12, 2, 3)
    mates = Counter()
    for epoch in range(40):
        for i in range(made.steps_per_epoch):
            objects = made(epoch * made.steps_per_epoch + i).objects
            for group in (objects[:3], objects[3:6]):
                assert set(group[1:].tolist()) <= set(rows[group[0]].tolist()), "an anchor's neighbors"
                mates.update((int(group[0]), int(other)) for other in group[1:])
    assert len(mates) > 0.75 * rows.size, "of 480 pairs 800 draws miss a fifth"


def test_a_step_is_a_function_of_seed_and_step():
    rows = some_neighbors(50, 5)
    one, other = plan(rows, 8, 1, 4, seed=1), plan(rows, 8, 1, 4, seed=1)
    assert np.array_equal(one(13).images, other(13).images)  # `one` has made no other epoch before, `other` makes some
    for step in (0, 700, 13, 12, 13):
        assert np.array_equal(one(step).images, other(step).images)
    assert not np.array_equal(one(13).objects, plan(rows, 8, 1, 4, seed=2)(13).objects)


def test_stand_ins_are_of_the_whole_set():
    made = plan(some_neighbors(30, 4), 8, 1, 4)
    own = set(made(2).objects.tolist())
    found = [int(made.object_start.searchsorted(images[0], side="right") - 1) for images in made.stand_ins(2, 0)]
    assert set(found[: 30 - len(own)]) == set(range(30)) - own


def test_an_object_with_no_neighbors_left_takes_others_along():
    rows = np.full((12, 2), NONE, dtype=np.int32)
    rows[0] = [1, 2]
    made = plan(rows, 6, 2, 3)
    for epoch in range(5):
        together = [made(2 * epoch + i).objects for i in (0, 1)]
        assert sorted(np.concatenate(together).tolist()) == list(range(12))
        groups = [set(step[at : at + 3].tolist()) for step in together for at in (0, 3)]
        # 0 is a whole group's anchor, unless another that had none has filled up with its neighbors: those wait.
        assert {0, 1, 2} in groups


# -- the file, and a config that names it ----------------------------------------------------------------------------------


@pytest.fixture
def index(make_config):
    return train_index(make_config())


@pytest.fixture
def written(tmp_path, index):
    """A file of neighbors of the tiny set, and what it holds."""
    rows = some_neighbors(index.n_objects, 3)
    made = Neighbors(rows, np.full(rows.shape, 0.5, np.float32), index_fingerprint(index), "hash checkpoints/one", "references")
    path = tmp_path / "neighbors.parquet"
    path.write_bytes(made.to_bytes())
    return str(path), made


def test_what_is_written_is_read(written, index):
    path, made = written
    found = read_neighbors(path, index)
    assert np.array_equal(found.rows, made.rows) and np.array_equal(found.similarity, made.similarity)
    assert (found.set_fingerprint, found.model, found.by) == (made.set_fingerprint, made.model, made.by)


def test_a_file_of_another_set_is_named(written, make_config, own_set):
    from support.tiny_set import TinySource, build_tiny_set

    other = build_tiny_set(own_set.parent / "other", TinySource("other", 50))
    with pytest.raises(
        NeighborsError, match=r"of another set .* fingerprint [0-9a-f]{12}, and these have [0-9a-f]{12}. Write one"
    ):
        build_plan(make_config({"data.neighbors": written[0]}, root=other), ShardSet.open(str(other)).index("train"))


@pytest.mark.parametrize("damage, said", [
    (lambda path: path.unlink(), "No such file"), (lambda path: path.write_bytes(b"PAR1"), "no file of neighbors"),
    (lambda path: path.write_text("object,neighbor\n"), "no file of neighbors"),
])  # fmt: skip
def test_what_is_no_file_of_neighbors_is_named(written, index, tmp_path, damage, said):
    damage(tmp_path / "neighbors.parquet")
    with pytest.raises(NeighborsError, match=said):
        read_neighbors(written[0], index)


@pytest.mark.parametrize("row, value", [(0, 0), (1, 99), (2, -2)])
def test_neighbors_that_cannot_be_are_named(written, index, tmp_path, row, value):
    path, made = written
    rows = made.rows.copy()
    rows[row, 1] = value
    (tmp_path / "neighbors.parquet").write_bytes(
        Neighbors(rows, made.similarity, made.set_fingerprint, made.model, made.by).to_bytes()
    )
    with pytest.raises(NeighborsError, match=f"object {row} has .*{value}.* for neighbors"):
        read_neighbors(path, index)


def test_without_the_file_or_a_share_the_plan_is_what_it_was(written, make_config, index):
    plain = build_plan(make_config(), index)
    for overrides in ({"data.hard_share": 1.0, "data.group_size": 2}, {"data.neighbors": written[0], "data.hard_share": 0.0}):
        other = build_plan(make_config(overrides), index)
        for step in range(10):
            assert np.array_equal(plain(step).images, other(step).images)
            assert np.array_equal(plain(step).captions, other(step).captions)
    hard = build_plan(make_config({"data.neighbors": written[0], "data.group_size": 2}), index)
    assert any(not np.array_equal(plain(step).images, hard(step).images) for step in range(10))


def test_any_number_of_ranks_reads_the_same_samples(written, make_config):
    config = make_config({"data.neighbors": written[0], "data.group_size": 2})
    for step in (0, 9):
        whole = StepReader(config).read_step(step)
        for world in (2, 4):
            parts = [StepReader(config, rank, world).read_step(step) for rank in range(world)]
            for name in ("object", "image_index", "image", "ids"):
                assert np.array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_sets_of_a_mixture_have_their_own_neighbors(tmp_path, make_config, own_set):
    from support.tiny_set import TinySource, build_tiny_set

    other = build_tiny_set(tmp_path / "other", TinySource("other", 50))
    base = {"data.mix": {str(other): 0.5}, "data.group_size": 2, "data.hard_share": 1.0}
    merged = train_index(make_config(base, root=own_set))
    m = merged.first_objects[1]
    pairs = np.array([[i ^ 1] for i in range(merged.n_objects)], dtype=np.int32)  # 0 with 1, 2 with 3, ...
    assert m % 2 == 0 and merged.n_objects % 2 == 0
    path = tmp_path / "both.parquet"

    def write(rows):
        made = Neighbors(rows, np.ones(rows.shape, np.float32), index_fingerprint(merged), "", "features")
        path.write_bytes(made.to_bytes())

    write(pairs)
    made = build_plan(make_config({**base, "data.neighbors": str(path)}, root=own_set), merged)
    assert isinstance(made, MixedPlan)
    for step in range(20):
        objects = made(step).objects[::2]  # two images of each
        assert (objects[::2] == objects[1::2] ^ 1).all() and len({bool(o >= m) for o in objects.tolist()}) == 1
    pairs[0] = m  # of the other set
    write(pairs)
    with pytest.raises(NeighborsError, match=r"object 0 has .* which are not all other objects of its set"):
        read_neighbors(str(path), merged)


@pytest.mark.parametrize("overrides, said", [
    ({"data.window_shards": 2}, "`data.window_shards` 2 would have a step read a few of them only"),
    ({"data.hard_share": 0.1}, r"`data.hard_share` 0.1 of the 4 objects .* no place for a group of `data.group_size` 2"),
    ({"data.group_size": 5}, "no place for a group of `data.group_size` 5"),
])  # fmt: skip
def test_what_cannot_go_with_groups_is_named(make_config, overrides, said):
    with pytest.raises(ConfigError, match=said):
        make_config({"data.neighbors": "n.parquet", "data.group_size": 2, **overrides})


def test_another_file_is_another_run(written, make_config, tmp_path):
    """By its name in the config's hash, by its content in the fingerprint of the data; without one both are what they were."""
    plain, named = make_config(), make_config({"data.neighbors": written[0]})
    assert config_hash(named) != config_hash(plain)
    assert config_hash(make_config({"data.neighbors": f"/elsewhere/{written[0].rsplit('/', 1)[1]}"})) == config_hash(named)
    assert config_hash(make_config({"data.hard_share": 1.0, "data.neighbors": written[0]})) != config_hash(named)
    before = data_fingerprint(named)
    assert before.startswith(f"{data_fingerprint(plain)} neighbors:")
    (tmp_path / "neighbors.parquet").write_bytes(b"other")
    assert data_fingerprint(named) != before
    (tmp_path / "neighbors.parquet").unlink()
    with pytest.raises(NeighborsError, match=r"`data.neighbors`: .* cannot be read"):
        data_fingerprint(named)
