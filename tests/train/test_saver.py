"""Checkpoints beside training, with Ray Train's upload thread played by one of our own."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import ray.train
import torch

from mmref.config import ReferenceConfig
from mmref.errors import StorageError
from mmref.run import checkpoints
from mmref.run.directory import RunDir
from mmref.storage import retries
from mmref.train.bank import ReferenceBank
from mmref.train.saver import Saver


class Uploads:
    """What Ray Train does with reports: one at a time on a thread, and their outcome in order."""

    def __init__(self, monkeypatch, root):
        self.reported, self.errors = [], []
        self.gate = threading.Event()
        self.gate.set()
        self.threads = []
        store = SimpleNamespace(storage_filesystem=None, build_checkpoint_path_from_name=lambda n: f"{root}/{n}")
        monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: store))
        monkeypatch.setattr(ray.train, "report", self.report)

    def report(self, metrics, target, *, checkpoint_dir_name, checkpoint_upload_mode, checkpoint_upload_fn,
               delete_local_checkpoint_after_upload):  # fmt: skip
        assert delete_local_checkpoint_after_upload is False, "Ray would remove the checkpoint it was told of"

        def upload():
            self.gate.wait()
            try:
                self.reported.append((metrics, checkpoint_upload_fn(target, checkpoint_dir_name).path))
            except Exception as error:
                self.errors.append(error)

        if checkpoint_upload_mode == ray.train.CheckpointUploadMode.SYNC:
            upload()
        else:
            self.threads.append(threading.Thread(target=upload, daemon=True))
            self.threads[-1].start()


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    return Uploads(monkeypatch, tmp_path / "checkpoints")


@pytest.fixture
def training(monkeypatch):
    """An engine and a bank that DeepSpeed wraps nothing around."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    model = torch.nn.Linear(3, 2)
    return SimpleNamespace(module=model, optimizer=torch.optim.AdamW(model.parameters())), ReferenceBank(
        4, 2, ReferenceConfig(), 0
    )


def test_training_goes_on_while_the_checkpoint_is_written(uploads, training, tmp_path):
    run = RunDir(str(tmp_path))
    engine, bank = training
    uploads.gate.clear()
    with Saver(run, engine, bank, asynchronous=True) as writing:
        weight = engine.module.weight.detach().clone()
        assert writing.save({"step": 5, "score": 1.0}, {"step": 5}) >= 0
        with torch.no_grad():
            engine.module.weight.zero_()  # the next step
        assert checkpoints.list_checkpoints(run) == [] and writing.take_finished() == []
        uploads.gate.set()
        writing.wait()
        (info,) = checkpoints.list_checkpoints(run)
        (record,) = writing.take_finished()
        assert record["step"] == info.step == 5 and record["checkpoint_seconds"] > 0 and writing.take_finished() == []
    uploads.threads[0].join()
    assert uploads.reported == [({"step": 5}, f"{tmp_path}/{info.folder}")], "Ray hears of it when it is complete"
    with checkpoints.fetched(run, info, "model") as folder:
        assert torch.equal(checkpoints.TensorFolder(folder, "model").get("weight"), weight), "as it was when saved"


def test_one_is_in_flight_and_the_last_is_waited_for(uploads, training, tmp_path):
    run = RunDir(str(tmp_path))
    uploads.gate.clear()
    threading.Timer(0.3, uploads.gate.set).start()
    with Saver(run, *training, asynchronous=True) as writing:
        writing.save({"step": 1}, {})
        assert not uploads.gate.is_set(), "the first does not wait"
        writing.save({"step": 2}, {})
        assert uploads.gate.is_set() and [c.step for c in checkpoints.list_checkpoints(run)][:1] == [1]
    assert [c.step for c in checkpoints.list_checkpoints(run)] == [1, 2]


def test_the_checkpoint_in_flight_is_written_when_training_fails(uploads, training, tmp_path):
    run = RunDir(str(tmp_path))
    uploads.gate.clear()
    threading.Timer(0.1, uploads.gate.set).start()
    with pytest.raises(ZeroDivisionError), Saver(run, *training, asynchronous=True) as writing:
        writing.save({"step": 1}, {})
        raise ZeroDivisionError
    assert [c.step for c in checkpoints.list_checkpoints(run)] == [1]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_storage_that_stays_away_is_an_error_and_leaves_no_checkpoint(uploads, training, tmp_path, monkeypatch, asynchronous):
    run = RunDir(str(tmp_path))
    monkeypatch.setattr(retries, "PATIENCE_S", 0.05)
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.01)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    writing = Saver(run, *training, asynchronous)
    writing.save({"step": 1}, {})
    writing.wait()
    monkeypatch.setattr(run.fs, "open", full)
    with pytest.raises(StorageError, match=r"cannot write .*step-00000002-.*model-0.*No space left.*Free space"):
        writing.save({"step": 2}, {})
        writing.save({"step": 3}, {})  # training hears of it at the next checkpoint at the latest
    monkeypatch.undo()
    assert [c.step for c in checkpoints.list_checkpoints(run)] == [1]
    assert len(uploads.errors) == 1 and isinstance(uploads.errors[0], StorageError), "Ray hears of it at once"


def test_a_storage_that_fails_once_costs_nothing(uploads, training, tmp_path, monkeypatch):
    run = RunDir(str(tmp_path))
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    opened, original = [], run.fs.open

    def unsteady(path, mode):
        opened.append(path)
        if len(opened) % 2:
            raise OSError(5, "Input/output error")
        return original(path, mode)

    monkeypatch.setattr(run.fs, "open", unsteady)
    with Saver(run, *training, asynchronous=True) as writing:
        writing.save({"step": 1}, {})
    monkeypatch.undo()
    (info,) = checkpoints.list_checkpoints(run)
    with checkpoints.fetched(run, info, *checkpoints.KINDS):
        assert len(opened) >= 6


def test_a_report_that_fails_is_not_waited_for(uploads, training, tmp_path, monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("the controller is gone")

    writing = Saver(RunDir(str(tmp_path)), *training, asynchronous=True)
    with monkeypatch.context() as patch:
        patch.setattr(ray.train, "report", refuses)
        with pytest.raises(RuntimeError, match="the controller is gone"):
            writing.save({"step": 1}, {})
    left = threading.Thread(target=writing.__exit__, args=(RuntimeError,), daemon=True)
    left.start()
    left.join(60)
    assert not left.is_alive(), "whoever trains hears of the error"
