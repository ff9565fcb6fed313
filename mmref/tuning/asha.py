"""ASHA over trials that are known by their numbers: a sweep that goes on judges as one that was never interrupted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from mmref.config import Config
from mmref.tuning.trial_log import Trial


class Asha(ASHAScheduler):
    """Ray Tune's ASHA (one bracket) on the score by step; trials have their number in `config["number"]`.

    Trials end by themselves: nothing is stopped at its last step. What a trial repeats after it was started
    again is not judged a second time: it passed those rungs when it came by first.
    """

    def __init__(
        self,
        max_steps: int,
        grace_steps: int,
        reduction: float,
        before: Iterable[Trial] = (),
        spared: int | None = None,
    ) -> None:
        """
        Args:
            before: trials whose evaluations stand in the rungs already.
            spared: number of a trial that others are compared with and that is never stopped.
        """
        super().__init__(
            time_attr="step", metric="score", mode="max", max_t=max_steps + 1, grace_period=grace_steps,
            reduction_factor=reduction,
        )  # fmt: skip
        self.spared, self.last = spared, max_steps
        self.stopped: set[int] = set()  # numbers
        for trial in before:
            known: Any = SimpleNamespace(config={"number": trial.number})
            self.on_trial_add(None, known)
            for result in trial.results:
                super().on_trial_result(None, _named(known), result)  # type: ignore[arg-type]

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        super().on_trial_add(controller, _named(trial))

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        number = trial.config["number"]
        action = super().on_trial_result(controller, _named(trial), result)
        if action == TrialScheduler.STOP and (number == self.spared or result["step"] >= self.last):
            return TrialScheduler.CONTINUE  # a rung may lie at the last step, where nothing is left to save
        if action == TrialScheduler.STOP:
            self.stopped.add(number)
        return action

    def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: its last evaluation was judged when it was reported."""

    def on_trial_remove(self, controller: Any, trial: Any) -> None:
        """Nothing: it may be started again."""


def _named(trial: Any) -> Any:
    """A trial as ASHA looks at it, with an id that outlives the process which ran it."""
    return SimpleNamespace(trial_id=str(trial.config["number"]))


def grace_steps(asked: int | None, config: Config) -> int:
    """Steps before ASHA may stop a trial of the config's length: those asked for, else until guidance is full, and at least a
    quarter. Before guidance is full the order of trials says little of the end (docs/experiments/sweeps.md)."""
    steps = config.train.max_steps
    share = max(0.25, config.loss.guide_full if config.loss.w_guide > 0 else 0.0)
    return min(steps, asked or max(1, round(share * steps)))


def judged_at(config: Config, grace: int, reduction: float) -> list[int]:
    """The evaluations at which trials are stopped: the first at or behind each rung, the last step left out."""
    steps = config.train.max_steps
    every = config.train.steps_between_evaluations
    rungs, rung = [], float(grace)
    while rung < steps:
        rungs.append(math.ceil(rung / every) * every)
        rung *= reduction
    return sorted({at for at in rungs if at < steps})


def share_of_steps(config: Config, grace: int, reduction: float) -> float:
    """Share of the steps of all trials that ASHA runs where 1 / reduction of them pass each rung. Small sweeps take more: the
    first trials have nobody to be compared with."""
    at = [0, *judged_at(config, grace, reduction), config.train.max_steps]
    run = sum((end - start) / reduction**i for i, (start, end) in enumerate(itertools.pairwise(at)))
    return run / config.train.max_steps
