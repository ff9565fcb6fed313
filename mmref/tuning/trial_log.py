"""The trials of a sweep, and trials.jsonl, from which it goes on after anything."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from mmref.run.directory import JsonLines, RunDir, read_jsonl

LOG = "trials.jsonl"
SETTINGS = ("kind", "weight", "top_r", "tau")  # of the refinement


@dataclass
class Trial:
    """One trial: what it tried, its evaluations, and how it ended."""

    number: int
    values: dict[str, Any]
    status: str = "running"  # then finished, stopped-early or failed; interrupted where the sweep ended before it
    results: list[dict[str, Any]] = field(default_factory=list)  # evaluations in order: step, score, val_*
    seconds: float = 0.0  # over all its starts
    step_seconds: float | None = None  # median time of a step, known at its end
    error: str = ""

    @property
    def running(self) -> bool:
        """Whether it is to go on."""
        return self.status in ("running", "interrupted")

    @property
    def steps(self) -> int:
        return int(self.results[-1]["step"]) if self.results else 0

    @property
    def best(self) -> dict[str, Any]:
        """Its best evaluation, the earlier one on a tie; {} before the first."""
        return max(self.results, key=lambda r: (r["score"], -r["step"]), default={})

    @property
    def score(self) -> float | None:
        return self.best.get("score")

    @property
    def refinement(self) -> dict[str, Any]:
        """Refinement of the best evaluation: kind, weight, top_r, tau; a weight alone, 0, where none helped."""
        best = self.best
        found = {s: best[f"val_refine_{s}"] for s in SETTINGS if f"val_refine_{s}" in best}
        return found if found.get("weight") else {k: v for k, v in found.items() if k == "weight"}


def folder(number: int) -> str:
    """Run directory of a trial inside the sweep's."""
    return f"trials/{number:03d}"


class TrialLog:
    """All trials, each change written to trials.jsonl before anything else comes of it.

    Lines: {"trial", "values"} when it is handed out, {"trial", "seconds", "step", "score", ...} at an evaluation,
    {"trial", "status", "seconds", "step_seconds", "error"} at its end (`interrupted`: a failed one that is to go on).
    """

    def __init__(self, run: RunDir) -> None:
        """Read what is there already."""
        self.trials: dict[int, Trial] = {}
        self._began: dict[int, float] = {}
        for line in read_jsonl(run, LOG):
            self._apply(line)
        self._lines = JsonLines(run, LOG)

    def begin(self, number: int, values: dict[str, Any]) -> None:
        self._write({"trial": number, "values": values})

    def start(self, number: int) -> None:
        """Its clock runs: not written, since time before an evaluation that was never heard of is lost with it."""
        self._began[number] = time.monotonic() - self.trials[number].seconds

    def result(self, number: int, evaluation: dict[str, Any]) -> bool:
        """Add an evaluation; False where the trial, started again, repeats one that is known."""
        if evaluation["step"] <= self.trials[number].steps:
            return False
        self._write({"trial": number, "seconds": self._seconds(number), **evaluation})
        return True

    def end(self, number: int, status: str, step_seconds: float | None, error: str = "") -> None:
        seconds = self._seconds(number)
        line = {"trial": number, "status": status, "seconds": seconds, "step_seconds": step_seconds, "error": error}
        self._write(line)

    def reopen(self, number: int) -> None:
        """A failed trial is to go on."""
        self._write({"trial": number, "status": "interrupted", "seconds": self.trials[number].seconds,
                     "step_seconds": None, "error": ""})  # fmt: skip

    def interrupt(self) -> None:
        """The sweep is over: what still runs was interrupted with it. Not written, for a resumed sweep goes on with it."""
        for trial in self.trials.values():
            if trial.status == "running":
                trial.status = "interrupted"

    def _seconds(self, number: int) -> float:
        return round(time.monotonic() - self._began.get(number, time.monotonic()), 1)

    def _write(self, line: dict[str, Any]) -> None:
        self._lines.append(line)
        self._lines.flush()
        self._apply(line)

    def _apply(self, line: dict[str, Any]) -> None:
        number = line["trial"]
        if "values" in line:
            self.trials[number] = Trial(number, line["values"])
            return
        trial = self.trials[number]
        trial.seconds = line["seconds"]
        if "status" in line:
            trial.status, trial.step_seconds, trial.error = line["status"], line["step_seconds"], line["error"]
        else:
            trial.results.append({k: v for k, v in line.items() if k not in ("trial", "seconds")})


def best_of(trials: list[Trial]) -> Trial | None:
    """The trial with the best score that did not fail, the earlier one on a tie; None where none has a score."""
    scored = [t for t in trials if t.score is not None and t.status != "failed"]
    return max(scored, key=lambda t: (t.score, -t.number), default=None)


def ranked(trials: list[Trial]) -> list[Trial]:
    """Best first, failed ones last."""
    worst = float("-inf")
    return sorted(trials, key=lambda t: (t.status == "failed", -(worst if t.score is None else t.score), t.number))


def pareto_front(trials: list[Trial]) -> list[Trial]:
    """Finished trials that no other beats in score and time of a step at once, fastest first."""
    known = [t for t in trials if t.status == "finished" and t.score is not None and t.step_seconds is not None]
    front: list[Trial] = []
    for trial in sorted(known, key=lambda t: (t.step_seconds, -(t.score or 0))):
        if not front or (trial.score or 0) > (front[-1].score or 0):
            front.append(trial)
    return front


def median_step_seconds(run: RunDir) -> float | None:
    """Median time of a step of a training, in seconds, without its first log line, which holds the warm-up."""
    times = [record["step_seconds"] for record in read_jsonl(run) if "step_seconds" in record]
    return statistics.median(times[1:] or times) if times else None
