"""Where an engine runs: in this process, or as replicas of a Ray Serve deployment."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import logging
import os
import re
import time
from collections import deque
from dataclasses import replace
from typing import Any, Protocol

from mmref.cluster import ray_private
from mmref.cluster.connection import in_time
from mmref.cluster.resources import torch_threads
from mmref.data.decode import calm_opencv
from mmref.retrieval.service.answering import Ask, Engine, Prepared, Reply
from mmref.retrieval.service.leaving import ANSWER_S
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.pools import Pool
from mmref.retrieval.service.problems import Problem, Refused, refuse

log = logging.getLogger(__name__)

BATCH = 32  # queries encoded and ranked together
GATHER_SHARE = 0.3  # of a batch's time, after it, that the next one waits at most for who may come back
GATHER_AGAIN = 16  # batches that begin at once where that was in vain
# So many requests of each kind one engine works on at once: what is slow keeps none of another kind waiting.
THREADS = {"search": 1, "prepare": 2, "decode": 4, "explain": 2, "items": 2, "thumbnails": 2, "images": 4, "health": 1}
POOLS = {  # of the methods of an engine
    "explain": "explain", "info": "items", "item": "items", "thumbnail": "thumbnails", "image": "images", "health": "health",
}  # fmt: skip
STUCK = Problem(503, "Stuck", "a search does not come to an end.", "Look into the log of `mmref serve`, and start it again.")
ONGOING = 1024  # requests a replica holds: more than the service lets in, or a probe would wait behind them
ONGOING_WANTED = 8  # more than so many for each replica: one more is started
LOOK_S = 1.0  # between looks at whether a replica lives; by itself Ray Serve takes 10 s, and starts another only then
DEPLOY_LIMIT_S = 900.0  # until a replica runs, on a cluster that starts a node for it too
RETRY_S = 0.2  # between looks for a replica, where there is none
PATIENCE_S = 45.0  # for one to be there
ALONE_S = 2.0  # that a request which is asked again keeps others that are waiting: one that kills mostly does so by then


class Backend(Protocol):
    """Answers one index's requests. All raise Refused."""

    async def search(self, ask: Ask) -> dict[str, Any]:
        """Results of a query."""

    async def call(self, method: str, *args: Any) -> Any:
        """What another method of the engine returns."""


class Worker:
    """An engine on the threads of this process. Searches that arrive while a batch is answered form the next one.

    Ray Serve's own batching closes a batch before it waits for its turn: under load each search would be alone in its own.

    Who has been answered may ask again at once. A batch that began without them would leave two halves that take turns, and a
    half takes much more than half of the time. So a batch waits for a moment, as long as that brings what it waits for.

    Args:
        processes: of this kind, which share the cores of the node.
    """

    def __init__(self, engine: Engine, processes: int = 1) -> None:
        self.engine = engine
        # Libraries keep the number of threads for each calling thread.
        prepare = functools.partial(_use_threads, torch_threads("auto", processes))
        self._pools = {name: Pool(count, f"mmref {name}", prepare) for name, count in THREADS.items()}
        self._waiting: deque[tuple[Prepared, asyncio.Future[Reply]]] = deque()
        self._batches: asyncio.Task[None] | None = None
        self._searching_since: float | None = None  # a batch
        self._expected = 0  # searches: those that the last batch answered and those that waited by then
        self._gather_until = 0.0
        self._at_once = 0  # batches that are to begin so
        self._gathered = asyncio.Event()

    async def search(self, ask: Ask) -> Reply:
        """Prepared alone, answered with whatever else has arrived."""
        prepared, problem = await self._reply("decode" if ask.image else "prepare", self.engine.prepare, ask)
        if problem:
            return None, problem
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Reply] = loop.create_future()
        self._waiting.append((prepared, reply))
        if len(self._waiting) >= self._expected:
            self._gathered.set()
        if self._batches is None:
            self._batches = loop.create_task(self._answer())
        try:
            return await reply
        except asyncio.CancelledError:  # nobody waits any more: its image is let go at once
            self._waiting = deque(pair for pair in self._waiting if pair[1] is not reply)
            raise

    async def _answer(self) -> None:
        try:
            while self._waiting:
                await self._gather()
                batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
                batch = [(prepared, reply) for prepared, reply in batch if not reply.done()]  # whose clients have left
                if batch:
                    await self._answer_batch(*zip(*batch))
        finally:
            self._batches = None

    async def _gather(self) -> None:
        """Wait for who may come back after the last batch, if that was worth it when it was tried last."""
        missing, patience_s = self._expected - len(self._waiting), self._gather_until - time.monotonic()
        if missing <= 0 or patience_s <= 0:
            return
        if self._at_once:
            self._at_once -= 1
            return
        self._gathered.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gathered.wait(), patience_s)
        if 2 * (self._expected - len(self._waiting)) > missing:
            self._at_once = GATHER_AGAIN

    async def _answer_batch(self, batch: tuple[Prepared, ...], replies: tuple[asyncio.Future[Reply], ...]) -> None:
        began = self._searching_since = time.monotonic()
        try:
            found = await self._pools["search"].run(self.engine.search, batch)
        except Exception as error:
            for reply in replies:
                if not reply.done():
                    reply.set_exception(error)
            return
        finally:
            ended, self._searching_since = time.monotonic(), None
            self._expected = min(BATCH, len(batch) + len(self._waiting))
            self._gather_until = ended + GATHER_SHARE * (ended - began)
        for reply, answer in zip(replies, found):
            if not reply.done():
                reply.set_result(answer)

    async def call(self, method: str, *args: Any) -> Reply:
        """Another method of the engine, on threads of its own kind."""
        began = self._searching_since
        if method == "health" and began is not None and time.monotonic() - began > self.engine.limits.timeout_s:
            return None, STUCK
        return await self._reply(POOLS[method], getattr(self.engine, method), *args)

    async def _reply(self, pool: str, work: Any, *args: Any) -> Reply:
        """Refusals travel as values: Ray would turn exceptions into tracebacks."""
        try:
            return await self._pools[pool].run(work, *args), None
        except Refused as refused:
            return None, refused.problem


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

    def __init__(self, index: str, limits: Limits, replicas: int, store: str | None) -> None:
        calm_opencv()
        super().__init__(Engine(index, limits, store=store), replicas)


class Replicated:
    """Replicas behind a handle. What has not reached a replica waits for the next one. A request whose replica dies is asked once
    more (every method only reads), one of them at a time: if it dies again, nothing but the request has killed two.

    One that takes long, as an image of a slow host, lets the others begin beside it. Where a replica dies then, nobody knows of
    which: each is asked a third time, and nothing else that has to be asked again begins until it is answered.
    """

    def __init__(self, handle: Any, name: str) -> None:
        self.handle, self.name = handle, name
        self._turn = asyncio.Lock()
        self._suspects: dict[asyncio.Future[Reply], bool] = {}  # asked again; whether beside another

    def close(self) -> None:
        """Stop the replicas. The handle goes first: what it runs in the background would look for them, and for Ray."""
        from ray import serve

        try:
            self.handle.shutdown()
            serve.delete(self.name)
        except Exception as error:  # of many kinds where the cluster is going or gone; there is nothing else to be done
            log.debug("%s was not seen to stop: %r", self.name, error)

    async def search(self, ask: Ask) -> dict[str, Any]:
        """Results of a query."""
        return await self._ask("search", ask)

    async def call(self, method: str, *args: Any) -> Any:
        """What another method of the engine returns."""
        return await self._ask("call", method, *args)

    async def _ask(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RayActorError

        # Until a replica has accepted a request, Ray Serve sends it on to another by itself. This one had begun.
        with contextlib.suppress(RayActorError):
            return _answered(await self._reach(method, *args))
        for alone_s in (ALONE_S, None):
            asked: asyncio.Future[Reply] | None = None
            try:
                async with self._turn:
                    asked = asyncio.ensure_future(self._reach(method, *args))
                    self._suspects = dict.fromkeys(self._suspects, True) | {asked: bool(self._suspects)}
                    await asyncio.wait((asked,), timeout=alone_s)
                return _answered(await asked)
            except RayActorError:
                if asked and not self._suspects[asked]:
                    break
            finally:
                if asked:
                    asked.cancel()  # whose client has left
                    self._suspects.pop(asked)
        log.error("%s: replicas have died of one request, each time that it was asked: %s", self.name, _brief(args))
        message = "the request ended the process that worked on it, each time."
        raise refuse(503, "Crashed", message, "Do not ask it again; the log of `mmref serve` names it.")

    async def _reach(self, method: str, *args: Any) -> Reply:
        """What the first replica that accepts a request replies. Raises Refused, and RayActorError where it dies."""
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError

        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return await getattr(self.handle, method).remote(*args)
            except BackPressureError:
                raise refuse(429, "Busy", "too many searches are waiting.", "Ask again in a moment.", 1) from None
            except (DeploymentUnavailableError, ReplicaUnavailableError):
                if time.monotonic() > until:
                    fix = "Ask again later; the log of `mmref serve` says why none starts."
                    raise refuse(503, "Unavailable", "no replica of the index is running.", fix, 30) from None
                await asyncio.sleep(RETRY_S)


def _brief(args: tuple[Any, ...]) -> str:
    """A request for the log: a picture by its digest."""
    return ", ".join(
        repr(replace(a, image=hashlib.sha256(a.image).hexdigest().encode()) if isinstance(a, Ask) and a.image else a)
        for a in args
    )[:2000]


def deploy(index: str, name: str, limits: Limits, replicas: int, kept: int = 1, store: str | None = None) -> Replicated:
    """Start replicas of an index on the Ray cluster this process is connected to, `kept` and up to `replicas` by load; no
    HTTP port of Ray Serve is opened.

    Args:
        name: of the index. The Serve application is called by this job of the cluster too: no other service has that name.
        store: URL of what finds the candidates of the index.
    """
    import ray
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    deployment: Any = serve.deployment(
        Replica,
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=ONGOING,
        max_queued_requests=limits.in_flight,
        autoscaling_config={"min_replicas": kept, "max_replicas": replicas, "target_ongoing_requests": ONGOING_WANTED},
        health_check_period_s=LOOK_S,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=ANSWER_S,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )
    application: Any = deployment.bind(os.path.abspath(os.path.expanduser(index)), limits, replicas, store)
    called = f"mmref-{ray.get_runtime_context().get_job_id()}-{name}"
    try:
        with in_time(f"{'a replica' if kept == 1 else f'{kept} replicas'} of {index} (a CPU each)", DEPLOY_LIMIT_S):
            return Replicated(serve.run(application, name=called, route_prefix=None), called)
    except BaseException:  # an interrupt too: nothing is left running on a cluster
        serve.delete(called)
        raise


def remove_left_behind() -> None:
    """Delete the applications of services that are gone without having stopped them, as after a kill: a cluster that stays
    would keep their replicas for ever."""
    from ray import serve

    alive = ray_private.living_jobs()
    for called in serve.status().applications:
        found = re.fullmatch(r"mmref-([0-9a-f]{8})-.*", called, re.DOTALL)
        if found and found[1] not in alive:
            log.warning("%s belongs to a service that has ended: it is deleted", called)
            serve.delete(called)
