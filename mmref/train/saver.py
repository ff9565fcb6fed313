"""Checkpoints beside training: the step loop stops for the copy to the host, files are written while it goes on.

One checkpoint is in flight at a time. Ray Train's upload thread calls back into `Saver._write`, keeps reports in order, and
fails the worker when it raises; the checkpoint is reported to Ray when it is committed, and not before.
"""

from __future__ import annotations

import threading
import time
import uuid
from typing import Any

from mmref.run import checkpoints
from mmref.run.directory import RunDir
from mmref.train import checkpoint_files, collectives
from mmref.train.bank import ReferenceBank
from mmref.train.division import Division


class Saver:
    """Saves checkpoints of one rank's engine and bank. A context manager: on the way out it waits for the last one."""

    def __init__(
        self, run: RunDir, engine: Any, bank: ReferenceBank, asynchronous: bool, division: Division | None = None
    ) -> None:
        self.run, self.engine, self.bank, self.asynchronous, self.division = run, engine, bank, asynchronous, division
        self._idle = threading.Event()
        self._idle.set()
        self._error: Exception | None = None
        self._finished: list[dict[str, Any]] = []

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._idle.wait()
        if kind is None:
            self.wait()

    def save(self, meta: dict[str, Any], metrics: dict[str, Any]) -> float:
        """Begin a checkpoint (collective); returns the seconds that training stood still for it.

        Args:
            meta: goes into meta.json: step, score, ...
            metrics: reported to Ray Train with the checkpoint.

        Raises:
            StorageError: this checkpoint or the one before it cannot be written.
        """
        import ray.train
        from ray.train import CheckpointUploadMode

        began = time.perf_counter()
        self.wait()
        state = checkpoint_files.snapshot(self.engine, self.bank, meta, self.division)
        # Each attempt has a new folder, so that a smaller world has no old ranks' files among its own.
        name = f"step-{meta['step']:08d}-{uuid.uuid4().hex[:6]}"
        storage = ray.train.get_context().get_storage()
        rank = collectives.rank()
        self._idle.clear()
        begun: list[str] = []

        def write(_: ray.train.Checkpoint, folder: str) -> ray.train.Checkpoint:
            begun.append(folder)
            self._write(f"{checkpoints.FOLDER}/{folder}", state, rank, began)
            path = storage.build_checkpoint_path_from_name(folder)
            return ray.train.Checkpoint(path, storage.storage_filesystem)

        try:
            ray.train.report(
                metrics,
                ray.train.Checkpoint(storage.build_checkpoint_path_from_name(name), storage.storage_filesystem),
                checkpoint_dir_name=name,  # rank 0's is everybody's
                checkpoint_upload_mode=CheckpointUploadMode.ASYNC if self.asynchronous else CheckpointUploadMode.SYNC,
                checkpoint_upload_fn=write,
                delete_local_checkpoint_after_upload=False,
            )
        except BaseException:
            if not begun:
                self._idle.set()  # who waited for its end would wait for ever
            raise
        return time.perf_counter() - began

    def _write(self, folder: str, state: checkpoint_files.Snapshot, rank: int, began: float) -> None:
        """On the upload thread: this rank's files, and on rank 0 the commit when all ranks' are in place."""
        try:
            if self._error:  # Ray repeats an upload whose error it takes for a passing one: retrying is done below us
                raise self._error
            size = state.bytes
            checkpoint_files.write(self.run, folder, state, rank)
            state.tensors.clear()  # the next copy is made in this memory
            if rank == 0:
                checkpoint_files.commit(self.run, folder, state.meta)
                seconds = time.perf_counter() - began
                self._finished.append({"step": state.meta["step"], "checkpoint_seconds": seconds, "checkpoint_mb": size / 1e6})
        except Exception as error:
            self._error = error
            raise
        finally:
            self._idle.set()

    def wait(self) -> None:
        """Wait until the checkpoint in flight is written. Raises StorageError when it could not be."""
        self._idle.wait()
        if self._error:
            raise self._error

    def take_finished(self) -> list[dict[str, Any]]:
        """Records of the checkpoints committed since the last call (on rank 0), for the log."""
        done, self._finished = self._finished, []
        return done
