"""Connecting to Ray: the running cluster, or a local one for this process alone."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from mmref.cluster import ray_private
from mmref.cluster.address import check_answers, cluster_address
from mmref.cluster.resources import FILES_NEEDED, offered_cpus, raise_file_limit
from mmref.cluster.seclusion import private_folder, secluded
from mmref.errors import ClusterStartError, ClusterTooSmallError, MMRefError
from mmref.extras import need
from mmref.storage.locations import absolute, expanded
from mmref.terminal.progress import say

SETTINGS = {  # Ray Train hands variables of this prefix on to its controller and workers
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # a report is committed at the next check; the default is 2 s
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # how long to wait for places, as of a node that replaces a lost one
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",  # how soon workers hear that a node is being drained; the default is 5 s
    # Ray starts its workers at niceness 15: beside anything else that computes they would hardly run.
    "RAY_worker_niceness": "0",
    # Workers and readers of a small machine start together: do not warn of it.
    "RAY_worker_maximum_startup_concurrency": "16",
}
START_ATTEMPTS = 3
MEMORY_SHARE = 0.3  # most of a machine's memory that the object store of a local cluster takes
START_LIMIT_S, NOTICE_S = 180.0, 20.0  # until Ray must have started; until what is waited for is said
SOCKET, SOCKET_BYTES = "sockets/plasma_store", 107  # the longest of a session; what a Unix socket's name may have
SHM_NEEDED = 10e9  # bytes: from here on Ray insists on /dev/shm; a smaller object store may lie in /tmp


@contextlib.contextmanager
def connect(need_cpus: float = 1, storage_gb: float = 1.0) -> Iterator[None]:
    """Use the cluster of RAY_ADDRESS or of a submitted job, else start a local one and stop it afterwards.

    A local cluster offers max(8, cores) logical CPUs. It listens on 127.0.0.1 alone, asks for a token, exports no metrics, and
    its session lies in a folder of this user (`seclusion.py`); process groups of workers are torch's own affair.

    Raises:
        ClusterTooSmallError: a local cluster would not have the CPUs that are needed.
        ClusterStartError: Ray does not start here, or the cluster of RAY_ADDRESS cannot be joined.
        ExtraMissingError: Ray is not installed.
    """
    need("train", "a Ray cluster", "ray")
    import ray

    if ray.is_initialized():
        yield
        return
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if address := cluster_address():
        _join(address)
        say(f"mmref: on the Ray cluster at {address}, which RAY_ADDRESS names")
    else:
        if other := ray_private.started_cluster():
            say(f"mmref: on a Ray cluster of its own; to join the one that runs here, at {other}: export RAY_ADDRESS=auto")
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
    began, over = time.monotonic(), False

    def look(*_: object) -> None:
        nonlocal over
        if time.monotonic() - began < limit_s - 1:
            say(f"mmref: waiting for {what} (up to {limit_s:.0f} s) ...")
            signal.setitimer(signal.ITIMER_REAL, max(1.0, limit_s - (time.monotonic() - began)))
        else:
            over = True
            raise KeyboardInterrupt  # Ray swallows an Exception

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, min(NOTICE_S, limit_s))
    try:
        yield
    except KeyboardInterrupt:
        if over:
            raise ClusterStartError(f"waited {limit_s:.0f} s in vain for {what}.") from None
        raise
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

    need_files()
    folder = local_folder()
    shm = Path("/dev/shm")
    store = object_store_bytes(storage_gb, ray_private.system_memory(), shutil.disk_usage(shm).free if shm.exists() else None)
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
                if "timed out during startup" not in str(error):
                    raise
                if attempt == START_ATTEMPTS - 1:
                    raise TimeoutError(
                        f"its own processes were not up in time, {START_ATTEMPTS} times over. That is so where other programs "
                        "want the cores: try again when they have ended, or leave them some."
                    ) from error
                ray.shutdown()


@contextlib.contextmanager
def named_address() -> Iterator[None]:
    """Tell everything below which cluster it is on.

    Ray Train's watchdog looks its controller up through "the" cluster of the machine. Where two are running, say two
    people's runs on one workstation, it may ask the other one, take the controller for dead, and take the workers away.
    """
    import ray

    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ray_private.propagate("RAY_ADDRESS")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("RAY_ADDRESS", None)
        else:
            os.environ["RAY_ADDRESS"] = before
