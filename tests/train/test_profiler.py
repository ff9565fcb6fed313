"""A trace of a few steps behind the first ones, what it costs where nobody asked, and memory on a GPU that is played here."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from mmref.run.directory import RunDir
from mmref.train import profiler
from mmref.train.profiler import WARM_UP, StepProfiler

CPU = torch.device("cpu")


def train(run: RunDir, traced: int, steps: int, device: torch.device = CPU) -> None:
    with StepProfiler(run, traced, device) as found:
        for _ in range(steps):
            torch.ones(8, 8) @ torch.ones(8, 8)
            found.step()


def traced_steps(run: RunDir) -> list[str]:
    events = json.loads(gzip.decompress(run.read_bytes("profile/trace.json.gz")))["traceEvents"]
    return sorted({event["name"] for event in events if event["name"].startswith("ProfilerStep#")})


@pytest.mark.parametrize(("steps", "expected"), [(WARM_UP + 9, 2), (WARM_UP + 2, 2), (WARM_UP + 1, 1)])
def test_the_steps_behind_the_warm_up_are_traced(tmp_path, steps, expected):
    run = RunDir(str(tmp_path))
    train(run, 2, steps)
    assert len(traced_steps(run)) >= expected and f"ProfilerStep#{WARM_UP}" in traced_steps(run)
    table = run.read_text("profile/operators.txt")
    assert table.startswith(f"{expected} steps after {WARM_UP}\n") and "aten::mm" in table


def test_a_run_that_ends_before_leaves_nothing(tmp_path):
    train(RunDir(str(tmp_path)), 2, WARM_UP - 1)
    assert not list(tmp_path.iterdir())


def test_nothing_runs_where_nothing_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(profiler, "profile", None)  # a call would fail
    train(RunDir(str(tmp_path)), 0, 3 * WARM_UP)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the allocator of a GPU is told; its snapshot is a word."""
    told: list[str] = []

    def record(**options):
        told.append(f"record {options.get('enabled', 'all')}")

    def dump(path):
        told.append("dump")
        with open(path, "w") as file:
            file.write("blocks")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    return told


GPU = SimpleNamespace(type="cuda")


def test_allocations_of_a_gpu_are_kept_until_the_steps_are_done(tmp_path, gpu):
    run = RunDir(str(tmp_path))
    train(run, 2, WARM_UP + 5, GPU)
    assert gpu == ["record all", "dump", "record None"]
    assert run.read_text("profile/memory.pickle") == "blocks"


def test_they_are_still_there_where_memory_runs_out(tmp_path, gpu):
    with pytest.raises(torch.OutOfMemoryError), StepProfiler(RunDir(str(tmp_path)), 2, GPU) as found:
        found.step()
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert gpu == ["record all"]
