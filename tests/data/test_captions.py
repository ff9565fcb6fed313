"""Which captions are usable, and what `data.caption_noise` makes of them."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny_set import replace_json

from mmref.data.captions import CaptionNoise, usable_captions
from mmref.data.reader import StepReader, concatenate
from mmref.errors import ConfigError, SampleError


def test_usable_captions_leave_out_empty_ones():
    meta = {"captions": [" red ", "", "  ", None, "blue"], "caption_kinds": ["a", "b", "c", "d", "e"]}
    assert usable_captions(meta, "x") == [("red", "a"), ("blue", "e")]
    assert usable_captions({"captions": ["red"]}, "x") == [("red", "")]
    for captions in ([], ["", " "], None):
        with pytest.raises(SampleError, match=r"^cat 7: no caption"):
            usable_captions({"captions": captions}, "cat 7")


def test_captions_without_a_kind_are_kept():
    assert usable_captions({"captions": ["red", "blue"], "caption_kinds": ["a"]}, "x") == [("red", "a"), ("blue", "")]


# -- noise -----------------------------------------------------------------------------------------------------------


def noise_of(make_config, kind, rate, seed=0, **options):
    overrides = {"data.caption_noise_kind": kind, "data.caption_noise": rate, "train.seed": seed}
    reader = StepReader(make_config(overrides, **options))
    return reader, CaptionNoise(reader.config.data, seed, reader.index, reader.samples)


def test_swapped_captions_come_from_other_objects_at_the_rate(make_config):
    reader, noise = noise_of(make_config, "swap", 0.5)
    swapped, total = 0, 0
    for image in range(len(reader.index)):
        captions = reader.samples.read_meta(image)["captions"]
        for number in range(40):  # numbers beyond the two captions: more draws
            found = noise(captions[number % 2], image, number)
            total += 1
            if found != captions[number % 2]:
                swapped += 1
                own = str(reader.samples.read_meta(image)["object_id"]).split(".")[1]
                assert found.split()[-1] != own, "a caption of the same object"
    assert total > 1000 and abs(swapped / total - 0.5) < 0.05


def test_dropped_words_at_the_rate_and_never_all_of_them(make_config):
    _, noise = noise_of(make_config, "drop", 0.3)
    words = [str(i) for i in range(20)]
    found = [noise(" ".join(words), image, 0).split() for image in range(200)]
    assert all(len(f) > 0 and f == sorted(f, key=int) and set(f) <= set(words) for f in found)
    assert abs(1 - sum(map(len, found)) / 4000 - 0.3) < 0.05
    _, everything = noise_of(make_config, "drop", 1.0)
    assert all(len(everything("a b c", image, 0).split()) == 1 for image in range(50))


@pytest.mark.parametrize("kind", ["swap", "drop"])
def test_what_is_wrong_stays_wrong_and_another_seed_spoils_others(make_config, kind):
    reader, noise = noise_of(make_config, kind, 0.5)
    _, again = noise_of(make_config, kind, 0.5)
    _, other = noise_of(make_config, kind, 0.5, seed=1)
    texts = [(reader.samples.read_meta(i)["captions"][0], i) for i in range(len(reader.index))]
    first = [noise(t, i, 0) for t, i in texts]
    assert first == [again(t, i, 0) for t, i in texts]
    assert first != [other(t, i, 0) for t, i in texts] and first != [t for t, _ in texts]


@pytest.mark.parametrize("kind", ["swap", "drop"])
@pytest.mark.parametrize("world", [2, 4])
def test_every_number_of_ranks_sees_the_same_noise(make_config, kind, world):
    config = make_config({"data.caption_noise": 0.5, "data.caption_noise_kind": kind})
    whole = StepReader(config).read_step(3)
    parts = concatenate([StepReader(config, rank, world).read_step(3) for rank in range(world)])
    assert np.array_equal(parts["ids"], whole["ids"])
    clean = StepReader(make_config()).read_step(3)
    assert not np.array_equal(whole["ids"], clean["ids"]) and np.array_equal(whole["image"], clean["image"])


def test_a_broken_donor_is_passed_over(make_config, own_set):
    """All objects but the first image's own and the last are broken: every other caption is one of the last object's."""
    reader, noise = noise_of(make_config, "swap", 1.0, root=own_set)
    row, sound = reader.index.object_row, reader.index.object_row[-1]
    usable = {c for i in np.flatnonzero(row == sound) for c in reader.samples.read_meta(int(i))["captions"]}
    for image in np.flatnonzero((row != row[0]) & (row != sound)):
        replace_json(own_set, int(image), "broken")
    found = {noise("mine", 0, number) for number in range(100)}
    assert found <= usable | {"mine"} and found & usable


def test_a_rate_is_a_share(make_config):
    with pytest.raises(ConfigError, match=r"data\.caption_noise"):
        make_config({"data.caption_noise": 1.5})
