"""Connecting to Ray: the running cluster, or a local one for this process alone."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from mmref.config import Config
from mmref.errors import ClusterTooSmallError

SETTINGS = {  # Ray Train hands variables of this prefix on to its controller and workers
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report is committed at the next check; the default is 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # how long to wait for places, as of a node that replaces a lost one
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # how soon workers hear that a node is being drained; the default is 5 s
    # Ray starts its workers at niceness 15: beside anything else that computes they would hardly run
    "RAY_worker_niceness": "0",
    # workers and readers of a small machine start together: do not warn of it
    "RAY_worker_maximum_startup_concurrency": "16",
}
START_ATTEMPTS = 3
LOCAL_CPUS = 8  # logical: on a small machine, workers and readers share its cores
MEMORY_SHARE = 0.3  # most of a machine's memory that the object store of a local cluster takes
SHM_NEEDED = 10e9  # bytes: from here on Ray insists on /dev/shm; a smaller object store may lie in /tmp


def cores() -> int:
    """CPU cores this process may use: those of its container, where a quota limits it."""
    from ray._private.utils import get_num_cpus

    return max(1, int(get_num_cpus(override_docker_cpu_warning=True)))


@contextlib.contextmanager
def connect(need_cpus: float = 1, storage_gb: float = 1.0) -> Iterator[None]:
    """Use the cluster of RAY_ADDRESS or of a submitted job, else start a local one and stop it afterwards.

    A local cluster offers max(8, cores) logical CPUs; nothing else of it is visible outside this machine.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    else:
        cpus = max(LOCAL_CPUS, cores())
        if need_cpus > cpus:
            raise ClusterTooSmallError(
                f"the run needs {need_cpus:g} CPUs and this machine offers {cpus} (logical); start it on a cluster "
                "(`ray job submit`), or lower `--train.workers` or `--data.readers` (CPUs that read for each worker), of an "
                "evaluation `--workers`."
            )
        _start_local(cpus, storage_gb)
    try:
        with named_address():
            yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that nothing stays behind; a process connected to Ray would else be aborted by it."""

    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # None: Ray's handler, which is not Python's


def object_store_bytes(storage_gb: float, memory: float, shm_free: float | None) -> int:
    """Size of a local cluster's object store: what is asked for, as far as the machine has it.

    Args:
        memory: of the machine or container, in bytes.
        shm_free: bytes free in /dev/shm; None where there is none.
    """
    store = min(max(storage_gb, 0.1) * 1e9, MEMORY_SHARE * memory)
    if shm_free is not None and store >= SHM_NEEDED:
        store = max(0.99 * SHM_NEEDED, min(store, 0.9 * shm_free))
    return int(store)


def _start_local(cpus: int, storage_gb: float) -> None:
    """Start a cluster on this machine. Ray gives a node 30 s to come up, too short on a busy one: try again."""
    import ray
    from ray._private.utils import get_system_memory

    shm = Path("/dev/shm")
    store = object_store_bytes(storage_gb, get_system_memory(), shutil.disk_usage(shm).free if shm.exists() else None)
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=cpus,
                object_store_memory=store,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            return
        except Exception as error:  # Ray raises a bare Exception here
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise
            ray.shutdown()


@contextlib.contextmanager
def named_address() -> Iterator[None]:
    """Tell everything below which cluster it is on.

    Ray Train's watchdog looks its controller up through "the" cluster of the machine. Where two are running, say two
    people's runs on one workstation, it may ask the other one, take the controller for dead, and take the workers away.
    """
    import ray
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("RAY_ADDRESS", None)
        else:
            os.environ["RAY_ADDRESS"] = before


def machine(config: Config) -> str:
    """What a run trains on, called on a node of the cluster it is connected to: "AMD EPYC, workers: 2 of 1 thread", "H200,
    workers: 2". The times of steps compare where it is the same."""
    if config.train.gpu:
        import ray

        kind = "accelerator_type:"
        kinds = sorted(name.removeprefix(kind) for name in ray.cluster_resources() if name.startswith(kind))
        return f"{' or '.join(kinds) or 'GPU'}, workers: {config.train.workers}"
    try:
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    except OSError:  # not Linux
        lines = []
    processor = lines[0].partition(":")[2].strip() if lines else platform.machine()
    threads = f"{config.train.threads} thread{'' if config.train.threads == 1 else 's'}"
    return f"{processor}, workers: {config.train.workers} of {threads}"


def has_gpu() -> bool:
    """Whether the cluster that Ray is connected to has a GPU: Ray Data would wait for one without a word."""
    import ray

    return ray.cluster_resources().get("GPU", 0) >= 1


def needed_cpus(config: Config) -> float:
    """CPUs of a training run: its workers, and the readers of each beside them."""
    return config.train.workers * (config.train.cpus_per_worker + config.data.readers)


def check_resources(config: Config) -> None:
    """Raise ClusterTooSmallError, with the arithmetic, when workers would leave Ray Data no CPU to read with.

    Ray Data would not fail in that case: it would wait in silence. A run with `train.min_workers` starts with those.
    """
    import ray

    have = ray.cluster_resources()
    t = config.train
    workers = t.min_workers or t.workers
    need = workers * (t.cpus_per_worker + config.data.readers)
    if have.get("CPU", 0) + 1e-6 < need:
        cpus = have.get("CPU", 0)
        readers = math.floor(cpus / workers - t.cpus_per_worker)
        raise ClusterTooSmallError(
            f"{workers} workers x ({t.cpus_per_worker:g} CPU + {config.data.readers} readers) = {need:g} CPUs, the cluster "
            f"has {cpus:g}: Ray Data would starve. Lower {f'`--data.readers` to at most {readers}, or ' if readers > 0 else ''}"
            f"`--train.workers` to at most {max(1, math.floor(cpus / (t.cpus_per_worker + config.data.readers)))}, or add nodes."
        )
    if t.gpu and have.get("GPU", 0) < workers:
        raise ClusterTooSmallError(
            f"{workers} workers need a GPU each, the cluster has {have.get('GPU', 0):g}. Lower `--train.workers`, or "
            "train on CPUs with `--train.gpu false`."
        )
