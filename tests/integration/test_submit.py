"""`ray job submit -- python jobs/train.py`, and tune/sweep.py, on a running cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.jobs import ROOT, write_config

from mmref.config import load_config

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of the dashboard of a one-node cluster, ended by its process group."""
    dashboard = free_port()
    argv = [RAY, "start", "--head", "--block", "--num-cpus=6", f"--port={free_port()}", "--include-dashboard=true"]
    argv += [f"--dashboard-port={dashboard}", "--object-store-memory=300000000", "--disable-usage-stats"]
    # the usual port of what starts jobs may be another cluster's
    argv += [f"--dashboard-agent-listen-port={free_port()}"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    head = subprocess.Popen(argv, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


def submitted(cluster: str, *argv: str) -> str:
    """Output of a job that has succeeded."""
    command = [RAY, "job", "submit", "--address", cluster, "--working-dir", str(ROOT), "--", sys.executable, *argv]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    done = None
    for _ in range(20):  # the dashboard answers a while after the head has started
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=500)
        if not any(text in done.stderr + done.stdout for text in ("Failed to connect", "No available agent")):
            break
        subprocess.run(["sleep", "2"])
    assert done is not None and done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_submitted_job_trains_and_reports(cluster: str, tiny_set: Path, tmp_path: Path) -> None:
    from support.tiny_set import tiny_config

    overrides = {"train.max_steps": 8, "train.eval_every": 4, "eval.bootstrap": 100, "eval.examples": 2}
    config = str(write_config(tiny_config(tiny_set, overrides), tmp_path))
    run = str(tmp_path / "run")
    output = submitted(cluster, "jobs/train.py", "--config", config, "--run_dir", run, "--train.workers", "2")
    assert "text to image" in output
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["split"] == "test"


@pytest.mark.slow
def test_submitted_sweep_fills_the_cluster_and_leaves_its_best(cluster: str, tiny_set: Path, tmp_path: Path) -> None:
    from support.tiny_set import tiny_config

    config = write_config(tiny_config(tiny_set, {"train.max_steps": 8, "train.eval_every": 4}), tmp_path)
    (tmp_path / "space.yaml").write_text("loss.w_guide: {type: uniform, low: 0.0, high: 1.0}\n")
    argv = ["--config", str(config), "--space", str(tmp_path / "space.yaml"), "--trials", "2", "--final-seeds", "0"]
    output = submitted(cluster, "tune/sweep.py", *argv, "--scheduler", "none", "--run_dir", str(tmp_path / "sweep"))
    assert "2 trials of 8 steps" in output and "2 at a time" in output, "6 CPUs hold two trials of 2.1 and Ray Data's one"
    assert [row["status"] for row in pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()] == ["finished"] * 2
    assert load_config(["--config", str(tmp_path / "sweep" / "best.yaml")]).train.max_steps == 8
    assert (tmp_path / "sweep" / "sweep.html").exists()
