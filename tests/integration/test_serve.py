"""The service as it is started, on Ray Serve: it answers, follows its index, survives its replicas, and leaves in order."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.jobs import Job, titled, wait_for

from mmref.retrieval import index
from mmref.retrieval.feedback import FILE, Judgements
from mmref.retrieval.searcher import Searcher

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def own_index(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Index of the tiny set's test split by a model of random weights."""
    from support.tiny_run import make_run
    from support.tiny_set import tiny_config

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_run(tiny_config(tiny_set, {}), str(tmp_path / "run"), {})
    index.create(str(tiny_set), str(tmp_path / "run"), str(tmp_path / "own"), split="test", workers=0)
    return tmp_path / "own"


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Job, str]]]:
    """A function that starts jobs/serve.py and waits until it listens: (job, URL)."""
    started: list[Job] = []

    def begin(*argv: str, script: str = "serve.py", address: str = "") -> tuple[Job, str]:
        job = Job(script, *argv, "--port", "0", address=address)
        started.append(job)
        found = wait_for(lambda: re.search(r"at (http://\S+/) ", job.output()), job)
        return job, found[1]

    yield begin
    for job in started:
        if job.process.poll() is None:
            job.kill()


def get(url: str | urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def replicas(job: Job) -> list[psutil.Process]:
    return titled(job.descendants(), "ServeReplica")


def test_it_answers_as_the_searcher_and_leaves_nothing_behind(own_index, tmp_path, start):
    other = Path(shutil.copytree(own_index, tmp_path / "other"))
    job, url = start(str(own_index), str(other), "--judge")
    searcher = Searcher(str(own_index))
    for name in ("own", "other"):
        status, answer = get(f"{url}search?text=red+circle&top=5&index={name}")
        assert status == 200 and answer["index"] == name
        assert [r["id"] for r in answer["results"]] == [r.id for r in searcher.search("red circle", top=5)]
    assert get(f"{url}search?text=x&where=colour%3Dred") == (
        400,
        {
            "error": "UnknownColumn",
            "message": "own has no column 'colour' to filter or sort by. It has: split, caption, id, object_id, width, height.",
            "fix": "Name one of its columns.",
        },
    )
    assert get(f"{url}explain?text=x&id={answer['results'][0]['id']}")[0] == 200
    assert get(f"{url}healthz")[1] == {"status": "ok", "indexes": {"own": "ok", "other": "ok"}}
    for item, status in ((searcher.items["id"][0].as_py(), 200), ("nobody", 404)):
        body = json.dumps({"text": "red circle", "id": item, "relevant": True, "index": "other"}).encode()
        assert get(urllib.request.Request(f"{url}judgements", body, {"content-type": "application/json"}))[0] == status
    assert [j.object_id for j in Judgements(other / FILE).read()] == [searcher.items["object_id"][0].as_py()]
    assert not (own_index / FILE).exists()
    started = job.descendants()
    job.process.send_signal(signal.SIGTERM)
    status, output = job.wait()
    assert status == 0 and output.rstrip().endswith("stopped"), output
    psutil.wait_procs(started, timeout=60)
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


# -- leaving ---------------------------------------------------------------------------------------------------------

OUTER_S = 40  # what a busy machine may add to LEAVE_S; a stalled upload alone used to take longer on an idle one


def connected(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1].strip("/"))), timeout=60)


def stalled(url: str) -> socket.socket:
    """An upload that has begun and does not go on."""
    connection = connected(url)
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 9999\r\n\r\n"
    connection.sendall(head + b"some")
    assert get(f"{url}healthz")[0] == 200  # behind it: the upload is being read
    return connection


def refused(url: str) -> bool:
    """Whether no connection is taken any more: the service is leaving."""
    try:
        connected(url).close()
    except ConnectionRefusedError:
        return True
    return False


def answer_of(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(4096):
        found += part
    return found


def test_it_leaves_in_time_whatever_its_clients_do(own_index, start):
    slow = Path(__file__).parents[1] / "support" / "slow_service.py"
    job, url = start(str(own_index), "--replicas", "0", script=str(slow))
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(get(f"{url}search?text=red")))
    with stalled(url) as upload:
        asking.start()
        wait_for(lambda: "searching" in job.output(), job)
        began = time.monotonic()
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(timeout=OUTER_S) == 0, job.output()
        assert time.monotonic() - began < 30, "half of what the search takes"
        told = answer_of(upload)
    asking.join()
    assert told.startswith(b"HTTP/1.1 503") and b'"Leaving"' in told, told
    assert [(status, answer["error"]) for status, answer in answers] == [(503, "Leaving")]
    output = job.output()
    assert output.rstrip().endswith("stopped") and "Traceback" not in output, output


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_does_not_wait(own_index, start, second):
    job, url = start(str(own_index), "--replicas", "0")
    with stalled(url):
        job.process.send_signal(signal.SIGTERM)
        wait_for(lambda: refused(url), job)
        job.process.send_signal(second)
        assert job.process.wait(timeout=OUTER_S) == -second, job.output()
    assert "stopped" not in job.output()


@pytest.mark.slow
def test_it_leaves_in_time_with_ray(own_index, start):
    job, url = start(str(own_index))
    started = job.descendants()
    with stalled(url) as upload:
        job.process.send_signal(signal.SIGTERM)
        assert job.process.wait(timeout=OUTER_S) == 0, job.output()
        assert b'"Leaving"' in answer_of(upload)
    psutil.wait_procs(started, timeout=60)
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


# -- replicas --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_request_that_kills_its_replica_costs_two_and_nobody_else(own_index, monkeypatch):
    import ray

    from mmref.cluster.connection import connect
    from mmref.retrieval.service import backend
    from mmref.retrieval.service.answering import Ask, Engine
    from mmref.retrieval.service.limits import Limits
    from mmref.retrieval.service.problems import Refused

    class Poisoned(backend.Worker):
        def __init__(self, index: str, limits: Limits, *_: Any) -> None:
            super().__init__(Engine(index, limits), 1)

        async def search(self, ask: Ask) -> Any:
            if ask.text == "poison":
                await asyncio.sleep(0.5)  # until innocent ones are there
                os._exit(1)
            return await super().search(ask)

    monkeypatch.setattr(backend, "Replica", Poisoned)

    async def ask(backend_: backend.Replicated) -> list[Any]:
        texts = ["poison", *(f"red {n}" for n in range(20))]
        return await asyncio.gather(*(backend_.search(Ask(t)) for t in texts), return_exceptions=True)

    with connect(2, 0.2):
        served = backend.deploy(str(own_index), "own", Limits(), 1)
        killed, *others = asyncio.run(ask(served))
        dead = [a for a in ray._private.state.actors().values() if "Serve" in a["ActorClassName"] and a["State"] == "DEAD"]
        served.close()
    assert isinstance(killed, Refused) and (killed.problem.status, killed.problem.error) == (503, "Crashed")
    assert [len(answer["results"]) for answer in others] == [10] * 20, others
    assert len(dead) == 2, dead


@pytest.mark.slow
def test_services_of_one_cluster_are_apart_and_the_next_removes_what_a_killed_one_left(own_index, start):
    import ray
    from ray import serve
    from support.nodes import Nodes

    def applications() -> set[str]:
        return set(serve.status().applications)

    with Nodes(2) as nodes:
        (first, _), (second, two) = (start(str(own_index), address=nodes.address) for _ in range(2))
        ray.init(address=nodes.address, log_to_driver=False, namespace="serve")
        both = applications()
        assert len(both) == 2 and all(re.fullmatch(r"mmref-[0-9a-f]{8}-0", name) for name in both)
        first.kill()
        assert get(f"{two}search?text=red")[0] == 200 and applications() == both
        third, three = start(str(own_index), address=nodes.address)
        left = applications()
        assert len(left) == 2 and len(left & both) == 1
        assert get(f"{two}search?text=red")[0] == get(f"{three}search?text=red")[0] == 200
        for job in (second, third):
            job.process.send_signal(signal.SIGTERM)
            assert job.process.wait(timeout=OUTER_S) == 0
        until = time.monotonic() + 60  # they were asked to stop; Ray Serve does it
        while applications() and time.monotonic() < until:
            time.sleep(0.2)
        assert not applications()
        ray.shutdown()


@pytest.mark.slow
def test_killed_replicas_and_a_changing_index_lose_no_request(own_index, start):
    job, url = start(str(own_index), "--max-rate", "0")
    seen: Counter[tuple[int, int]] = Counter()
    stop = threading.Event()

    def ask(number: int) -> None:
        asked = 0
        while not stop.is_set():
            asked += 1
            status, answer = get(f"{url}search?text=red+{number}+{asked}&top=12")
            seen[status, len(answer.get("results", []))] += 1

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            wait_for(lambda: replicas(job), job)[0].kill()
            before = sum(seen.values())
            wait_for(lambda before=before: sum(seen.values()) > before + 100, job)
        index.remove(str(own_index), [Searcher(str(own_index)).items["id"][0].as_py()])
        wait_for(lambda: seen[200, 11] > 50, job)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(seen) == {(200, 12), (200, 11)}, seen


@pytest.mark.slow
def test_a_replica_that_is_kept_beside_another_is_not_missed(own_index, start):
    job, url = start(str(own_index), "--replicas", "2", "--min-replicas", "2")
    first, second = replicas(job)
    first.kill()
    for n in range(20):
        assert get(f"{url}search?text=red+{n}")[0] == 200
    assert second.is_running()
    wait_for(lambda: len(replicas(job)) == 2, job)


@pytest.mark.slow
def test_replicas_come_with_the_load(own_index, start):
    job, url = start(str(own_index), "--max-rate", "0", "--replicas", "3")
    assert len(replicas(job)) == 1
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            assert get(f"{url}search?text=red&top=12&candidates=0")[0] == 200

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: len(replicas(job)) > 1, job)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
