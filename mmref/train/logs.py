"""The log of a run: metrics.jsonl and TensorBoard events, written by rank 0."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from typing import Any

from mmref.run.directory import JsonLines, RunDir
from mmref.storage.retries import retry

FOLDER = "tensorboard"


class RunLog:
    """Appends records to metrics.jsonl and to TensorBoard.

    TensorBoard cannot append to an object: behind a URL its events are written to a local folder, and `flush` copies it.
    Its thread gives up at the first full disk; what it had not written then is in metrics.jsonl only.
    """

    def __init__(self, run: RunDir, start: int) -> None:
        """Open at step `start`; records of steps behind it, of a run that was interrupted later, are dropped."""
        self.run = run
        self.lines = JsonLines(run, keep_below_step=start + 1)
        self.folder = run.inner(FOLDER) if run.local else tempfile.mkdtemp(prefix="mmref-tensorboard-")
        self._open_board(start)

    def _open_board(self, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = retry(f"write {self.folder}", lambda: SummaryWriter(self.folder, purge_step=start or None))

    def __call__(self, record: dict[str, Any]) -> None:
        """Write a record: {"step": ..., name: value, ...}. Numbers go to TensorBoard too."""
        self.lines.append(record)
        try:
            self._add_to_board(record)
        except OSError:
            self._open_board(record["step"])  # a file of its own, which TensorBoard shows as the same run
            self._add_to_board(record)

    def _add_to_board(self, record: dict[str, Any]) -> None:
        if "started" in record or "pace" in record:  # no curve
            return
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                self.board.add_scalar(name.replace("val_", "val/").replace("loss_", "loss/"), value, record["step"])

    def flush(self) -> None:
        """Bring everything written so far to the storage."""
        self.lines.flush()
        if not self.run.local:
            with contextlib.suppress(OSError):  # the next record opens another file
                self.board.flush()
            self.run.put(self.folder, FOLDER)

    def close(self) -> None:
        self.flush()
        with contextlib.suppress(OSError):
            self.board.close()
        if not self.run.local:
            shutil.rmtree(self.folder, ignore_errors=True)
