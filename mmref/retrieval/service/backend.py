"""Where an engine runs: in this process, or as replicas of a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from mmref.retrieval.service.engine import Ask, Engine, Prepared, Reply
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.problems import Refused, refuse

BATCH = 32  # queries encoded and ranked together
THREADS = 8  # requests of one engine that are worked on at once
ONGOING = 64  # requests a replica holds, batches among them
ONGOING_WANTED = 8  # more than so many for each replica: one more is started
RETRY_S = 0.2  # before a request that lost its replica goes to another
PATIENCE_S = 45.0  # for another one to be there


class Backend(Protocol):
    """Answers one index's requests. All raise Refused."""

    async def search(self, ask: Ask) -> dict[str, Any]:
        """Results of a query."""

    async def call(self, method: str, *args: Any) -> Any:
        """What another method of the engine returns."""


class Worker:
    """An engine on the threads of this process. Searches that arrive while a batch is answered form the next one.

    Ray Serve's own batching closes a batch before it waits for its turn: under load each search would be alone in its own.

    Args:
        threads: that one search may use; None: as the libraries choose.
    """

    def __init__(self, engine: Engine, threads: int | None = None) -> None:
        self.engine = engine
        # libraries keep the number for each calling thread
        prepare = (lambda: None) if threads is None else functools.partial(_use_threads, threads)
        self._threads = ThreadPoolExecutor(THREADS, "mmref", prepare)
        self._waiting: deque[tuple[Prepared, asyncio.Future[Reply]]] = deque()
        self._batches: asyncio.Task[None] | None = None

    async def search(self, ask: Ask) -> Reply:
        """Prepared alone, answered with whatever else has arrived."""
        prepared, problem = await self.call("prepare", ask)
        if problem:
            return None, problem
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Reply] = loop.create_future()
        self._waiting.append((prepared, reply))
        if self._batches is None:
            self._batches = loop.create_task(self._answer())
        return await reply

    async def _answer(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                batch = [(prepared, reply) for prepared, reply in batch if not reply.done()]  # whose clients have left
                if batch:
                    await self._answer_batch(*zip(*batch))
        finally:
            self._batches = None

    async def _answer_batch(self, batch: tuple[Prepared, ...], replies: tuple[asyncio.Future[Reply], ...]) -> None:
        try:
            found = await self._run(self.engine.search, batch)
        except Exception as error:
            for reply in replies:
                if not reply.done():
                    reply.set_exception(error)
            return
        for reply, answer in zip(replies, found):
            if not reply.done():
                reply.set_result(answer)

    async def call(self, method: str, *args: Any) -> Reply:
        """Another method of the engine. Refusals travel as values: Ray would turn exceptions into tracebacks."""
        try:
            return await self._run(getattr(self.engine, method), *args), None
        except Refused as refused:
            return None, refused.problem

    async def _run(self, work: Any, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)


def _use_threads(threads: int) -> None:
    import faiss
    import torch

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


class Local:
    """An engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self._worker = engine, Worker(engine)

    async def search(self, ask: Ask) -> dict[str, Any]:
        """Results of a query."""
        return _answered(await self._worker.search(ask))

    async def call(self, method: str, *args: Any) -> Any:
        """What another method of the engine returns."""
        return _answered(await self._worker.call(method, *args))


def _answered(reply: Reply) -> Any:
    answer, problem = reply
    if problem:
        raise Refused(problem)
    return answer


class Replica(Worker):
    """What Ray Serve runs."""

    def __init__(self, index: str, limits: Limits, replicas: int) -> None:
        super().__init__(Engine(index, limits), max(1, (os.cpu_count() or 1) // replicas))


class Replicated:
    """Replicas behind a handle. A request that loses its replica goes to another: every method only reads."""

    def __init__(self, handle: Any, name: str) -> None:
        self.handle, self.name = handle, name

    def close(self) -> None:
        """Stop the replicas. The handle goes first: what it runs in the background would look for them, and for Ray."""
        from ray import serve

        self.handle.shutdown()
        serve.delete(self.name)

    async def search(self, ask: Ask) -> dict[str, Any]:
        """Results of a query."""
        return await self._ask("search", ask)

    async def call(self, method: str, *args: Any) -> Any:
        """What another method of the engine returns."""
        return await self._ask("call", method, *args)

    async def _ask(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return _answered(await getattr(self.handle, method).remote(*args))
            except BackPressureError:
                raise refuse(429, "Busy", "too many searches are waiting.", "Ask again in a moment.", 1) from None
            except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError):
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(RETRY_S)


def deploy(index: str, name: str, limits: Limits, replicas: int) -> Replicated:
    """Start replicas of an index on the Ray cluster this process is connected to, one and up to `replicas` by load; no
    HTTP port of Ray Serve is opened.

    Args:
        name: of the Serve application; one that runs already is replaced, request by request.
    """
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    deployment: Any = serve.deployment(
        Replica,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=ONGOING,
        max_queued_requests=limits.in_flight,
        autoscaling_config={"min_replicas": 1, "max_replicas": replicas, "target_ongoing_requests": ONGOING_WANTED},
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    application: Any = deployment.bind(os.path.abspath(os.path.expanduser(index)), limits, replicas)
    try:
        return Replicated(serve.run(application, name=name, route_prefix=None), name)
    except BaseException:  # an interrupt too: nothing is left running on a cluster
        serve.delete(name)
        raise
