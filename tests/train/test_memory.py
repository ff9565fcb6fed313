"""A worker whose GPU has no memory left, played on a CPU: what is said, and what is written."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmref.config import from_dict, to_dict
from mmref.errors import DeviceMemoryError, StorageError
from mmref.run.directory import RunDir
from mmref.train import loop
from mmref.train.memory import out_of_memory

ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def dump(path: str) -> None:
        with open(path, "w") as file:
            file.write("blocks")

    cuda: Any = torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80e9))
    monkeypatch.setattr(cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(cuda, "memory_summary", lambda _: "| allocated | 79 GB |")
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda _: 79.4e9)
    monkeypatch.setattr(cuda.memory, "_dump_snapshot", dump)


def test_figures_and_remedies_are_said_and_memory_is_written(make_config, tmp_path, gpu):
    run = RunDir(str(tmp_path))
    said = str(out_of_memory(ERROR, make_config({"train.workers": 2, "train.global_batch": 24}), run, 1))
    assert "worker 1 of 2 has no memory left on its NVIDIA H100 80GB HBM3 of 80.0 GB: its peak was 79.4 GB" in said
    assert "with 12 pairs a worker in micro-batches of 12, in fp32." in said
    assert "`--train.accumulation 2` (the same results in micro-batches of 6)" in said
    assert "--train.gradient_checkpointing true" in said and "--train.precision bf16" in said
    assert "`mmref sizing --objects 14 --workers 2`" in said and str(tmp_path / "out_of_memory") in said
    text = run.read_text("out_of_memory/rank-1.txt")
    assert "Tried to allocate 20.00 GiB" in text and "| allocated | 79 GB |" in text
    assert run.read_text("out_of_memory/rank-1.pickle") == "blocks"


def test_only_what_is_left_to_try_is_advised(make_config, tmp_path, gpu):
    config = make_config({"train.accumulation": 8, "train.precision": "bf16", "train.gradient_checkpointing": True})
    said = str(out_of_memory(ERROR, config, RunDir(str(tmp_path)), 0))
    assert "in micro-batches of 1, in bf16" in said
    for tried in ("--train.accumulation", "--train.precision", "--train.gradient_checkpointing"):
        assert tried not in said
    assert "Resume with a smaller `train.global_batch` than 8 (another run)." in said


def test_the_next_accumulation_divides_the_batch(make_config, tmp_path, gpu):
    config = make_config({"train.global_batch": 20, "train.accumulation": 2})
    said = str(out_of_memory(ERROR, config, RunDir(str(tmp_path)), 0))
    assert "`--train.accumulation 4` (the same results in micro-batches of 5)" in said, "3 does not divide 20"


def test_a_storage_that_fails_as_well_hides_nothing(make_config, tmp_path, gpu, monkeypatch):
    def fail(*_: Any) -> None:
        raise StorageError("full")

    run = RunDir(str(tmp_path))
    monkeypatch.setattr(run, "write_text", fail)
    assert "has no memory left" in str(out_of_memory(ERROR, make_config(), run, 0))


def test_the_entry_point_raises_it_by_name(make_config, tmp_path, monkeypatch):
    import ray.train

    class Full:
        def __init__(self, config: Any, run: RunDir) -> None:
            config.train.workers = 4  # what the group really has

        def train(self) -> int:
            raise ERROR

    monkeypatch.setattr(loop, "Worker", Full)
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 3))
    values = to_dict(from_dict(to_dict(make_config({"run_dir": str(tmp_path)}))))
    with pytest.raises(DeviceMemoryError, match="worker 3 of 4") as raised:
        loop.train_worker(values)
    assert raised.value.__cause__ is ERROR
    assert "CUDA out of memory" in (tmp_path / "out_of_memory" / "rank-3.txt").read_text()
