"""Replicas that die: who is asked again, and what becomes of a request that kills."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.serve.exceptions import DeploymentUnavailableError

from mmref.retrieval.service import backend
from mmref.retrieval.service.answering import Ask
from mmref.retrieval.service.backend import Replicated, Worker
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.problems import Problem, Refused


class Handle:
    """A deployment of one replica at a time. A poisonous request takes it down with whatever it holds, innocent or not."""

    def __init__(self) -> None:
        self.deaths, self.asked = 0, Counter[str]()
        self._held: list[asyncio.Future[Any]] = []
        self.search = self.call = self

    async def remote(self, *args: Any) -> Any:
        text = args[0].text if isinstance(args[0], Ask) else args[0]
        self.asked[text] += 1
        reply = asyncio.get_running_loop().create_future()
        self._held.append(reply)
        await asyncio.sleep(0.01)  # what comes meanwhile is held by the same replica
        if text == "poison":
            self.deaths += 1
            for one in self._held:
                if not one.done():
                    one.set_exception(ActorDiedError())
            self._held = []
        elif not reply.done():
            reply.set_result(({"text": text}, None))
        return await reply


async def outcome(work: Any) -> Any:
    try:
        return await work
    except Refused as refused:
        return refused.problem


def test_a_request_that_kills_is_asked_twice_and_takes_nobody_with_it(caplog: pytest.LogCaptureFixture) -> None:
    handle = Handle()
    replicated = Replicated(handle, "mmref-test")
    texts = ["a", "b", "poison", "c", "d"]

    async def ask() -> list[Any]:
        return await asyncio.gather(*(outcome(replicated.search(Ask(text, image=b"bytes"))) for text in texts))

    answers = asyncio.run(ask())
    assert handle.deaths == 2 and handle.asked["poison"] == 2
    assert [a["text"] for a in answers if isinstance(a, dict)] == ["a", "b", "c", "d"]
    (problem,) = [a for a in answers if isinstance(a, Problem)]
    assert (problem.status, problem.error, problem.retry_after_s) == (503, "Crashed", None)
    assert "poison" in caplog.text and "bytes'" not in caplog.text, "the log names it, without its picture"


def test_replicas_are_kept_and_looked_at_often(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    context = SimpleNamespace(get_job_id=lambda: "01")
    monkeypatch.setattr("ray.get_runtime_context", lambda: context)
    monkeypatch.setattr(serve, "start", lambda **_: None)
    monkeypatch.setattr(serve, "run", lambda application, **_: application)
    monkeypatch.setattr(serve, "deployment", lambda _, **of: asked.update(of) or SimpleNamespace(bind=lambda *a: a))
    backend.deploy("/index", "0", Limits(), 4, kept=2)
    assert (asked["autoscaling_config"]["min_replicas"], asked["autoscaling_config"]["max_replicas"]) == (2, 4)
    assert asked["health_check_period_s"] < 5, "until a dead one is noticed: half of what Ray Serve takes by itself"


class Mortal:
    """A replica that dies when it is told to, with all that it holds."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.held: dict[str, asyncio.Future[Any]] = {}
        self.call = self

    async def remote(self, name: str) -> Any:
        self.asked.append(name)
        self.held[name] = asyncio.get_running_loop().create_future()
        return await self.held[name]

    async def holds(self, *names: str) -> None:
        """Wait until it does."""
        async with asyncio.timeout(30):
            while set(names) - set(self.held):
                await asyncio.sleep(0)

    def die(self) -> None:
        held, self.held = self.held, {}
        for reply in held.values():
            reply.set_exception(ActorDiedError())

    def answer(self, name: str) -> None:
        self.held.pop(name).set_result((name, None))


def test_what_takes_long_keeps_nothing_else_that_is_asked_again_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "ALONE_S", 0.01)

    async def ask() -> None:
        replica = Mortal()
        replicated = Replicated(replica, "x")
        slow, quick = (asyncio.ensure_future(replicated.call(name)) for name in ("slow", "quick"))
        await replica.holds("slow", "quick")
        replica.die()
        await replica.holds("slow", "quick")
        replica.answer("quick")
        assert await quick == "quick" and not slow.done()
        replica.answer("slow")
        assert await slow == "slow"

    asyncio.run(ask())


def test_one_that_kills_late_takes_nobody_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "ALONE_S", 0.01)

    async def ask() -> None:
        replica = Mortal()
        replicated = Replicated(replica, "x")
        poison, innocent = (asyncio.ensure_future(outcome(replicated.call(name))) for name in ("poison", "innocent"))
        for _ in range(2):  # of what they are asked for at first, and once more
            await replica.holds("poison", "innocent")
            replica.die()
        await replica.holds("poison")
        await asyncio.sleep(0.1)
        assert set(replica.held) == {"poison"}, "now it is alone, however long it takes"
        replica.die()
        await replica.holds("innocent")
        replica.answer("innocent")
        assert await innocent == "innocent" and (await poison).error == "Crashed"
        assert Counter(replica.asked) == {"poison": 3, "innocent": 3}

    asyncio.run(ask())


def test_who_leaves_while_it_is_asked_again_makes_room() -> None:
    async def ask() -> None:
        replica = Mortal()
        replicated = Replicated(replica, "x")
        leaving, waiting = (asyncio.ensure_future(replicated.call(name)) for name in ("leaving", "waiting"))
        await replica.holds("leaving", "waiting")
        replica.die()
        await replica.holds("leaving")
        left = replica.held["leaving"]
        leaving.cancel()
        await replica.holds("waiting")
        assert left.cancelled(), "nobody works for it"
        replica.answer("waiting")
        assert await waiting == "waiting"

    asyncio.run(ask())


def test_a_replica_out_of_reach_counts_as_one_that_died() -> None:
    class Unreachable:
        async def remote(self, *_: Any) -> Any:
            asked.append(1)
            raise ActorUnavailableError("away", None)

    asked: list[int] = []
    handle = Unreachable()
    handle.call = handle  # type: ignore[attr-defined]
    problem = asyncio.run(outcome(Replicated(handle, "x").call("info")))
    assert problem.error == "Crashed" and len(asked) == 2


def test_what_no_replica_has_taken_waits_and_is_told_so_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    class Starting:
        async def remote(self, *_: Any) -> Any:
            asked.append(1)
            if len(asked) < ready:
                raise DeploymentUnavailableError(None)
            return "well", None

    monkeypatch.setattr(backend, "RETRY_S", 0.0)
    handle = Starting()
    handle.call = handle  # type: ignore[attr-defined]
    asked, ready = [], 9
    assert asyncio.run(Replicated(handle, "x").call("info")) == "well" and len(asked) == 9
    asked, ready = [], 10**9
    monkeypatch.setattr(backend, "PATIENCE_S", 0.0)
    problem = asyncio.run(outcome(Replicated(handle, "x").call("info")))
    assert (problem.status, problem.error) == (503, "Unavailable") and problem.retry_after_s


class Slow:
    """An engine that says when it begins with a batch, and ends with it when it may."""

    limits = Limits()

    def __init__(self, loop: asyncio.AbstractEventLoop, may_end: threading.Semaphore | None = None) -> None:
        self.batches: list[list[str]] = []
        self.loop, self.begun, self.may_end = loop, asyncio.Event(), may_end

    def prepare(self, ask: Any) -> Any:
        return ask

    def search(self, batch: Any) -> Any:
        self.batches.append(list(batch))
        self.loop.call_soon_threadsafe(self.begun.set)
        time.sleep(0.02)
        assert self.may_end is None or self.may_end.acquire(timeout=60)
        return [(one, None) for one in batch]


def counted(worker: Worker) -> list[int]:
    """How many were expected whenever a batch waited."""
    waits: list[int] = []

    class Counted(asyncio.Event):
        async def wait(self) -> Any:
            waits.append(worker._expected)
            return await super().wait()

    worker._gathered = Counted()
    return waits


def test_who_asks_again_at_once_is_answered_in_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "GATHER_SHARE", 100.0)  # a busy machine may keep them long

    async def ask() -> None:
        engine = Slow(asyncio.get_running_loop())
        worker = Worker(engine)  # type: ignore[arg-type]

        async def client(name: str) -> None:
            for _ in range(6):
                assert (await worker.search(SimpleNamespace(image=None, name=name)))[1] is None  # type: ignore[arg-type]

        await asyncio.gather(*(client(name) for name in "abcdefgh"))
        whole = [batch for batch in engine.batches if len(batch) == 8]
        assert len(whole) >= 4 and sum(map(len, engine.batches)) == 48, [len(batch) for batch in engine.batches]

    asyncio.run(ask())


def test_a_search_that_comes_later_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        engine = Slow(asyncio.get_running_loop())
        worker = Worker(engine)  # type: ignore[arg-type]
        waits = counted(worker)
        some = [SimpleNamespace(image=None) for _ in range(9)]
        await asyncio.gather(*(worker.search(one) for one in some[:8]))  # type: ignore[arg-type]
        waits.clear()
        await asyncio.sleep(0.1)
        assert worker._expected > 1
        await worker.search(some[8])  # type: ignore[arg-type]
        assert waits == []

    asyncio.run(ask())


def test_waiting_in_vain_is_not_repeated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> None:
        may_end = threading.Semaphore(0)
        engine = Slow(asyncio.get_running_loop(), may_end)
        worker = Worker(engine)  # type: ignore[arg-type]
        waits = counted(worker)
        asked = []
        for n in range(backend.GATHER_AGAIN):  # each comes from somebody else, while the one before is answered
            asked.append(asyncio.create_task(worker.search(SimpleNamespace(image=None))))  # type: ignore[arg-type]
            while n and not worker._waiting:
                await asyncio.sleep(0)
            if n:
                may_end.release()
            await engine.begun.wait()
            engine.begun.clear()
        may_end.release()
        await asyncio.gather(*asked)
        assert len(engine.batches) == backend.GATHER_AGAIN and waits == [2]

    asyncio.run(ask())
