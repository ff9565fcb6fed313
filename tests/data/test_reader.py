"""Steps read by any number of ranks, and what happens to broken samples."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from support.tiny_set import damage_image, replace_json

from mmref.data.fit import Fit
from mmref.data.reader import StepReader, TaskReader, concatenate
from mmref.data.sample_reader import SampleReader
from mmref.errors import SampleError, ShardSetError, TooFewObjectsError


def whole_step(config, step, world):
    return concatenate([StepReader(config, rank, world).read_step(step) for rank in range(world)])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert np.array_equal(a[name], b[name]), name


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_put_together_are_the_global_step(make_config, world):
    config = make_config()
    for step in (0, 3, 1000):
        assert_same(whole_step(config, step, world), StepReader(config).read_step(step))


def test_a_step_holds_what_the_plan_says(make_config):
    config = make_config()
    reader = StepReader(config)
    batch, planned = reader.read_step(4), reader.plan(4)
    assert batch["image"].shape == (8, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert batch["ids"].shape == batch["mask"].shape == (8, 10)
    assert (batch["step"] == 4).all() and batch["position"].tolist() == list(range(8))
    assert np.array_equal(batch["image_index"], planned.images) and np.array_equal(batch["object"], planned.objects)
    assert (batch["bad"] == "").all()
    samples = SampleReader(reader.index)
    for i, image in enumerate(planned.images.tolist()):
        raw = samples.read(image)
        assert np.array_equal(batch["image"][i], Fit(16, 16).decode(raw.image_bytes))
        assert raw.meta["object_id"] == reader.index.object_ids[planned.objects[i]]
        caption = raw.meta["captions"][int(planned.captions[i]) % len(raw.meta["captions"])]
        assert np.array_equal(batch["ids"][i], reader.tokens([caption])[0][0])


def test_images_are_resized_to_height_by_width(make_config):
    config = make_config({"data.image_height": 24, "data.image_width": 8})
    assert StepReader(config).read_step(0)["image"].shape == (8, 24, 8, 3)


def find(reader, image):
    """A step and position at which the plan asks for an image."""
    for step in range(200):
        at = np.flatnonzero(reader.plan(step).images == image)
        if len(at):
            return step, int(at[0])
    raise AssertionError(f"image {image} is never visited")


def test_a_broken_image_is_replaced_alike_on_any_number_of_ranks(make_config, own_set):
    config = make_config(root=own_set)
    reader = StepReader(config)
    row = int(np.argmax(np.diff(reader.index.object_start)))  # an object of five images, three of them broken
    first = int(reader.index.object_start[row])
    broken = [first, first + 2, first + 3]
    for image in broken:
        damage_image(own_set, image)
    step, position = find(reader, first)
    batch = StepReader(config).read_step(step)
    used = int(batch["image_index"][position])
    tried = [first] + [reader.plan.substitute(step, position, attempt) for attempt in range(4)]
    good = next(i for i in tried if i not in broken)
    assert used == good and batch["object"][position] == row
    assert np.array_equal(batch["image"][position], reader.read_image(used)[0])
    assert all(reader.index.image_ids[i] in batch["bad"][position] for i in tried[: tried.index(good)])
    assert reader.index.shard_paths[int(reader.index.shard[first])] in batch["bad"][position]
    others = [i for i in range(8) if int(reader.plan(step).images[i]) not in broken]
    assert others and all(batch["bad"][i] == "" for i in others)
    for world in (2, 4):
        assert_same(whole_step(config, step, world), batch)


def test_a_step_without_the_broken_image_is_untouched(make_config, own_set, tiny_set):
    damage_image(own_set, 5)
    broken, sound = StepReader(make_config(root=own_set)), StepReader(make_config())
    for step in range(6):
        if 5 not in sound.plan(step).images:
            assert_same(broken.read_step(step), sound.read_step(step))


@pytest.mark.parametrize("text, said", [
    ('{"captions": []}', "no caption"), ('{"captions": ["", "  "]}', "no caption"), ("{", "broken"),
    ('{"captions": 3}', "no list"),
])  # fmt: skip
def test_a_sample_without_caption_is_replaced_too(make_config, own_set, text, said):
    config = make_config(root=own_set)
    reader = StepReader(config)
    row = int(np.argmax(np.diff(reader.index.object_start)))
    image = int(reader.index.object_start[row])
    replace_json(own_set, image, text)
    step, position = find(reader, image)
    batch = StepReader(config).read_step(step)
    assert batch["image_index"][position] == reader.plan.substitute(step, position, 0)
    assert said in batch["bad"][position]


def rows_with(reader, images):
    """Object rows with so many images."""
    return np.flatnonzero(np.diff(reader.index.object_start) == images).tolist()


def damage_objects(root, reader, rows):
    for image in np.flatnonzero(np.isin(reader.index.object_row, rows)):
        damage_image(root, int(image))


@pytest.mark.parametrize("overrides", [{}, {"data.window_shards": 1}, {"train.images_per_object": 1}])
def test_an_object_whose_only_image_is_broken_is_stood_in_for_by_another(make_config, own_set, overrides):
    """The batch says whose samples it holds, the same on any number of ranks, and the same again from a fresh reader."""
    config = make_config(overrides, root=own_set)
    reader, per_object = StepReader(config), config.train.images_per_object
    sound = {step: reader.read_step(step) for step in range(8)}
    row = rows_with(reader, 1)[0]
    damage_objects(own_set, reader, [row])
    hit = 0
    for step, before in sound.items():
        batch, planned = StepReader(config).read_step(step), reader.plan(step)
        away = planned.objects == row
        hit += away.any()
        assert ((batch["bad"] != "") == away).all()
        for name in ("object", "image_index", "image", "ids"):
            assert np.array_equal(batch[name][~away], before[name][~away]), "the other samples of the step stay"
        assert np.array_equal(batch["object"], reader.index.object_row[batch["image_index"]])
        assert len(set(batch["object"][away].tolist())) <= 1 and not set(batch["object"][away]) & set(planned.objects)
        for i in np.flatnonzero(away):
            pixels, captions = reader.read_image(int(batch["image_index"][i]))
            assert np.array_equal(batch["image"][i], pixels)
            assert any(np.array_equal(batch["ids"][i], reader.tokens([c])[0][0]) for c in captions)
            assert reader.index.image_ids[reader.index.object_start[row]] in batch["bad"][i]
        for world in (2, 4, 8):  # 8: an object's two positions lie on two ranks
            assert_same(whole_step(config, step, world), batch)
    assert hit >= 1 and len(batch["object"]) == 8 and per_object in (1, 2)


def test_all_positions_of_an_object_get_different_images_of_the_same_one(make_config, own_set):
    config = make_config({"train.images_per_object": 4, "train.global_batch": 12}, root=own_set)
    reader = StepReader(config)
    broken = rows_with(reader, 3)
    damage_objects(own_set, reader, broken)
    seen = 0
    for step in range(12):
        batch, planned = StepReader(config).read_step(step), reader.plan(step)
        for slot in range(3):
            at = slice(4 * slot, 4 * slot + 4)
            (row,) = set(batch["object"][at].tolist())
            if int(planned.objects[4 * slot]) in broken:
                start, end = reader.index.object_start[row : row + 2]
                assert row not in planned.objects and len(set(batch["image_index"][at])) == min(4, end - start)
                seen += 1
        assert_same(whole_step(config, step, 2), batch)
    assert seen > 3


def test_two_unreadable_objects_of_a_step_are_not_stood_in_for_by_one(make_config, own_set):
    """Six of a step's eight, and the first that would stand in for each of four: whoever comes next, each its own."""
    config = make_config({"train.images_per_object": 1}, root=own_set)
    reader = StepReader(config)
    planned = reader.plan(2).objects
    firsts = [int(reader.index.object_row[next(reader.plan.stand_ins(2, slot))[0]]) for slot in range(6)]
    assert len(set(firsts)) == 6 and not set(firsts) & set(planned.tolist())
    damage_objects(own_set, reader, planned[:6])
    assert StepReader(config).read_step(2)["object"].tolist() == [*firsts, *planned[6:]]
    damage_objects(own_set, reader, firsts[:4])  # of the other six objects two are left, for all of them
    batch = StepReader(config).read_step(2)
    left = set(range(reader.index.n_objects)) - set(planned[:6].tolist()) - set(firsts[:4])
    assert batch["object"][4:].tolist() == [*firsts[4:], *planned[6:]] and set(batch["object"]) <= left
    for world in (2, 4, 8):
        assert_same(whole_step(config, 2, world), batch)


@pytest.mark.parametrize("readable", [1, 5])
def test_a_step_is_read_as_long_as_one_object_can_be(make_config, own_set, readable):
    config = make_config(root=own_set)
    reader = StepReader(config)
    row = rows_with(reader, readable)[0]
    damage_objects(own_set, reader, [i for i in range(reader.index.n_objects) if i != row])
    for step in range(4):
        assert (StepReader(config).read_step(step)["object"] == row).all()


def test_a_set_without_a_usable_image_is_an_error_that_names_some(make_config, own_set):
    config = make_config(root=own_set)
    reader = StepReader(config)
    damage_objects(own_set, reader, range(reader.index.n_objects))
    step, position = find(reader, int(reader.index.object_start[rows_with(reader, 3)[0]]))
    per_rank = StepReader(config, position // 2, 4)
    with pytest.raises(SampleError, match="no usable image left") as raised:
        per_rank.read_step(step)
    first = int(reader.plan(step).objects[per_rank.positions.start])
    start, end = reader.index.object_start[first : first + 2]
    assert reader.index.object_ids[first] in str(raised.value) and "13 objects tried" in str(raised.value)
    assert all(reader.index.image_ids[i] in str(raised.value) for i in range(start, end))
    assert len(str(raised.value)) < 2000, "of many broken images a few"


def test_descriptions_of_a_broken_image_are_equal_so_that_it_is_counted_once(make_config, own_set):
    damage_image(own_set, 0)
    said = set()
    for _ in range(3):
        with pytest.raises(SampleError) as raised:
            StepReader(make_config(root=own_set)).read_image(0)
        said.add(str(raised.value))
    assert len(said) == 1


def test_an_empty_caption_is_never_drawn(make_config, own_set):
    config = make_config(root=own_set)
    reader = StepReader(config)
    for image in range(len(reader.index)):
        replace_json(own_set, image, '{"captions": ["", "red", " "]}')
    ids = StepReader(config).tokens(["red"])[0]
    for step in range(4):
        assert (StepReader(config).read_step(step)["ids"] == ids).all()


def test_a_task_is_consecutive_steps_of_one_rank(make_config):
    config = make_config({"data.steps_per_task": 3, "train.max_steps": 10})
    tasks, reader = TaskReader(config, 1, 2, start=2), StepReader(config, 1, 2)
    batch = tasks({"id": np.array([1])})
    assert_same(batch, concatenate([reader.read_step(s) for s in (5, 6, 7)]))
    assert sorted(set(batch["position"].tolist())) == [4, 5, 6, 7]


def test_the_last_task_ends_with_training(make_config):
    tasks = TaskReader(make_config({"data.steps_per_task": 4, "train.max_steps": 10}), 0, 1, start=3)
    steps = [sorted(set(tasks({"id": np.array([i])})["step"].tolist())) for i in range(2)]
    assert steps == [[3, 4, 5, 6], [7, 8, 9]]


def test_readers_travel_to_other_processes(make_config):
    config = make_config()
    reader = StepReader(config)
    expected = reader.read_step(1)
    assert_same(pickle.loads(pickle.dumps(reader)).read_step(1), expected)


def test_too_few_objects_and_a_missing_train_split_are_named(make_config, own_set):
    with pytest.raises(TooFewObjectsError, match="14 objects"):
        StepReader(make_config({"train.global_batch": 30}))
    other = shutil.copytree(own_set, own_set.parent / "other")
    drawn = {"data.mix": {str(other): 0.5}, "data.max_objects": 8, "train.global_batch": 28}
    with pytest.raises(TooFewObjectsError, match=r": `data.max_objects` 8 draws them from all sets together; the split has"):
        StepReader(make_config(drawn))
    manifest = own_set / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"train":', '"training":', 1))
    with pytest.raises(ShardSetError, match="no train split"):
        StepReader(make_config(root=own_set))
