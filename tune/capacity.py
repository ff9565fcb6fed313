"""How many trainings a cluster holds at a time, without starving each other or Ray Data."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator

from mmref.cluster import connect, needed_cpus
from mmref.config import Config
from mmref.errors import ClusterTooSmallError

TRIAL_CPUS = 0.1  # of the process that starts a training and waits for it
SPARE_CPUS = 1  # Ray Data's short read tasks, which no worker or reader has reserved


@contextlib.contextmanager
def connected(config: Config, wanted: int | None) -> Iterator[int]:
    """Connect to the cluster, or start a local one; gives the number of trainings to run at a time.

    Raises ClusterTooSmallError as `concurrency` does.
    """
    import ray

    local = not os.environ.get("RAY_ADDRESS") and not ray.is_initialized()
    cores = os.cpu_count() or 1
    storage_gb = config.train.storage_gb * max(1, cores // config.train.workers)
    with connect(TRIAL_CPUS + needed_cpus(config) + SPARE_CPUS, storage_gb):
        # a local cluster offers more logical CPUs than there are cores: trials beyond the cores would only slow each other
        yield concurrency(ray.cluster_resources(), config, wanted, cores if local else None)


def concurrency(have: dict[str, float], config: Config, wanted: int | None, cores: int | None) -> int:
    """How many trials run at a time.

    Args:
        have: resources of the cluster.
        wanted: trials asked for; None for as many as fit.
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
    if t.gpu and have.get("GPU", 0) // t.workers < fit_in:
        fit_in = int(have.get("GPU", 0) // t.workers)
        text = f"the cluster's {have.get('GPU', 0):g} GPUs / {t.workers} workers"
    if fit_in < (wanted or 1):
        raise ClusterTooSmallError(
            f"{wanted or 1} trials at a time do not fit, only {max(0, fit_in)}: {text}. Lower `--max-concurrent` or "
            "`--workers-per-trial`, or add nodes."
        )
    if wanted:
        return wanted
    if cores is None:
        return fit_in
    busy = t.workers * max(t.cpus_per_worker, 1 if t.gpu else t.threads)
    return max(1, min(fit_in, math.floor(cores / busy)))
