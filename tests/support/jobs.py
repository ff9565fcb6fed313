"""Starting jobs as a user does, as processes of their own, and looking at what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

from mmref.config import Config, dump_yaml

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
# A line of Ray's core, of Ray's Python loggers, or of one of Ray's processes.
OF_RAY = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+ \w \d+ \d+\]|\b(?:INFO|WARNING|ERROR)\b.*\.py:\d+ -- |\(\w*pid=\d+|max_restarts")


def titled(processes: Iterable[psutil.Process], *titles: str) -> list[psutil.Process]:
    """Those whose command line has one of the titles; those that have ended meanwhile are left out."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if any(title in " ".join(process.cmdline()) for title in titles):
                found.append(process)
    return found


class Job:
    """A job of jobs/*.py in a process of its own; Ray and its workers are its descendants."""

    def __init__(self, script: str, *argv: str, address: str = "") -> None:
        """`script`: of jobs/, or a path; `address`: of the cluster, "" for one of its own."""
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        if address:
            environment["RAY_ADDRESS"] = address
        self._output = tempfile.TemporaryFile("a+")  # a pipe that nobody empties would stop the job
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / script), *argv],
            cwd=ROOT, env=environment, text=True, stdout=self._output, stderr=subprocess.STDOUT,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored where tests run behind a `&`
        )  # fmt: skip

    def output(self) -> str:
        """What it has printed so far."""
        self._output.seek(0)
        return self._output.read()

    def wait(self) -> tuple[int, str]:
        """Exit status and output."""
        self.process.wait(timeout=TIMEOUT_S)
        return self.process.returncode, self.output()

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def training_workers(self) -> list[psutil.Process]:
        """The Ray Train workers of this job."""
        return titled(self.descendants(), "RayTrainWorker")

    def kill(self) -> None:
        """Kill the driver and everything it started, as a machine that loses power does."""
        family = [*self.descendants(), psutil.Process(self.process.pid)]
        for process in family:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.wait(timeout=60)


def lines_of_ray(output: str) -> list[str]:
    """What Ray's internals have printed: a sound run has none of it."""
    return [line for line in output.splitlines() if OF_RAY.search(line)]


def write_config(config: Config, folder: Path) -> Path:
    """The config as a YAML file for `--config`."""
    path = folder / "config.yaml"
    path.write_text(dump_yaml(config))
    return path


def records(run: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a full disk may hold half of the last one


def losses(run: Path) -> dict[int, float]:
    """Loss of each step; fails when a step was logged twice."""
    found: dict[int, float] = {}
    for record in records(run):
        if "loss" in record:
            assert record["step"] not in found, f"step {record['step']} was logged twice"
            found[record["step"]] = record["loss"]
    return found


def wait_for(condition: Callable[[], Any], job: Job) -> Any:
    """Value of the condition once it is true; fails when the job ends before or nothing happens."""
    until = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until:
        if value := condition():
            return value
        if job.process.poll() is not None:
            raise AssertionError(f"the job ended first: {job.wait()[1][-2000:]}")
        time.sleep(0.2)
    raise AssertionError("waited in vain")
