"""How many trainings a cluster holds at a time, without starving each other or Ray Data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

from mmref.cluster.address import cluster_address
from mmref.cluster.connection import connect, sigterm_unwinds
from mmref.cluster.resources import cores, gpus_for, needed_cpus, torch_threads
from mmref.config import Config
from mmref.errors import ClusterTooSmallError

TRIAL_CPUS = 0.1  # of the process that starts a training and waits for it
SPARE_CPUS = 1  # Ray Data's short read tasks, which no worker or reader has reserved


@contextlib.contextmanager
def connected(config: Config, wanted: int | None, trainings: int) -> Iterator[int]:
    """Connect to the cluster, or start a local one; gives the number of trainings to run at a time.

    Args:
        wanted: trainings at a time that are asked for; None for as many as fit.
        trainings: how many there are.

    Raises ClusterTooSmallError as `concurrency` does.
    """
    import ray

    local = not ray.is_initialized() and cluster_address() is None
    own = cores()
    at_once = min(trainings, wanted or side_by_side(config, own))
    needed = TRIAL_CPUS + needed_cpus(config) + SPARE_CPUS
    with connect(needed, config.train.storage_gb * at_once), sigterm_unwinds():
        # A local cluster offers more logical CPUs than there are cores: trials beyond the cores would only slow each
        # other.
        yield concurrency(ray.cluster_resources(), config, wanted, own if local else None)


def side_by_side(config: Config, cores: int) -> int:
    """Trainings that the cores of one machine hold without slowing each other, at least one."""
    t = config.train
    threads = 1 if t.on_gpu or t.threads == "auto" else t.threads
    return max(1, math.floor(cores / (t.workers * max(t.cpus_per_worker, threads))))


def largest_node() -> float:
    """CPUs of the largest node of the cluster that Ray is connected to."""
    import ray

    return max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)


def sharing(config: Config, at_once: int, node_cpus: float) -> Config:
    """The config of trainings of which so many run at a time: with `train.threads: auto` they share the cores of a node.

    Args:
        node_cpus: CPUs of a node, as Ray counts them. Ray fills a node before it turns to the next, so it holds as many
            workers as it has CPUs for, or all there are.
    """
    t = config.train
    holds = max(1, math.floor(node_cpus * t.workers / needed_cpus(config) + 1e-6))
    threads = torch_threads(t.threads, min(at_once * t.workers, holds))
    return dataclasses.replace(config, train=dataclasses.replace(t, threads=threads))


def concurrency(have: dict[str, float], config: Config, wanted: int | None, cores: int | None) -> int:
    """How many trainings, of a sweep's trials or an ablation's rows, run at a time.

    Args:
        have: resources of the cluster.
        wanted: trainings asked for; None for as many as fit.
        cores: physical cores, where the cluster's CPUs are logical ones.
    Raises:
        ClusterTooSmallError: with the arithmetic, when none or fewer than wanted fit.
    """
    t = config.train
    need = TRIAL_CPUS + needed_cpus(config)
    fit_in = math.floor((have.get("CPU", 0) - SPARE_CPUS + 1e-6) / need)
    text = (
        f"(the cluster's {have.get('CPU', 0):g} CPUs - {SPARE_CPUS} for Ray Data) / ({t.workers} workers x "
        f"({t.cpus_per_worker:g} CPU + {config.data.readers} readers) + {TRIAL_CPUS})"
    )
    if gpus_for(t, have) and have.get("GPU", 0) // t.workers < fit_in:
        fit_in = int(have.get("GPU", 0) // t.workers)
        text = f"the cluster's {have.get('GPU', 0):g} GPUs / {t.workers} workers"
    if fit_in < (wanted or 1):
        raise ClusterTooSmallError(
            f"{wanted or 1} trainings at a time do not fit, only {max(0, fit_in)}: {text}. Lower `--max-concurrent` or "
            "`--train.workers`, or add nodes."
        )
    if wanted:
        return wanted
    return fit_in if cores is None else min(fit_in, side_by_side(config, cores))
