"""What is asked of a sweep, besides its config and space."""

from __future__ import annotations

from dataclasses import dataclass

from mmref.errors import ConfigError
from mmref.tuning.space import Space

SEARCHERS = ("optuna", "random", "grid")
FINAL_SEEDS = 3
RESUMABLE = ("trials", "max_concurrent", "final_seeds")  # options that may change when a sweep goes on
AUTO = "auto"  # of --max-concurrent
PBT = (
    "`--scheduler pbt` is not offered: population-based training copies checkpoints between trials, and Ray Train hands "
    "Ray Tune none of a nested training's, so that every exploit would be skipped in silence and the trials would be "
    "independent. Use asha, or none."
)


@dataclass(frozen=True)
class Options:
    """What is asked of a sweep, besides its config and space."""

    trials: int
    searcher: str = "optuna"
    scheduler: str = "asha"
    pareto: bool = False
    max_concurrent: int | None = None  # None: as many as fit
    trial_steps: int | None = None  # None: as many as the config's
    grace_steps: int | None = None  # None: until guidance is full, at least a quarter of a trial
    reduction: float = 3.0
    final_seeds: int = 0  # trainings of the best config and of the default, each


def check_options(options: Options, space: Space) -> None:
    """Raise ConfigError for options that do not go together."""
    if options.scheduler == "pbt":
        raise ConfigError(PBT)
    if options.reduction <= 1:
        raise ConfigError(f"`--reduction` must be above 1, found {options.reduction}.")
    if options.final_seeds < 0:
        raise ConfigError(f"`--final-seeds` must be at least 0, found {options.final_seeds}.")
    if options.pareto and (options.searcher, options.scheduler) != ("optuna", "none"):
        raise ConfigError(
            f"`--pareto` needs `--searcher optuna --scheduler none`, found {options.searcher} and {options.scheduler}: ASHA "
            "compares trials by their score alone, and would stop the fast ones."
        )
    if options.searcher == "grid" and options.trials > (size := len(space.grid())):
        raise ConfigError(f"`--trials {options.trials}` asks for more than the {size} combinations of the grid.")


def number(value: int | str | None) -> int | None:
    """What `--max-concurrent` and the other numbers mean: None for auto."""
    return None if value == AUTO or value is None else int(value)
