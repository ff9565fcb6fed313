"""The log of a run on a disk that is full for a moment."""

from __future__ import annotations

import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmref.run.directory import RunDir, read_jsonl
from mmref.train.logs import RunLog


def _steps(folder: str) -> list[int]:
    board = EventAccumulator(folder)
    board.Reload()
    return [e.step for e in board.Scalars("loss")]


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
    log({"step": 3, "loss": 1.0})
    log({"step": 4, "loss": 0.5})
    log.close()
    assert [r["step"] for r in read_jsonl(run)] == [1, 2, 3, 4]
    assert _steps(str(tmp_path / "tensorboard")) == [1, 3, 4]
