"""Where an engine runs: in this process, or as replicas of a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import logging
import os
import time
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


class Local:
    """An engine of this process."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="mmref")

    async def search(self, ask: Ask) -> dict[str, Any]:
        """Results of a query."""
        answer, problem = await self._run(lambda: self.engine.search([self.engine.prepare(ask)])[0])
        if problem:
            raise Refused(problem)
        return answer

    async def call(self, method: str, *args: Any) -> Any:
        """What another method of the engine returns."""
        return await self._run(lambda: getattr(self.engine, method)(*args))

    async def _run(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


class Replica:
    """What Ray Serve runs. Refusals travel as values: Ray would turn exceptions into tracebacks."""

    def __init__(self, index: str, limits: Limits, replicas: int) -> None:
        threads = max(1, (os.cpu_count() or 1) // replicas)
        self.engine = Engine(index, limits, threads)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="mmref")

    async def search(self, ask: Ask) -> Reply:
        """Prepared alone, answered with whatever else has arrived."""
        prepared, problem = await self.call("prepare", ask)
        return (None, problem) if problem else await self.search_batch(prepared)

    async def search_batch(self, batch: Any) -> Any:
        """Wrapped by `serve.batch`: called with one prepared query, it runs with a list of them."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.engine.search, batch)

    async def call(self, method: str, *args: Any) -> Reply:
        """Another method of the engine."""
        work = getattr(self.engine, method)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args), None
        except Refused as refused:
            return None, refused.problem


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
                answer, problem = await getattr(self.handle, method).remote(*args)
                break
            except BackPressureError:
                raise refuse(429, "Busy", "too many searches are waiting.", "Ask again in a moment.", 1) from None
            except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError):
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(RETRY_S)
        if problem:
            raise Refused(problem)
        return answer


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
        _batched(Replica),
        name="Replica",
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


def _batched(replica: type[Replica]) -> type[Replica]:
    """The replica with its batches made by Ray Serve, which is loaded only here."""
    from ray import serve

    class BatchedReplica(replica):  # type: ignore[valid-type,misc]
        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=0.0)
        async def search_batch(self, batch: list[Prepared]) -> list[Reply]:
            return await super().search_batch(batch)

    return BatchedReplica
