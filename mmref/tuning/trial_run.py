"""A trial: the same training as `mmref train`, nested inside a Ray Tune trial."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import ray
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from mmref.cluster import ray_private
from mmref.cluster.connection import SETTINGS, named_address
from mmref.config import Config, from_dict
from mmref.config.inputs import settled
from mmref.errors import StorageError
from mmref.run.checkpoints import latest_checkpoint
from mmref.run.directory import RunDir, read_jsonl
from mmref.train.trainer import fit, prepare_run
from mmref.train.validation import score_of
from mmref.tuning.failure import reason
from mmref.tuning.space import with_values
from mmref.tuning.trial_log import folder

ERROR = "error"  # in a result: what ended the trial, in a line
ERROR_FILE = "error.txt"  # in a failed trial's run directory: the whole of it
CONTROLLER = "controller"  # in a result: the actor that controls the trial's training
ABORT_TIMEOUT_S = 60


def run_trial(trial: dict[str, Any], base: dict[str, Any]) -> None:
    """Train with the base config and a trial's values; every evaluation is reported to Tune.

    The run directory bears the trial's number inside the sweep's, so that a trial which is started again goes on, after
    reporting what its checkpoint holds: the driver may have gone before it heard. What ends a trial badly is a result like any
    other, and error.txt there has the whole of it. Only a lost process, this one or the training's controller, is an error to
    Tune, which starts the trial again.

    Args:
        trial: {"number", "values": dotted config fields}.
        base: the config, its `run_dir` the sweep's.
    """
    from ray import tune

    for name, value in SETTINGS.items():  # of the nested training, for which this process is the driver
        os.environ.setdefault(name, value)
    run = RunDir(f"{base['run_dir']}/{folder(trial['number'])}")
    try:
        RunDir(base["run_dir"]).check_shared("sweep.json")
        run.remove(ERROR_FILE)
        config = settled(with_values(from_dict(base), {**trial["values"], "run_dir": run.path}))
        with run.held(), named_address():
            prepare_run(config, run)
            for evaluation in evaluations(config, run):
                tune.report(evaluation)
            fit(config, run, callbacks=[Reporter()])
    except ray.exceptions.RayActorError:
        raise  # the training's controller: it was aborted because this trial is being stopped, or its process was lost
    except Exception as error:
        tune.report({ERROR: reason(error)})
        if not isinstance(error, StorageError):
            with contextlib.suppress(StorageError):
                run.write_text(ERROR_FILE, f"{reason(error)}\n\n{error}\n")


def evaluations(config: Config, run: RunDir) -> list[dict[str, Any]]:
    """What a run has evaluated up to its latest checkpoint, as it was reported: step, score, val_*."""
    latest = latest_checkpoint(run)
    found = []
    for line in read_jsonl(run) if latest else []:
        if "val_mAP" in line and latest and line["step"] <= latest.step:
            named = {k: v for k, v in line.items() if k.startswith("val_")}
            score = score_of({k.removeprefix("val_"): v for k, v in named.items()}, config.eval.metric)
            found.append({"step": line["step"], "score": score, **named})
    return found


class Reporter(TuneReportCallback):
    """Reports every evaluation to Tune, with a handle of the training's controller, in which it runs."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if not any(name.startswith("val_") for name in metrics[0]):
            return  # a checkpoint because a node is taken away: it was not evaluated
        controller = ray.get_runtime_context().current_actor
        super().after_report(run_context, [{**metrics[0], CONTROLLER: controller}], checkpoint)


def abort(controller: Any) -> None:
    """End a training by its controller, None for none: its workers, and the resources they hold."""
    if controller is None:
        return
    # It exits, as it should, or was gone before.
    with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        ray.get(controller.abort.remote(), timeout=ABORT_TIMEOUT_S)


def reclaim() -> None:
    """Remove the placement groups that actors of this job have left behind when they died.

    A trial's process that is lost takes the controller of its training along, which has no chance to give its places back.
    Ray leaves that to an actor which asks the dashboard whether the controller lives; without a dashboard, or on a machine
    with several Ray instances, it gets no answer, and the trial that is started again would wait for its own CPUs.
    """
    job = ray.get_runtime_context().get_job_id()
    for data in ray_private.placement_groups():
        group = PlacementGroupTableData.FromString(data)
        creator = ray.ActorID(group.creator_actor_id)
        if group.state == PlacementGroupTableData.REMOVED or group.creator_job_id.hex() != job or creator.is_nil():
            continue
        if ray_private.actor_is_dead(creator.hex()):
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
