"""Epochs as steps of the plan: every object of the first set has its turn."""

from __future__ import annotations

import numpy as np
import pytest

from mmref.config import config_hash
from mmref.data.epochs import in_steps
from mmref.data.plan import build_plan
from mmref.data.shard_set import ShardSet, train_index
from mmref.errors import ConfigError

EPOCHS = {"train.max_steps": 0, "train.epochs": 2.0}


def test_epochs_are_the_steps_in_which_every_object_has_its_turn(make_config):
    given = make_config(EPOCHS)
    config = in_steps(given)
    assert given.train.epochs == 2 and config.train.epochs == 0
    plan = build_plan(config, train_index(config))
    seen = np.concatenate([plan(step).objects for step in range(config.train.max_steps)])
    turns = np.bincount(seen, minlength=plan.n_objects) / config.train.images_per_object
    assert turns.min() >= 2 and config.train.max_steps == 2 * plan.steps_per_epoch == 8
    one_fewer = np.concatenate([plan(step).objects for step in range(config.train.max_steps - 1)])
    assert np.bincount(one_fewer, minlength=plan.n_objects).min() < 4


def test_an_epoch_of_a_mixture_is_one_of_its_first_set(make_config, own_set, tiny_set):
    config = make_config({**EPOCHS, "data.mix": {str(own_set): 0.5}})
    assert ShardSet.open(str(own_set)).manifest["name"] == ShardSet.open(str(tiny_set)).manifest["name"]
    config = in_steps(config)
    assert config.train.max_steps == 16, "half of the steps are of the other set"


def test_a_run_of_epochs_is_the_run_of_its_steps(make_config):
    assert config_hash(in_steps(make_config(EPOCHS))) == config_hash(make_config({"train.max_steps": 8}))
    assert in_steps(make_config({"train.max_steps": 0, "train.epochs": 0.01})).train.max_steps == 1
    plain = make_config()
    assert in_steps(plain) is plain


@pytest.mark.parametrize("train, said", [
    ({"train.epochs": 2.0}, r"given twice: `train.max_steps` 20 and `train.epochs` 2. Leave one out"),
    ({"train.max_steps": 0}, r"`train.max_steps` must be at least 1, found 0, or give `train.epochs`"),
    ({"train.max_steps": 0, "train.epochs": -1.0}, "`train.epochs` must be at least 0"),
])  # fmt: skip
def test_one_of_the_two_is_given(make_config, train, said):
    with pytest.raises(ConfigError, match=said):
        make_config(train)
