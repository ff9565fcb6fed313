"""A number of workers that follows the nodes: which numbers a run may have, and how each cuts the global batch.

Checkpoints hold parameters, moments and reference rows by name in full precision, and the samples of a step do not
depend on who reads them. So a run goes on with fewer or more workers as it is: nothing has to be converted.
"""

from __future__ import annotations

from mmref.config import Config


def worker_counts(config: Config) -> list[int]:
    """Numbers of workers a run may have, ascending: those from `min_workers` to `workers` that divide the global batch."""
    t = config.train
    fewest = t.min_workers or t.workers
    return [n for n in range(fewest, t.workers + 1) if t.global_batch % n == 0]


def accumulation_for(config: Config, workers: int) -> int:
    """Micro-batches of a step on each of `workers`: the fewest with which none is larger than on all `train.workers`.

    Fewer workers would otherwise need more memory each, and GPUs that were just full would not hold it.
    """
    share = config.train.global_batch // workers
    return next(a for a in range(1, share + 1) if share % a == 0 and share // a <= config.micro_batch)


def largest_count(config: Config, places: int, cpus: float) -> int:
    """The largest allowed number of workers with a place for each and CPUs for them and their readers; 0 where none fits.

    `places`: workers that the nodes have room for; `cpus`: all CPUs of these nodes.
    """
    each = config.train.cpus_per_worker + config.data.readers
    fitting = [n for n in worker_counts(config) if n <= places and n * each <= cpus + 1e-6]
    return max(fitting, default=0)
