"""Connecting to Ray: the running cluster, or a local one for this process alone."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import platform
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mmref.address import check_answers, cluster_address
from mmref.config import Config
from mmref.errors import ClusterStartError, ClusterTooSmallError, MMRefError
from mmref.locations import absolute, expanded
from mmref.seclusion import private_folder, secluded

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
START_LIMIT_S, NOTICE_S = 180.0, 20.0  # until Ray must have started; until what is waited for is said
SOCKET, SOCKET_BYTES = "sockets/plasma_store", 107  # the longest of a session; what a Unix socket's name may have
FILES, FILES_NEEDED = 65_536, 128  # open at once: as Ray's makers advise; with half of that it waits without a word
SHM_NEEDED = 10e9  # bytes: from here on Ray insists on /dev/shm; a smaller object store may lie in /tmp


def cores() -> int:
    """CPU cores this process may use: those of its container, where a quota limits it, or those it is bound to."""
    from ray._private.utils import get_num_cpus

    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else get_num_cpus()  # Linux alone has it
    return max(1, min(int(bound), int(get_num_cpus(override_docker_cpu_warning=True))))


def workers_that_fit(asked: int | None) -> int:
    """Actors or tasks of a CPU each: `asked`, None for one a core, but no more than a local cluster offers; that is said.

    Called before `connect`. A cluster that RAY_ADDRESS names may grow. Raises ClusterStartError as `cluster_address`.
    """
    import ray

    if asked == 0:  # in this process
        return 0
    wanted = cores() if asked is None else asked
    if ray.is_initialized() or cluster_address() or wanted <= offered_cpus():
        return wanted
    print(f"mmref: {offered_cpus()} workers instead of {wanted}: this machine offers no more CPUs", file=sys.stderr)
    return offered_cpus()


def offered_cpus() -> int:
    """Logical CPUs of a local cluster."""
    return max(LOCAL_CPUS, cores())


@contextlib.contextmanager
def connect(need_cpus: float = 1, storage_gb: float = 1.0) -> Iterator[None]:
    """Use the cluster of RAY_ADDRESS or of a submitted job, else start a local one and stop it afterwards.

    A local cluster offers max(8, cores) logical CPUs. It listens on 127.0.0.1 alone, asks for a token, exports no metrics, and
    its session lies in a folder of this user (`seclusion.py`); process groups of workers are torch's own affair.

    Raises:
        ClusterTooSmallError: a local cluster would not have the CPUs that are needed.
        ClusterStartError: Ray does not start here, or the cluster of RAY_ADDRESS cannot be joined.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if address := cluster_address():
        _join(address)
    else:
        cpus = offered_cpus()
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


@contextlib.contextmanager
def in_time(what: str, limit_s: float = START_LIMIT_S) -> Iterator[None]:
    """Say after NOTICE_S what is waited for, and raise ClusterStartError after `limit_s`: Ray may wait without a word."""
    if threading.current_thread() is not threading.main_thread():  # where no signal arrives: Ray's own limits hold
        yield
        return
    began = time.monotonic()

    def look(*_: object) -> None:
        if time.monotonic() - began < limit_s - 1:
            print(f"mmref: waiting for {what} (up to {limit_s:.0f} s) ...", file=sys.stderr, flush=True)
            signal.setitimer(signal.ITIMER_REAL, max(1.0, limit_s - (time.monotonic() - began)))
        else:
            raise ClusterStartError(f"waited {limit_s:.0f} s in vain for {what}.")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, min(NOTICE_S, limit_s))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _join(address: str) -> None:
    """Connect to the cluster at HOST:PORT. Raises ClusterStartError."""
    import ray

    check_answers(address)
    cluster = f"the cluster of RAY_ADDRESS={address}"
    with _named_failure(f"{cluster} cannot be joined"), in_time(cluster):
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)


@contextlib.contextmanager
def _named_failure(what: str) -> Iterator[None]:
    """What keeps Ray from starting as ClusterStartError: Ray raises errors of every kind, a bare Exception too."""
    import ray

    try:
        yield
    except BaseException as error:
        ray.shutdown()  # what has started of it
        if isinstance(error, MMRefError) or not isinstance(error, Exception):
            raise
        said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ClusterStartError(f"{what}: {type(error).__name__}: {said}") from error


def local_folder() -> str:
    """Folder of a local cluster's sessions, closed to others: below RAY_TMPDIR, else TMPDIR where its sockets' names fit there,
    else /tmp.

    Raises ClusterStartError where Ray could not use it.
    """
    given = os.environ.get("RAY_TMPDIR", "")
    bases = [absolute(expanded(given))] if given else [os.environ.get("TMPDIR", "") or "/tmp", "/tmp"]
    base = next((base for base in bases if _fits(f"{base}/ray")), None)
    if base is None:
        raise ClusterStartError(
            f"RAY_TMPDIR={given} is too long: Ray's sockets below it would have names of more than {SOCKET_BYTES} bytes. Set it "
            "to a shorter one, such as /tmp."
        )
    try:
        os.makedirs(base, exist_ok=True)
        folder = private_folder(base)
        if not _fits(folder):
            folder = f"{base}/ray"
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ClusterStartError(
            f"Ray cannot keep its sessions in {base}: {error}. Set RAY_TMPDIR to a folder of your own, with a short name: "
            "`mkdir -p /tmp/$USER && export RAY_TMPDIR=/tmp/$USER`."
        ) from None
    return folder


def _fits(folder: str) -> bool:
    """Whether a session's longest socket has a name that the system takes."""
    return len(os.fsencode(f"{folder}/session_2026-01-01_00-00-00_000000_{os.getpid()}/{SOCKET}")) <= SOCKET_BYTES


def raise_file_limit() -> int:
    """Let this process open as many files at once as the system allows it, up to FILES; how many these are then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some systems say "unlimited" and mean less
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES if soft == resource.RLIM_INFINITY else soft


def need_files() -> None:
    """Raises ClusterStartError where Ray could not open enough files to start."""
    if (files := raise_file_limit()) < FILES_NEEDED:
        raise ClusterStartError(
            f"this process may have {files} files open, and Ray needs {FILES_NEEDED} or more to start: `ulimit -n 65536`, or "
            "raise the limit of the container or service (`LimitNOFILE`, `--ulimit nofile`)."
        )


def _start_local(cpus: int, storage_gb: float) -> None:
    """Start a cluster on this machine. Ray gives a node 30 s to come up, too short on a busy one: try again.

    Raises ClusterStartError.
    """
    import ray
    from ray._private.utils import get_system_memory

    need_files()
    folder = local_folder()
    shm = Path("/dev/shm")
    store = object_store_bytes(storage_gb, get_system_memory(), shutil.disk_usage(shm).free if shm.exists() else None)
    with (
        _named_failure(f"Ray does not start on this machine (its logs: {folder}/session_latest/logs)"),
        in_time("Ray to start"),
        secluded() as more,
    ):
        for attempt in range(START_ATTEMPTS):
            try:
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    object_store_memory=store,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _temp_dir=folder,
                    **more,
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
