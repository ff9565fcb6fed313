"""The log of a run: metrics.jsonl, TensorBoard events and other sinks, written by rank 0."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from typing import Any

from mmref.run.directory import JsonLines, RunDir, Uploads
from mmref.storage.retries import retry
from mmref.train.sinks import Sinks

FOLDER = "tensorboard"


class RunLog:
    """Appends records to metrics.jsonl and to TensorBoard, and hands their numbers to the sinks of `train.sinks`.

    TensorBoard cannot append to an object: behind a URL its events are written to a local folder, which is copied there. Both
    are uploaded beside training; `close` returns when all has arrived.
    TensorBoard's thread gives up at the first full disk; what it had not written then is in metrics.jsonl only.
    """

    def __init__(self, run: RunDir, start: int, sinks: Sinks | None = None) -> None:
        """Open at step `start`; records of steps behind it, of a run that was interrupted later, are dropped."""
        self.run, self.sinks, self._step = run, sinks, start
        self.lines = JsonLines(run, keep_below_step=start + 1)
        self.folder = run.inner(FOLDER) if run.local else tempfile.mkdtemp(prefix="mmref-tensorboard-")
        self._open_board(purge_step=start + 1)
        self._boards = Uploads(self._upload_board)

    def _open_board(self, purge_step: int | None = None) -> None:
        """Begin a file of events; TensorBoard drops those of files before it that are of `purge_step` or later."""
        from torch.utils.tensorboard import SummaryWriter

        self.board = retry(f"write {self.folder}", lambda: SummaryWriter(self.folder, purge_step=purge_step))

    def __call__(self, record: dict[str, Any]) -> None:
        """Write a record: {"step": ..., name: value, ...}. Numbers go to TensorBoard and to the sinks too."""
        self.lines.append(record)
        self._step = record["step"]
        try:
            self._add_to_board(record)
        except OSError:
            self._open_board()  # a file of its own, which TensorBoard shows as the same run
            self._add_to_board(record)
        if not self.run.local:
            self._boards.ask()
        if self.sinks and (values := curves(record)):
            self.sinks.put(record["step"], values)
        self._say_failures()

    def _add_to_board(self, record: dict[str, Any]) -> None:
        for name, value in curves(record).items():
            self.board.add_scalar(name, value, record["step"])

    def _say_failures(self) -> None:
        for failure in self.sinks.failures(self._step) if self.sinks else []:
            self.lines.append(failure)

    def upload(self) -> None:
        """Begin to bring everything written so far to the storage. Raises StorageError of an upload before."""
        self.lines.upload()
        if not self.run.local:
            self._boards.ask(at_once=True)

    def _upload_board(self) -> int:
        with contextlib.suppress(OSError):  # the next record opens another file
            self.board.flush()
        return self.run.put(self.folder, FOLDER)

    def close(self) -> None:
        """Bring everything to the storage. Raises StorageError where that fails."""
        if self.sinks:
            self.sinks.close()
            self._say_failures()
        self.lines.flush()
        if not self.run.local:
            self._boards.finish()
        with contextlib.suppress(OSError):
            self.board.close()
        if not self.run.local:
            shutil.rmtree(self.folder, ignore_errors=True)


def curves(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record as they are drawn: `loss_align` as `loss/align`, `val_mAP` as `val/mAP`; a start has none."""
    if "started" in record or "pace" in record:
        return {}
    return {
        name.replace("val_", "val/").replace("loss_", "loss/"): value
        for name, value in record.items()
        if name != "step" and isinstance(value, (int, float))
    }
