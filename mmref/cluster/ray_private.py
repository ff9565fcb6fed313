"""Every private name of Ray's that mmref uses, each behind a function of ours that says what it is for.

Ray moves such names from one version to the next without notice. They are collected here so that a new version is tried in
one place: `NAMES` lists them, and tests/cluster/test_ray_private.py says of each that is gone what mmref can no longer do.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

# Each private name, as "module:name", with what mmref cannot do without it.
NAMES = {
    "ray._private.utils:get_system_memory": "size the object store of a local cluster by its container's memory",
    "ray._private.services:canonicalize_bootstrap_address_or_die": "find the cluster that RAY_ADDRESS=auto means",
    "ray._private.services:find_bootstrap_address": "say that a cluster of `ray start` is not used",
    "ray._private.services:find_gcs_addresses": "say that a cluster of `ray start` is not used",
    "ray._raylet:GcsClient": "ask whether a cluster answers at an address, without waiting for minutes",
    "ray._raylet:Config": "have this process read the token mode that was set after Ray was imported",
    "ray._private.ray_constants:ENABLE_RAY_CLUSTER": "start a local cluster that listens on loopback alone",
    "ray._private.authentication.authentication_token_generator:generate_new_authentication_token": "make a token",
    "ray.train.v2._internal.constants:ENV_VARS_TO_PROPAGATE": "tell Ray Train's watchdog which cluster it is on",
    "ray._private.state:jobs": "find services that ended without removing their replicas",
    "ray._private.state:state": "see which nodes are drained, and the placement groups that dead actors left behind",
    "ray.experimental.internal_kv:_internal_kv_put": "keep notes in the cluster: requests to stop, who holds which resources",
    "ray.experimental.internal_kv:_internal_kv_get": "read those notes",
    "ray.experimental.internal_kv:_internal_kv_del": "remove those notes",
    "ray.experimental.internal_kv:_internal_kv_list": "find the notes of readers that are gone",
    "ray.train.v2._internal.execution.context:get_train_context": "hear that a node is being taken away without waiting",
    "ray.train.v2._internal.execution.failure_handling:DefaultFailurePolicy": "end a run at once on an error of its own",
    "ray.train.v2._internal.execution.failure_handling:FailureDecision": "end a run at once on an error of its own",
    "ray.train.v2._internal.execution.scaling_policy:ElasticScalingPolicy": "keep workers to numbers that divide the batch",
    "ray.train.v2._internal.execution.scaling_policy:NoopDecision": "leave a running group of workers as it is",
    "ray.train.v2._internal.execution.scaling_policy:ResizeDecision": "see that Ray Train would add workers",
    "ray.data._internal.execution.execution_callback:ExecutionCallback": "keep Ray Data's loop from taking half of the cores",
    "ray.data._internal.execution.backpressure_policy:BackpressurePolicy": "list a run's steps no further than readers need",
    "ray.data._internal.execution.backpressure_policy:ENABLED_BACKPRESSURE_POLICIES": "keep Ray Data's own limits beside ours",
    "ray.data._internal.execution.backpressure_policy:ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY": "add a limit to them",
}
MODULES = {path.partition(":")[2]: path.partition(":")[0] for path in NAMES}


def _private(name: str) -> Any:
    """A name of `NAMES`, imported when it is asked for."""
    return getattr(importlib.import_module(MODULES[name]), name)


def __getattr__(name: str) -> Any:
    """The classes of `NAMES` that mmref derives from: `from mmref.cluster.ray_private import ExecutionCallback`."""
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _private(name)


# -- this machine --------------------------------------------------------------------------------------------------------


def system_memory() -> int:
    """Bytes of memory of this machine, or of the container's limit where it is lower."""
    return int(_private("get_system_memory")())


# -- connecting ----------------------------------------------------------------------------------------------------------

# This program ends with 0 where a cluster answers at its argument, HOST:PORT.
PROBE = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"


def running_cluster() -> str:
    """HOST:PORT of the cluster that runs on this machine. Raises ConnectionError or ValueError where none does."""
    return str(_private("canonicalize_bootstrap_address_or_die")("auto"))


def started_cluster() -> str | None:
    """HOST:PORT of the cluster that `ray start --head` has started on this machine last, where it runs."""
    address = _private("find_bootstrap_address")(None)
    return str(address) if address and address in _private("find_gcs_addresses")() else None


def read_settings_anew() -> None:
    """Have Ray's core read RAY_* variables that were set after it was imported."""
    _private("Config").initialize("")


def enable_cluster(enabled: bool) -> bool:
    """Whether a node that this process starts may be reached from others; what it was before."""
    constants = importlib.import_module(MODULES["ENABLE_RAY_CLUSTER"])
    before, constants.ENABLE_RAY_CLUSTER = bool(constants.ENABLE_RAY_CLUSTER), enabled  # type: ignore[attr-defined]
    return before


def new_token() -> str:
    """A token as Ray makes them."""
    return str(_private("generate_new_authentication_token")())


def propagate(variable: str) -> None:
    """Have Ray Train hand an environment variable on to its controller and workers."""
    _private("ENV_VARS_TO_PROPAGATE").add(variable)


# -- notes in the cluster ------------------------------------------------------------------------------------------------


def put_note(key: str, value: str) -> None:
    """Keep a note in the cluster that this process is connected to, in place of one of the same key."""
    _private("_internal_kv_put")(key, value)


def get_note(key: str) -> str | None:
    """A note of the cluster, None where there is none."""
    found = _private("_internal_kv_get")(key)
    return found.decode() if found else None


def remove_note(key: str) -> None:
    """Remove a note, where there is one."""
    _private("_internal_kv_del")(key)


def list_notes(prefix: str) -> list[str]:
    """Keys of the notes that begin so."""
    return [key.decode() for key in _private("_internal_kv_list")(prefix)]


# -- what the cluster does -----------------------------------------------------------------------------------------------


def draining_nodes() -> set[str]:
    """Ids of nodes that are being taken away."""
    return set(_private("state").get_draining_nodes())


def preferably_here() -> Any:
    """The scheduling strategy of what is to run on this process's node where it has room, and on another one where it has not.

    The public strategy waits for room. That argument of the class is private.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True, _spill_on_unavailable=True)


def node_is_drained() -> bool:
    """Whether Ray has told this training worker that a node of its run is being taken away.

    `ray.train.get_preemption_info()` says the same, but waits for all ranks at every call.
    """
    return _private("get_train_context")().preemption_context.preemption_info is not None


def living_jobs() -> set[str]:
    """Ids of the jobs of this cluster that have not ended."""
    return {job["JobID"] for job in _private("jobs")() if not job["IsDead"]}


def placement_groups() -> Iterator[bytes]:
    """The cluster's placement groups, each as a serialized PlacementGroupTableData."""
    yield from _private("state")._connect_and_get_accessor().get_placement_group_table()


def actor_is_dead(actor_id: str) -> bool:
    """Whether an actor, by its id in hex digits, has ended."""
    return bool(_private("state").actor_table(actor_id).get("State") == "DEAD")
