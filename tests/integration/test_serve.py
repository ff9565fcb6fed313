"""The service as it is started, on Ray Serve: it answers, follows its index, survives its replicas, and leaves in order."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import Job, titled, wait_for
from mmref.retrieval import index
from mmref.retrieval.searcher import Searcher

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def own_index(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Index of the tiny set's test split by a model of random weights."""
    from tiny_run import make_run
    from tiny_set import tiny_config

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_run(tiny_config(tiny_set, {}), str(tmp_path / "run"), {})
    index.create(str(tiny_set), str(tmp_path / "run"), str(tmp_path / "own"), split="test", workers=0)
    return tmp_path / "own"


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Job, str]]]:
    """A function that starts jobs/serve.py and waits until it listens: (job, URL)."""
    started: list[Job] = []

    def begin(*argv: str) -> tuple[Job, str]:
        job = Job("serve.py", *argv, "--port", "0")
        started.append(job)
        found = wait_for(lambda: re.search(r"at (http://\S+/) ", job.output()), job)
        return job, found[1]

    yield begin
    for job in started:
        if job.process.poll() is None:
            job.kill()


def get(url: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(url, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def replicas(job: Job) -> list[psutil.Process]:
    return titled(job.descendants(), "ServeReplica")


def test_it_answers_as_the_searcher_and_leaves_nothing_behind(own_index, tmp_path, start):
    other = Path(shutil.copytree(own_index, tmp_path / "other"))
    job, url = start(str(own_index), str(other))
    searcher = Searcher(str(own_index))
    for name in ("own", "other"):
        status, answer = get(f"{url}search?text=red+circle&top=5&index={name}")
        assert status == 200 and answer["index"] == name
        assert [r["id"] for r in answer["results"]] == [r.id for r in searcher.search("red circle", top=5)]
    assert get(f"{url}search?text=x&where=colour%3Dred") == (
        400,
        {
            "error": "UnknownColumn",
            "message": "own has no column 'colour' to filter by. It has: split, caption.",
            "fix": "Filter by one of its columns: split, caption.",
        },
    )
    assert get(f"{url}explain?text=x&id={answer['results'][0]['id']}")[0] == 200
    assert get(f"{url}healthz")[1] == {"status": "ok", "indexes": {"own": "ok", "other": "ok"}}
    started = job.descendants()
    job.process.send_signal(signal.SIGTERM)
    status, output = job.wait()
    assert status == 0 and output.rstrip().endswith("stopped"), output
    psutil.wait_procs(started, timeout=60)
    assert not [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


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
