"""The length of a training in epochs, as steps of its plan."""

from __future__ import annotations

import dataclasses

from mmref.config import Config, check_config
from mmref.data.plan import PERIOD, MixedPlan, Plan, build_plan
from mmref.data.shard_set import train_index


def steps_per_epoch(plan: Plan | MixedPlan) -> float:
    """Steps in which every object of the set has its turn; of a mixture every object of its first set, `data.root`."""
    if isinstance(plan, Plan):
        return plan.steps_per_epoch
    return plan.plans[0].steps_per_epoch * PERIOD / int(plan.counts[0])


def in_steps(config: Config) -> Config:
    """The config with `train.epochs` turned into `train.max_steps`, which is all that a run knows; any other as it is.

    Raises the errors of reading the index of the training samples.
    """
    epochs = config.train.epochs
    if not epochs:
        return config
    plan = build_plan(config, train_index(config))
    steps = max(1, round(epochs * steps_per_epoch(plan)))
    return check_config(dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=steps, epochs=0.0)))
