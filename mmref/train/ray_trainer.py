"""Ray Train's trainer with policies of its own: which numbers of workers a run may have, and which errors end it."""

from __future__ import annotations

import socket
from typing import Any

import ray
from ray.train.torch import TorchTrainer

from mmref.cluster.ray_private import (
    DefaultFailurePolicy,
    ElasticScalingPolicy,
    FailureDecision,
    NoopDecision,
    ResizeDecision,
    draining_nodes,
)
from mmref.config import Config
from mmref.errors import MMRefError
from mmref.run.directory import RunDir
from mmref.train.elastic import largest_count
from mmref.train.stop import GROW, request_stop

COORDINATOR_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 3.0
RETRIES = "\nFailed to apply UDF transform"  # begins what Ray Data adds to the text of an error


class AllowedCounts(ElasticScalingPolicy):
    """Ray Train's elastic policy, kept to numbers of workers that divide the batch and leave CPUs to the readers.

    Ray Train would resize a running group by ending it, which loses the steps since its checkpoint. Here the group is
    asked to checkpoint and leave, and the driver starts the larger one.
    """

    def __init__(self, scaling_config: Any, config: Config) -> None:
        super().__init__(scaling_config)
        self._config = config

    def _get_reserved_resources(self) -> dict[str, Any] | None:
        """As the nodes are now: the coordinator's own view may be 20 s old, and hold a node that was lost."""
        try:
            return ray.get(
                self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True),
                timeout=COORDINATOR_TIMEOUT_S,
            )
        except ray.exceptions.RayError:
            return None  # on a busy machine; the policy asks again

    def _count_possible_workers(self, reserved_resources: dict[str, Any]) -> int:
        draining = draining_nodes()
        nodes = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in draining and _answers(n)]
        alive = {n["NodeID"]: n["Resources"] for n in nodes}
        places = super()._count_possible_workers({n: r for n, r in reserved_resources.items() if n in alive})
        return largest_count(self._config, places, sum(r.get("CPU", 0.0) for r in alive.values()))

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers:
            request_stop(RunDir(self._config.run_dir), GROW)
        return NoopDecision()  # workers on nodes that are lost fail by themselves


def _answers(node: dict[str, Any]) -> bool:
    """Whether a node can be reached. Ray itself takes several failed health checks for the loss of a node."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_TIMEOUT_S).close()
    except OSError:
        return False
    return True


class NamedErrorsEnd(DefaultFailurePolicy):
    """Ray Train's policy, but an error of mmref.errors ends the run at once: workers that start again would only meet it
    again. Storage that fails has been tried for a minute by then."""

    def make_decision(self, training_failed_error: Any) -> Any:
        if isinstance(named_error(training_failed_error), MMRefError):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


def named_error(error: Exception) -> Exception:
    """Our own error inside Ray Train's, or Ray Train's."""
    for cause in getattr(error, "worker_failures", {}).values():
        while cause is not None:
            # Ray's copy of an error of another process is one of ours too, but its text is a traceback.
            if isinstance(cause, MMRefError) and not isinstance(cause, ray.exceptions.RayTaskError):
                text, of_ray_data, _ = str(cause).partition(RETRIES)
                return type(cause)(text) if of_ray_data else cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    return error


class Trainer(TorchTrainer):
    """TorchTrainer with NamedErrorsEnd, and AllowedCounts where the number of workers is a range."""

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = config

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs["failure_policy"] = NamedErrorsEnd(self.run_config.failure_config)
        if self.scaling_config.elasticity_enabled:  # type: ignore[attr-defined]
            kwargs["scaling_policy"] = AllowedCounts(self.scaling_config, self._config)
        return super()._initialize_and_run_controller(**kwargs)  # type: ignore[misc]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Signals are `stop.Termination`'s. Ray Train's own handler ends the process with status 0 and without a checkpoint,
        and stays after the run, whose controller it keeps alive."""
