"""The log of a run that is resumed, or on a disk that is full for a moment."""

from __future__ import annotations

import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmref.run.directory import RunDir, read_jsonl
from mmref.train.logs import RunLog


def _points(folder: str, name: str = "loss") -> list[tuple[int, float]]:
    board = EventAccumulator(folder)
    board.Reload()
    return [(e.step, e.value) for e in board.Scalars(name)]


def _log(run: RunDir, start: int, *records: dict) -> None:
    """What one attempt logs. TensorBoard reads its files in the order of their names, which begin with whole seconds."""
    time.sleep(1.1)
    log = RunLog(run, start)
    for record in records:
        log(record)
    log.close()


@pytest.mark.parametrize("start", [0, 20])
def test_a_resumed_run_has_the_points_up_to_its_checkpoint_and_no_others(tmp_path, start):
    run = RunDir(str(tmp_path))
    _log(run, 0, *({"step": step, "loss": 5.0} for step in (10, 20)), {"step": 20, "val_mAP": 40.0}, {"step": 30, "loss": 5.0})
    _log(run, start, {"step": start + 10, "loss": 1.0})
    kept = [step for step in (10, 20) if step <= start]
    points = [(step, 5.0) for step in kept] + [(start + 10, 1.0)]
    assert [(r["step"], r["loss"]) for r in read_jsonl(run) if "loss" in r] == points
    assert _points(run.join("tensorboard")) == points
    if start:
        assert _points(run.join("tensorboard"), "val/mAP") == [(20, 40.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own thread
def test_the_log_goes_on_after_tensorboard_met_a_full_disk(tmp_path, monkeypatch):
    run = RunDir(str(tmp_path))
    log = RunLog(run, 0)
    log({"step": 1, "loss": 3.0})
    log.board.flush()
    writer = log.board.file_writer.event_writer._async_writer

    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._writer, "write", full)
    log({"step": 2, "loss": 2.0})
    while not writer._worker.exception:
        time.sleep(0.01)
    log({"step": 1, "val_mAP": 40.0})  # of a step that has points already
    log({"step": 3, "loss": 1.0})
    log({"step": 4, "loss": 0.5})
    log.close()
    assert [r["step"] for r in read_jsonl(run)] == [1, 2, 1, 3, 4]
    assert _points(run.join("tensorboard")) == [(1, 3.0), (3, 1.0), (4, 0.5)]
