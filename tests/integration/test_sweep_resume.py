"""`mmref tune --resume` after the driver of a sweep was killed: no trial is lost, none is run twice."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from support.jobs import ROOT, Job, wait_for, write_config

DRIVER = str(ROOT / "tests" / "support" / "sweep_driver.py")
SPACE = "loss.w_guide: {type: uniform, low: 0.0, high: 1.0}\nrefinement.weight: {type: choice, values: [0.1]}\n"
TRIALS = 6


@pytest.fixture
def argv(tiny_set: Path, tmp_path: Path) -> list[str]:
    from support.tiny_set import tiny_config

    (tmp_path / "space.yaml").write_text(SPACE)
    config = write_config(tiny_config(tiny_set, {"train.storage_gb": 0.2}), tmp_path)
    return [str(config), str(tmp_path / "space.yaml"), str(tmp_path / "sweep"), str(TRIALS)]


def events(run: Path) -> list[dict]:
    path = run / "trials.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def ended(run: Path) -> list[int]:
    return [e["trial"] for e in events(run) if "status" in e]


def check_whole(run: Path, before: dict[int, list[str]]) -> None:
    """Every trial once: begun, ended, each of its steps taken once; those that had ended were not touched again."""
    found = events(run)
    assert sorted(e["trial"] for e in found if "values" in e) == list(range(TRIALS))
    assert sorted(ended(run)) == list(range(TRIALS))
    rows = pq.read_table(run / "trials.parquet").to_pylist()
    assert len({row["loss.w_guide"] for row in rows}) == TRIALS, "no proposal came twice"
    for row in rows:
        steps = (run / "trials" / f"{row['trial']:03d}" / "steps.log").read_text().split()
        assert steps == [str(s) for s in range(1, len(steps) + 1)], "a step was taken twice"
        assert row["status"] in ("finished", "stopped-early") and 2 <= row["steps"] <= len(steps)
        assert row["score"] == pytest.approx(row["loss.w_guide"] * row["steps"])
        # ASHA judges at steps 2 and 4: one that had passed is not stopped for what it repeats when it goes on
        assert row["status"] == "finished" or row["steps"] in (2, 4)
        assert before.get(row["trial"], steps) == steps
    assert rows[0]["status"] == "finished", "the config itself is never stopped"
    reported = [(e["trial"], e["step"]) for e in found if "step" in e]
    assert len(set(reported)) == len(reported)
    leader = max(rows, key=lambda row: row["score"])
    assert f"trial {leader['trial']}" in (run / "best.yaml").read_text().splitlines()[0]


@pytest.mark.slow
def test_a_killed_driver(argv: list[str], tmp_path: Path) -> None:
    run = tmp_path / "sweep"
    job = Job(DRIVER, *argv)
    try:
        wait_for(lambda: len(ended(run)) >= TRIALS // 2 - 1, job)
        started = job.descendants()
        job.process.send_signal(signal.SIGKILL)
        job.process.wait(timeout=60)
        _, left = psutil.wait_procs(started, timeout=120)
    finally:
        if job.process.poll() is None:
            job.kill()
    assert not left, "its trials go on without it"
    assert len(ended(run)) < TRIALS, "killed too late to show anything"
    before = {n: (run / "trials" / f"{n:03d}" / "steps.log").read_text().split() for n in ended(run)}
    code, output = Job(DRIVER, "--resume", str(run)).wait()
    assert code == 0 and f"{len(before)} are done already" in output, output[-3000:]
    check_whole(run, before)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(number: signal.Signals, argv: list[str], tmp_path: Path) -> None:
    run = tmp_path / "sweep"
    job = Job(DRIVER, *argv)
    wait_for(lambda: len(ended(run)) >= 1, job)
    job.process.send_signal(number)
    code, output = job.wait()
    assert code == 130 and f"mmref tune --resume {run}" in output, output[-3000:]
    assert (run / "sweep.html").exists() and not (run / "best.yaml").exists()
    before = {n: (run / "trials" / f"{n:03d}" / "steps.log").read_text().split() for n in ended(run)}
    code, output = Job(DRIVER, "--resume", str(run)).wait()
    assert code == 0, output[-3000:]
    check_whole(run, before)
