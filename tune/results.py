"""What a sweep learns and leaves behind: trials.csv, best.yaml, the lines and the table on the terminal."""

from __future__ import annotations

import csv
import io
import time
from dataclasses import dataclass, field
from typing import Any

from ray.tune import Callback

from mmref.config import Config, dump_yaml
from mmref.rundir import RunDir
from tune.trial import ERROR, abort

SETTINGS = ("kind", "weight", "top_r", "tau")  # of the refinement


@dataclass
class Trial:
    """One trial: what it tried, how far it came, and its best evaluation."""

    number: int
    id: str
    values: dict[str, Any]
    status: str = "running"  # then finished, stopped-early, failed, or interrupted with the sweep
    steps: int = 0
    score: float | None = None  # the best over its evaluations
    best: dict[str, Any] = field(default_factory=dict)  # all that this evaluation reported
    began: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    error: str = ""

    @property
    def refinement(self) -> dict[str, Any]:
        """Refinement of the best evaluation: kind, weight, top_r, tau; a weight alone, 0, where none was searched."""
        found = {s: self.best[f"val_refine_{s}"] for s in SETTINGS if f"val_refine_{s}" in self.best}
        return found if found.get("weight") else {k: v for k, v in found.items() if k == "weight"}


class Recorder(Callback):
    """Follows a sweep: prints a line for every evaluation and keeps trials.csv up to date."""

    def __init__(self, run: RunDir, names: list[str], trials: int, max_steps: int) -> None:
        self.run, self.names, self.count, self.max_steps = run, names, trials, max_steps
        self.trials: dict[str, Trial] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if trial.trial_id not in self.trials:
            record = Trial(trials.index(trial), trial.trial_id, dict(trial.config))
            self.trials[trial.trial_id] = record
            self._print(record, "starts: " + ", ".join(f"{k} {_short(v)}" for k, v in record.values.items()))

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        record = self.trials[trial.trial_id]
        if "score" not in result:
            return
        record.steps = max(record.steps, int(result["step"]))
        if record.score is None or result["score"] > record.score:
            record.score, record.best = float(result["score"]), dict(result)
        self._print(record, f"step {result['step']}/{self.max_steps}  score {result['score']:.2f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.trials[trial.trial_id]
        abort(trial.last_result or {})
        self._end(record, "finished" if record.steps >= self.max_steps else "stopped-early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        record = self.trials[trial.trial_id]
        record.error = self._cause(trial.trial_id)
        self._end(record, "failed")

    def close(self) -> None:
        """The sweep is over: what still runs was interrupted with it."""
        for record in self.trials.values():
            if record.status == "running":
                self._end(record, "interrupted")

    def _end(self, record: Trial, status: str) -> None:
        record.status, record.seconds = status, time.monotonic() - record.began
        self._print(record, f"{status} after {record.steps} steps{': ' + record.error if record.error else ''}")
        self.write()

    def _cause(self, trial_id: str) -> str:
        """What ended a trial: the first line of its error.txt."""
        name = f"trials/{trial_id}/{ERROR}"
        if not self.run.exists(name):
            return "its process was lost without an error (out of memory, or a lost node)"
        return self.run.read_text(name).splitlines()[0]

    def _print(self, record: Trial, text: str) -> None:
        states = [t.status for t in self.trials.values()]
        leader = self.best()
        best = f", best {leader.score:.2f} (trial {leader.number})" if leader else ""
        done = len(states) - states.count("running")
        print(
            f"[{done}/{self.count} done, {states.count('running')} running{best}] trial {record.number} {text}",
            flush=True,
        )

    def best(self) -> Trial | None:
        """The trial with the best score that did not fail, the earlier one on a tie."""
        scored = [t for t in self.trials.values() if t.score is not None and t.status != "failed"]
        return max(scored, key=lambda t: (t.score, -t.number), default=None)

    def ranked(self) -> list[Trial]:
        """Best first, failed ones last."""
        worst = float("-inf")
        return sorted(
            self.trials.values(),
            key=lambda t: (t.status == "failed", -(worst if t.score is None else t.score), t.number),
        )

    def write(self) -> None:
        self.run.write_text("trials.csv", trials_csv(sorted(self.trials.values(), key=lambda t: t.number), self.names))


def trials_csv(trials: list[Trial], names: list[str]) -> str:
    """A row a trial: number, id, status, best score with its metrics, values, refinement, steps, seconds, error."""
    out = io.StringIO()
    metrics = ("val_R@1", "val_mAP", "val_refined_R@1", "val_refined_mAP")
    columns = ["trial", "id", "status", "score", *metrics, *names, *(f"refinement.{s}" for s in SETTINGS)]
    table = csv.writer(out, lineterminator="\n")
    table.writerow([*columns, "best_step", "steps", "seconds", "error"])
    for t in trials:
        row = [t.number, t.id, t.status, "" if t.score is None else t.score]
        row += [t.best.get(m, "") for m in metrics] + [t.values[n] for n in names]
        row += [t.refinement.get(s, "") for s in SETTINGS]
        table.writerow([*row, t.best.get("step", ""), t.steps, f"{t.seconds:.1f}", t.error])
    return out.getvalue()


def best_yaml(config: Config, trial: Trial, metric: str, trial_steps: int) -> str:
    """The best trial's config as `mmref train --config` takes it, with where it comes from in comments."""
    r = trial.refinement
    found = ", ".join(f"{k} {_short(v)}" for k, v in r.items()) if r.get("weight") else "none helped"
    head = [
        f"The best of a sweep: trial {trial.number}, val {metric} {trial.score:.2f} at step {trial.best['step']} of its "
        f"{trial_steps}.",
        f"Refinement there: {found}. It is chosen again on val from the grid in `eval` when this config is trained.",
        *(f"  {name} = {_short(value)}" for name, value in trial.values.items()),
    ]
    return "".join(f"# {line}\n" for line in head) + dump_yaml(config)


def format_trials(trials: list[Trial], names: list[str], max_steps: int) -> str:
    """The table at the end, in the given order."""
    header = ["trial", "status", "score", *(n.split(".", 1)[-1] for n in names), "refinement", "steps", "seconds"]
    rows = [
        [
            str(t.number),
            t.status,
            "-" if t.score is None else f"{t.score:.2f}",
            *(_short(t.values[n]) for n in names),
            f"{t.refinement['kind']} {_short(t.refinement['weight'])}" if "kind" in t.refinement else "none",
            str(t.steps),
            f"{t.seconds:.0f}",
        ]
        for t in trials
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [header, *rows]]
    lines += [f"trial {t.number}: {t.error}" for t in trials if t.error]
    done, full = sum(t.steps for t in trials), len(trials) * max_steps
    return "\n".join([*lines, f"{done} steps run, {full} had every trial run to its end ({done / max(full, 1):.0%})"])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
