"""Ray actors that embed chunks, one at a time each, so that a death tells which chunk it came of.

A chunk whose actor died is tried once more. At its second death its images are decoded one by one on an actor of their own:
those that end it twice are left out, and the chunk is embedded without them.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mmref.cluster.answers import answer_of
from mmref.errors import WorkerDiedError
from mmref.retrieval.journal import DEATHS, Watch

log = logging.getLogger(__name__)

STARTS = 3  # of an actor that dies before it is given anything


@dataclass
class Job:
    """A chunk to embed."""

    number: int
    locations: list[tuple[str, int, int]]
    passed_over: list[int]  # positions of images that are not decoded
    deaths: int = 0  # of actors that had it


class Workers:
    """Actors of one kind on the cluster this process is connected to.

    Args:
        embedder: makes an `ImageEmbedder`, in the actor.
        gpu: each has one.
        count: of actors.
    """

    def __init__(self, embedder: Callable[[], Any], gpu: bool, count: int) -> None:
        import ray

        class Actor:
            """Calls of one come one after the other."""

            embedder: Any

            def ready(self) -> None:
                """Answers once the model is loaded. An error in `__init__` would be a death, whose cause Ray does not give."""
                self.embedder = embedder()

            def embed(self, *args: Any) -> bytes:
                return self.embedder.embed(*args)

            def look_at(self, location: tuple[str, int, int]) -> None:
                self.embedder.look_at(location)

        self._actor: Any = ray.remote(num_cpus=1, num_gpus=1 if gpu else 0, max_restarts=0, max_task_retries=0)(Actor)
        self.count = count

    def answers(self, jobs: list[Job]) -> Iterator[tuple[int, bytes]]:
        """(number, arrays) of each chunk, as they are done. Raises WorkerDiedError, and what an embedder raises."""
        import ray

        waiting, suspects, failed_starts = deque(jobs), list[Job](), 0
        # By what an actor will answer: the actor and its chunk, or None while it starts.
        working: dict[Any, tuple[Any, Job | None]] = {}
        for _ in range(self.count):
            actor = self._actor.remote()
            working[actor.ready.remote()] = actor, None
        while working:
            (done, *_), _ = ray.wait(list(working), num_returns=1)
            actor, job = working.pop(done)
            try:
                answer = answer_of(done)
            except _deaths() as error:
                if job is None:
                    failed_starts += 1
                    if failed_starts >= STARTS * self.count:
                        raise _no_start(error) from None
                else:
                    job.deaths += 1
                    (suspects if job.deaths >= DEATHS else waiting).append(job)
                if waiting:
                    actor = self._actor.remote()
                    working[actor.ready.remote()] = actor, None
                continue
            if job is not None:
                yield job.number, answer
            if waiting:
                job = waiting.popleft()
                working[actor.embed.remote(job.locations, Watch(job.passed_over))] = actor, job
        for job in suspects:
            log.warning("workers died twice of the images from %s on: looking at each alone", job.locations[0][0])
            yield job.number, self._alone(job)

    def _alone(self, job: Job) -> bytes:
        """Arrays of a chunk after its images have been decoded one by one, without those that end the actor."""
        import ray

        actor = None
        for position, location in enumerate(job.locations):
            if position in job.passed_over:
                continue
            for death in range(DEATHS):
                actor = actor or self._started()
                try:
                    ray.get(actor.look_at.remote(location))
                    break
                except _deaths():
                    actor = None
                    if death == DEATHS - 1:
                        job.passed_over.append(position)
        actor = actor or self._started()
        try:
            return answer_of(actor.embed.remote(job.locations, Watch(job.passed_over)))
        except _deaths() as error:
            raise WorkerDiedError(
                f"a worker dies of a chunk of images though it decodes each of them, beginning with {job.locations[0][0]} "
                f"({_first_line(error)}): is there too little memory? Lower --workers, or use --workers 0."
            ) from None

    def _started(self) -> Any:

        for attempt in range(STARTS):
            actor = self._actor.remote()
            try:
                answer_of(actor.ready.remote())
                return actor
            except _deaths() as error:
                if attempt == STARTS - 1:
                    raise _no_start(error) from None
        raise AssertionError("unreachable")


def _deaths() -> tuple[type[Exception], ...]:
    from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, WorkerCrashedError

    return RayActorError, WorkerCrashedError, NodeDiedError, OutOfMemoryError


def _no_start(error: Exception) -> WorkerDiedError:
    return WorkerDiedError(
        f"workers die before they have loaded the model ({_first_line(error)}): is there too little memory? "
        "Lower --workers, or use --workers 0."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
