"""What a trial tries: a pure function of its number and of the trials before it.

Nothing is kept between two proposals but the trials themselves, so a sweep that goes on after its driver was killed
proposes from what trials.jsonl tells, and never the same draw twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from ray.tune.search import Searcher

from mmref.extras import need
from mmref.tuning.space import Parameter, Space
from mmref.tuning.trial_log import Trial, TrialLog

Propose = Callable[[int, list[Trial]], dict[str, Any]]
RANDOM_SHARE, RANDOM_MOST = 0.3, 10  # of a sweep: what TPE draws at random before it models anything


def proposer(space: Space, searcher: str, seed: int, first: dict[str, Any] | None, pareto: bool, count: int) -> Propose:
    """The function that gives trial `number` its values, seeing all trials before it.

    Args:
        first: values of trial 0, so that the config itself is among the trials; None to search from the start.
        pareto: search for a high score and a short step at once (optuna).
        count: trials of the whole sweep.
    Raises:
        ExtraMissingError: optuna is not installed. ConfigError: the grid has a range in it.
    """
    if searcher == "grid":
        grid = space.grid()
        return lambda number, before: grid[number]
    if searcher == "optuna":
        need("tune", "`--searcher optuna`", "optuna", otherwise="Or use `--searcher random`.")

    def propose(number: int, before: list[Trial]) -> dict[str, Any]:
        if number == 0 and first:
            return first
        if searcher == "random":
            shares = np.random.default_rng([seed, number]).random(len(space.parameters)).tolist()
            return {p.name: p.at(share) for p, share in zip(space.parameters, shares)}
        return tpe(space, number, before, seed, min(RANDOM_MOST, math.ceil(RANDOM_SHARE * count)), pareto)

    return propose


def tpe(space: Space, number: int, before: list[Trial], seed: int, random_first: int, pareto: bool = False) -> dict[str, Any]:
    """Values by Optuna's tree-structured Parzen estimator from the trials before, drawn at random for the first few."""
    import optuna

    # The draw is seeded by the trial's number: a sampler that is built anew must not repeat its first draws.
    draw = int(np.random.default_rng([seed, number]).integers(2**31))
    sampler = optuna.samplers.TPESampler(n_startup_trials=random_first, constant_liar=True, seed=draw)
    asked = study(space, before, pareto, sampler).ask(distributions(space))
    return {p.name: asked.params[p.name] for p in space.parameters}


def study(space: Space, trials: list[Trial], pareto: bool = False, sampler: Any = None) -> Any:
    """An Optuna study of these trials: finished ones complete, those ASHA stopped pruned at their last step.

    A score at an early step is thus never compared with one at the end.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions: list[Any] = ["maximize", "minimize"] if pareto else ["maximize"]
    found = optuna.create_study(directions=directions, sampler=sampler)
    found.add_trials([_as_optuna(trial, distributions(space), pareto) for trial in trials])
    return found


def _as_optuna(trial: Trial, known: dict[str, Any], pareto: bool) -> Any:
    from optuna.trial import TrialState, create_trial

    about: dict[str, Any] = {"params": {name: trial.values[name] for name in known}, "distributions": known}
    if trial.running:
        return create_trial(state=TrialState.RUNNING, **about)
    if trial.status == "failed" or trial.score is None or (pareto and trial.step_seconds is None):
        return create_trial(state=TrialState.FAIL, **about)
    if pareto:
        return create_trial(values=[trial.score, trial.step_seconds or 0.0], **about)
    if trial.status == "finished":
        return create_trial(value=trial.score, **about)
    steps = {trial.steps: trial.score}
    return create_trial(state=TrialState.PRUNED, value=trial.score, intermediate_values=steps, **about)


def distributions(space: Space) -> dict[str, Any]:
    """The space as Optuna's distributions."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def one(p: Parameter) -> Any:
        if p.kind == "choice":
            return CategoricalDistribution(p.values)
        if p.kind == "int":
            return IntDistribution(int(p.low), int(p.high))
        return FloatDistribution(p.low, p.high, log=p.kind == "loguniform")

    return {p.name: one(p) for p in space.parameters}


class Numbered(Searcher):
    """Hands Ray Tune the trials that are left: those that were interrupted, then new ones, each by its number.

    It has no state of its own to save: `log` holds every trial from the moment it is handed out.
    """

    def __init__(self, log: TrialLog, propose: Propose, count: int) -> None:
        """count: trials of the whole sweep."""
        super().__init__()
        self.log, self.propose = log, propose
        known = log.trials
        self.left = [t.number for t in known.values() if t.running] + [n for n in range(count) if n not in known]

    def suggest(self, trial_id: str) -> Any:
        if not self.left:
            return Searcher.FINISHED
        number = self.left.pop(0)
        if number not in self.log.trials:
            before = [self.log.trials[n] for n in sorted(self.log.trials)]
            self.log.begin(number, self.propose(number, before))
        return {"number": number, "values": self.log.trials[number].values}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the log knows."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the log is on disk, and a sweep goes on from it alone."""
