"""The jobs of a set that is being made, one after the other in this process or side by side as Ray's tasks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from mmref.cluster.answers import answer_of
from mmref.cluster.connection import connect
from mmref.data.decode import calm_opencv

Job = TypeVar("Job")
Result = TypeVar("Result")


def run_jobs(
    work: Callable[[Any, Job], Result],
    shared: Any,
    jobs: Sequence[Job],
    workers: int,
    unit: str,
    progress: bool = True,
    each: int = 1,
) -> list[Result]:
    """`work(shared, job)` of every job, in their order, with a bar that moves as they finish.

    Args:
        shared: what all jobs need; it is sent once.
        workers: tasks at a time, on the cluster that is there or on a local one that is stopped afterwards; 0: this process.
        unit: what a job makes, for the bar.
        progress: show the bar when standard error is a terminal.
        each: jobs of a task.
    """
    with tqdm(total=len(jobs), unit=unit, disable=None if progress else True, file=sys.stderr) as bar:
        if workers > 0:
            return _in_tasks(work, shared, jobs, workers, each, bar.update)
        results = []
        for job in jobs:
            results.append(work(shared, job))
            bar.update()
        return results


def _in_tasks(
    work: Callable[[Any, Job], Result], shared: Any, jobs: Sequence[Job], workers: int, each: int, tick: Callable[[int], Any]
) -> list[Result]:
    import ray

    with connect(storage_gb=0.13):
        task: Any = ray.remote(max_retries=2)(_task)
        sent = ray.put(shared)
        waiting = list(range(0, len(jobs), each))[::-1]
        running: dict[Any, int] = {}
        results: dict[int, list[Result]] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                first = waiting.pop()
                running[task.remote(work, sent, jobs[first : first + each])] = first
            for done in ray.wait(list(running), num_returns=1)[0]:
                results[first := running.pop(done)] = answer_of(done)
                tick(len(results[first]))
        return [result for first in sorted(results) for result in results[first]]


def _task(work: Callable[[Any, Job], Result], shared: Any, jobs: Sequence[Job]) -> list[Result]:
    calm_opencv()
    return [work(shared, job) for job in jobs]
