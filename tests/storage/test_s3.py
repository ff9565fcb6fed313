"""The run directory and checkpoints over the S3 protocol."""

from __future__ import annotations

import json
import os
import time
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pyarrow import fs as pafs
from support.tiny_run import make_run

import mmref
from mmref.config import ReferenceConfig
from mmref.errors import CheckpointError, RunDirectoryError
from mmref.export.write import export_run
from mmref.run import checkpoints, directory
from mmref.run.directory import JsonLines, RunDir, read_jsonl
from mmref.train import checkpoint_files
from mmref.train.bank import ReferenceBank
from mmref.train.logs import RunLog
from mmref.train.ray_storage import ray_filesystem


@pytest.fixture
def url(s3_bucket) -> str:
    return f"{s3_bucket}/{uuid.uuid4().hex}/run"


@pytest.fixture(autouse=True)
def cpu_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def test_files_of_a_run(url, monkeypatch):
    monkeypatch.setattr(directory, "UPLOAD_EVERY_S", 0.0)
    run, other = RunDir(url), RunDir(url)
    assert not other.exists("config.yaml") and other.list("checkpoints") == [] and other.size("x") is None
    run.check_writable()
    run.write_text("config.yaml", "a: é\n")
    run.write_text("checkpoints/step-1/meta.json", "{}")
    assert other.list("") == ["checkpoints", "config.yaml"], "what another process writes is seen"
    assert other.sizes("checkpoints/step-1") == {"meta.json": 2} and other.read_text("config.yaml") == "a: é\n"
    lines = JsonLines(run)
    lines.append({"step": 1})
    lines.append({"step": 2})
    lines.flush()
    assert [r["step"] for r in read_jsonl(other)] == [1, 2]
    assert run.write_stream("big", lambda file: [file.write(bytes(1 << 20)) for _ in range(7)]) == [1 << 20] * 7
    assert other.size("big") == 7 << 20
    run.remove("checkpoints")
    assert other.list("") == ["big", "config.yaml", "metrics.jsonl"]


def test_a_bucket_that_is_not_there_is_a_named_error(s3_bucket):
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        RunDir("s3://no-such-bucket/run").check_writable()


def test_checkpoints_are_saved_listed_verified_and_loaded(url):
    run = RunDir(url)
    model = torch.nn.Linear(300, 200)
    engine = SimpleNamespace(module=model, optimizer=torch.optim.AdamW(model.parameters()))
    bank = ReferenceBank(4, 2, ReferenceConfig(), 0)
    for step in (1, 2):
        state = checkpoint_files.snapshot(engine, bank, {"step": step, "score": -step})
        folder = f"checkpoints/step-{step:08d}-a"
        checkpoint_files.write(run, folder, state, 0)
        assert [c.step for c in checkpoints.list_checkpoints(run)] == list(range(1, step)), "not before the commit"
        checkpoint_files.commit(run, folder, state.meta)
    weight = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    with checkpoint_files.resume_point(run, 4) as at:
        assert at.step == 2
        at.load(engine, bank)
    assert torch.equal(model.weight, weight) and not os.path.exists(at.folder)
    data = bytearray(run.read_bytes(f"{folder}/model-0.safetensors"))
    data[-1] ^= 1
    run.write_bytes(f"{folder}/model-0.safetensors", bytes(data))
    with checkpoint_files.resume_point(run, 4) as at:
        assert at.step == 1 and f"{url}/{folder}/model-0.safetensors is damaged" in at.passed_over[0]
    info = checkpoints.latest_checkpoint(run)
    with pytest.raises(CheckpointError, match=r"model-0.safetensors is damaged"):
        checkpoints.fetched(run, info, "model").__enter__()


def test_ray_train_keeps_its_list_and_removes_checkpoints_there(url):
    """What Ray Train does with `storage_filesystem`: it creates, writes, looks, compares and deletes."""
    run = RunDir(url)
    filesystem = ray_filesystem(run)
    assert filesystem == ray_filesystem(RunDir(url)), "a checkpoint of another process is known as one of this run"
    path = run.inner("checkpoints")
    filesystem.create_dir(path)
    with filesystem.open_output_stream(f"{path}/checkpoint_manager_snapshot.json") as file:
        file.write(b"{}")
    run.write_text("checkpoints/step-1/meta.json", "{}")
    assert filesystem.get_file_info(f"{path}/step-1").type == pafs.FileType.Directory
    assert filesystem.get_file_info(f"{path}/step-2").type == pafs.FileType.NotFound
    filesystem.delete_dir(f"{path}/step-1")
    assert run.list("checkpoints") == ["checkpoint_manager_snapshot.json"]


def test_tensorboard_events_and_lines_arrive(url):
    run = RunDir(url)
    log = RunLog(run, 0)
    log({"step": 1, "loss": 2.0})
    log.upload()
    while not run.list("tensorboard") or not read_jsonl(run):  # they arrive beside training
        time.sleep(0.01)
    assert len(run.list("tensorboard")) == 1 and [r["loss"] for r in read_jsonl(run)] == [2.0]
    log({"step": 2, "loss": 1.0})
    log.close()
    assert not os.path.exists(log.folder) and [r["loss"] for r in read_jsonl(run)] == [2.0, 1.0]


def test_export_reads_a_run_there(url, make_config, tmp_path):
    model = make_run(make_config(), url, {})
    assert json.loads(RunDir(url).read_text("metrics.json"))["split"] == "test"
    loaded = mmref.load(export_run(url, str(tmp_path / "out")))
    for (name, a), (_, b) in zip(loaded.module.named_parameters(), model.named_parameters(), strict=True):
        np.testing.assert_array_equal(a.detach(), b.detach(), err_msg=name)
