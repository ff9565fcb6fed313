"""A trial: the same training as `mmref train`, nested inside a Ray Tune trial."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import ray
from ray.tune.integration.ray_train import TuneReportCallback

from mmref.cluster import SETTINGS
from mmref.config import from_dict
from mmref.rundir import RunDir
from mmref.train.trainer import fit, prepare_run
from tune.space import with_values

ERROR = "error.txt"  # in a failed trial's run directory
CONTROLLER = "controller"  # in a result: the actor that controls the trial's training
ABORT_TIMEOUT_S = 60


def run_trial(values: dict[str, Any], base: dict[str, Any]) -> None:
    """Train with the base config and a trial's values; every evaluation is reported to Tune.

    The run directory bears the trial's id inside the base's, so that a trial which is started again goes on; what ends a
    trial badly is written to error.txt there.
    """
    from ray import tune

    for name, value in SETTINGS.items():  # of the nested training, for which this process is the driver
        os.environ.setdefault(name, value)
    config = with_values(from_dict(base), values)
    config.run_dir = f"{base['run_dir']}/{tune.get_context().get_trial_id()}"
    run = RunDir(config.run_dir)
    run.remove(ERROR)
    try:
        prepare_run(config, run)
        fit(config, run, callbacks=[Reporter()])
    except Exception as error:  # whatever ends it: a result of the sweep
        run.write_text(ERROR, f"{type(error).__name__}: {error}\n")
        raise


class Reporter(TuneReportCallback):
    """Reports every evaluation to Tune, with a handle of the training's controller, in which it runs."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if not any(name.startswith("val_") for name in metrics[0]):
            return  # a checkpoint because a node is taken away: it was not evaluated
        controller = ray.get_runtime_context().current_actor
        super().after_report(run_context, [{**metrics[0], CONTROLLER: controller}], checkpoint)


def abort(result: dict[str, Any]) -> None:
    """End the training behind a trial's last result: its workers, and the resources they hold.

    Tune knows of a trial's own process alone. When that goes, the controller goes with it, without a chance to give its
    placement group back. Ray leaves that to an actor which asks the dashboard whether the controller lives; without a
    dashboard, or on a machine with several Ray instances, it gets no answer and the CPUs of the trial would be lost.
    """
    controller = result.get(CONTROLLER)
    if controller is None:
        return
    # it exits, as it should, or was gone before
    with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        ray.get(controller.abort.remote(), timeout=ABORT_TIMEOUT_S)
