"""`ray job submit -- python jobs/train.py` on a running cluster."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import ROOT, write_config

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
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    head = subprocess.Popen(
        argv, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)


@pytest.mark.slow
def test_submitted_job_trains_and_reports(cluster: str, tiny_set: Path, tmp_path: Path) -> None:
    from tiny_set import tiny_config

    from mmref.config import Config

    overrides = {"train.max_steps": 8, "train.eval_every": 4, "eval.bootstrap": 100, "eval.examples": 2}
    config: Config = tiny_config(tiny_set, overrides)
    argv = ["--config", str(write_config(config, tmp_path)), "--run_dir", str(tmp_path / "run"), "--train.workers", "2"]
    submit = [RAY, "job", "submit", "--address", cluster, "--working-dir", str(ROOT), "--"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    command = [*submit, sys.executable, "jobs/train.py", *argv]
    done = None
    for _ in range(20):  # the dashboard answers a while after the head has started
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=400)
        if "Failed to connect" not in done.stderr + done.stdout:
            break
        subprocess.run(["sleep", "2"])
    assert done is not None and done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "text to image" in done.stdout
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["split"] == "test"
