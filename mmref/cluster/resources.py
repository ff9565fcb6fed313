"""What a cluster or this machine has, and whether it is enough: cores, workers, open files, GPUs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import platform
import resource
import sys
from pathlib import Path
from typing import Literal

from mmref.cluster.address import cluster_address
from mmref.config import AUTO, Config, TrainConfig
from mmref.errors import ClusterTooSmallError, UsageError
from mmref.extras import missing, need

LOCAL_CPUS = 8  # logical: on a small machine, workers and readers share its cores
FILES, FILES_NEEDED = 65_536, 128  # open at once: as Ray's makers advise; with half of that it waits without a word


def cores() -> int:
    """CPU cores this process may use: those of its container, where a quota limits it, or those it is bound to."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # Linux alone has it
    return max(1, min(bound, int(container_cpus())))


def container_cpus(groups: Path = Path("/sys/fs/cgroup")) -> float:
    """CPUs that this process's container may use by its quota; infinitely many, as far as it goes, without one.

    Args:
        groups: where the system tells it, in the form of control groups of version 2 or 1.
    """
    try:
        if (file := groups / "cpu.max").exists():
            quota, period = file.read_text("utf-8").split()
        else:
            quota, period = ((groups / "cpu" / f"cpu.cfs_{what}_us").read_text("utf-8") for what in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else sys.maxsize
    except (OSError, ValueError):  # no control groups here, or "max"
        return sys.maxsize


def torch_threads(asked: Literal["auto"] | int, processes: int) -> int:
    """Torch threads of each of the processes that share this node's cores: `asked`, or an equal part of the cores."""
    return max(1, cores() // processes) if asked == "auto" else asked


def use_threads() -> None:
    """Have Torch compute with no more threads in this process than it may use cores; a smaller number stays as it is."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), cores()))


def workers_that_fit(asked: int | None) -> int:
    """Actors or tasks of a CPU each: `asked`, None for one a core, but no more than a local cluster offers; that is said.

    0 are none: the work is done in this process, as it is for None where Ray is not installed. Called before `connect`. A
    cluster that RAY_ADDRESS names may grow. Raises ClusterStartError as `cluster_address`, ExtraMissingError, UsageError.
    """
    if asked is not None and asked < 0:
        raise UsageError(f"workers is {asked}: give a number of Ray actors, or 0 for this process.")
    if asked == 0 or (asked is None and missing("train", "ray")):
        return 0
    need("train", f"work by {asked} Ray actors", "ray", otherwise="Or do it in this process: `--workers 0`.")
    import ray

    wanted = cores() if asked is None else asked
    if ray.is_initialized() or cluster_address() or wanted <= offered_cpus():
        return wanted
    print(f"mmref: {offered_cpus()} workers instead of {wanted}: this machine offers no more CPUs", file=sys.stderr)
    return offered_cpus()


def offered_cpus() -> int:
    """Logical CPUs of a local cluster."""
    return max(LOCAL_CPUS, cores())


def raise_file_limit() -> int:
    """Let this process open as many files at once as the system allows it, up to FILES; how many these are then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # some systems say "unlimited" and mean less
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return FILES if soft == resource.RLIM_INFINITY else soft


def machine(config: Config) -> str:
    """What a run trains on, called on a node of the cluster it is connected to: "AMD EPYC, workers: 2 of 1 thread", "H200,
    workers: 2". The times of steps compare where it is the same."""
    if config.train.on_gpu:
        import ray

        kind = "accelerator_type:"
        kinds = sorted(name.removeprefix(kind) for name in ray.cluster_resources() if name.startswith(kind))
        return f"{' or '.join(kinds) or 'GPU'}, workers: {config.train.workers}"
    try:
        lines = [line for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines() if line.startswith("model name")]
    except OSError:  # not Linux
        lines = []
    processor = lines[0].partition(":")[2].strip() if lines else platform.machine()
    threads = torch_threads(config.train.threads, config.train.workers)
    return f"{processor}, workers: {config.train.workers} of {threads} thread{'' if threads == 1 else 's'}"


def has_gpu() -> bool:
    """Whether the cluster that Ray is connected to has a GPU: Ray Data would wait for one without a word."""
    import ray

    return ray.cluster_resources().get("GPU", 0) >= 1


def gpus_for(train: TrainConfig, have: dict[str, float]) -> bool:
    """Whether a training takes GPUs of a cluster with such resources; with `train.gpu: auto`, where each worker gets one."""
    return have.get("GPU", 0) >= (train.min_workers or train.workers) if train.gpu == AUTO else train.gpu


def with_gpus(config: Config) -> Config:
    """A copy of a config with `train.gpu: auto` settled by the cluster that Ray is connected to."""
    import ray

    if config.train.gpu != AUTO:
        return config
    gpu = gpus_for(config.train, ray.cluster_resources())
    return dataclasses.replace(config, train=dataclasses.replace(config.train, gpu=gpu))


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
    if t.on_gpu and have.get("GPU", 0) < workers:
        raise ClusterTooSmallError(
            f"{workers} workers need a GPU each, the cluster has {have.get('GPU', 0):g}. Lower `--train.workers`, or "
            "train on CPUs with `--train.gpu false`."
        )
