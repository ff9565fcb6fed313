"""Follows a sweep while Ray Tune runs it: the log, the display, and the end of trainings that Tune stopped."""

from __future__ import annotations

import time
from collections.abc import Set
from typing import Any

from ray.tune import Callback

from mmref.run.directory import RunDir
from mmref.tuning.display import Display
from mmref.tuning.results import short, trials_parquet
from mmref.tuning.trial_log import TrialLog, folder, median_step_seconds
from mmref.tuning.trial_run import CONTROLLER, ERROR, abort, reclaim

RECLAIM_EVERY_S = 5.0


class Recorder(Callback):
    """Ray Tune's callback of a sweep. Trials are known by the number in their config."""

    def __init__(
        self,
        run: RunDir,
        log: TrialLog,
        names: list[str],
        max_steps: int,
        display: Display,
        stopped: Set[int] = frozenset(),
    ) -> None:
        """stopped: the numbers of the trials that the scheduler has stopped, which it adds to."""
        self.run, self.log, self.names, self.max_steps, self.display = run, log, names, max_steps, display
        self.stopped = stopped
        self.errors: dict[int, str] = {}  # as trials report them
        self.controllers: dict[int, Any] = {}  # of the trainings that run
        self._reclaimed = 0.0  # when

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        record = self.log.trials[number]
        self.log.start(number)
        values = ", ".join(f"{k} {short(v)}" for k, v in record.values.items())
        self.display.say(record, f"goes on after step {record.steps}" if record.results else f"starts: {values}")

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        number = trial.config["number"]
        if CONTROLLER in result:
            self.controllers[number] = result[CONTROLLER]
        if ERROR in result:
            self.errors[number] = result[ERROR]
        if "score" not in result:
            return
        kept = {k: v for k, v in result.items() if k in ("step", "score") or k.startswith("val_")}
        if self.log.result(number, kept):
            record = self.log.trials[number]
            self.display.say(record, f"step {kept['step']}/{self.max_steps}  score {kept['score']:.2f}")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self._reclaimed >= RECLAIM_EVERY_S:
            reclaim()
            self._reclaimed = time.monotonic()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process was lost, and Tune starts it again: it goes on from its checkpoint."""
        abort(self.controllers.pop(trial.config["number"], None))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """It returned, or the scheduler stopped it."""
        number = trial.config["number"]
        error = self.errors.pop(number, "")
        abort(self.controllers.pop(number, None))
        if error:
            self._end(number, "failed", error)
        elif self.log.trials[number].steps >= self.max_steps:
            self._end(number, "finished")
        elif number in self.stopped:
            self._end(number, "stopped-early")
        else:
            self._end(number, "failed", "it ended before its last step without saying why")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its process was lost too often."""
        number = trial.config["number"]
        abort(self.controllers.pop(number, None))
        lost = "its process was lost again and again (out of memory, or lost nodes)"
        self._end(number, "failed", self.errors.pop(number, "") or lost)

    def close(self) -> None:
        """The sweep is over: what still runs was interrupted with it."""
        for controller in self.controllers.values():
            abort(controller)
        self.log.interrupt()
        self.write()

    def write(self) -> None:
        """trials.parquet, as far as the sweep has come."""
        if self.log.trials:
            self.run.write_bytes("trials.parquet", trials_parquet(list(self.log.trials.values()), self.names))

    def _end(self, number: int, status: str, error: str = "") -> None:
        training = RunDir(self.run.join(folder(number)))
        self.log.end(number, status, median_step_seconds(training), error)
        record = self.log.trials[number]
        self.display.say(record, f"{status} after {record.steps} steps{': ' + error if error else ''}")
        self.write()
