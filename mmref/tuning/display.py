"""What a person sees while a sweep runs: a table that keeps up on a terminal, a line for every event elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from mmref.extras import missing
from mmref.tuning.results import refinement_text, short, short_names
from mmref.tuning.trial_log import Trial, TrialLog, best_of, ranked


class Display:
    """As a context. Lines are printed where standard output is no terminal, or rich is not installed."""

    def __init__(self, log: TrialLog, count: int, max_steps: int) -> None:
        """count: trials of the whole sweep."""
        self.log, self.count, self.max_steps = log, count, max_steps
        self._live: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Ray Tune pickles its callbacks when it starts; a terminal cannot be."""
        return {**self.__dict__, "_live": None}

    def __enter__(self) -> Display:
        if sys.stdout.isatty() and not missing("tune", "rich"):
            from rich.live import Live

            # What does not fit is cut off below, and the whole table is printed at the end.
            self._live = Live(self.table(), refresh_per_second=2, vertical_overflow="ellipsis", transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, trial: Trial, text: str) -> None:
        """Something has happened to a trial."""
        if self._live is None:
            print(f"[{self.summary()}] trial {trial.number} {text}", flush=True)
        else:
            self._live.update(self.table())

    def summary(self) -> str:
        """`3/16 done, 2 running, best 61.20 (trial 1)`."""
        trials = list(self.log.trials.values())
        running = sum(t.running for t in trials)
        leader = best_of(trials)
        best = f", best {leader.score:.2f} (trial {leader.number})" if leader else ""
        return f"{len(trials) - running}/{self.count} done, {running} running{best}"

    def table(self) -> Any:
        """Every trial so far as a table of rich: the running ones, then the others, best first."""
        from rich.table import Table
        from rich.text import Text  # brackets of an error, as in `[/src/pair.cc:537]`, would be markup

        leader = best_of(list(self.log.trials.values()))
        table = Table(title=Text(self.summary()), title_justify="left", box=None, pad_edge=False, expand=True)
        for name in ("trial", "status", "step", "score", "refinement", "seconds"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("values", overflow="ellipsis", no_wrap=True, ratio=1)
        for trial in sorted(ranked(list(self.log.trials.values())), key=lambda t: not t.running):
            table.add_row(
                str(trial.number),
                trial.status,
                f"{trial.steps}/{self.max_steps}",
                "-" if trial.score is None else f"{trial.score:.2f}",
                Text(refinement_text(trial)),
                f"{trial.seconds:.0f}",
                Text(trial.error or _values(trial)),
                style="bold" if trial is leader else "red" if trial.error else "",
            )
        return table


def _values(trial: Trial) -> str:
    return ", ".join(f"{k} {short(v)}" for k, v in zip(short_names(list(trial.values)), trial.values.values()))
