"""The ledger of samples seen: which image stood at which position of which step of the model that came out.

A segment `ledger/<first step>-<end step>.parquet` (columns step, position, image_index) is written before the checkpoint
that ends it. A resumed run drops the segments behind its checkpoint: those steps are taken again, and the weights they
led to are gone. So the segments hold each step of the final weights once, through any number of failures.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mmref.data.plan import MixedPlan, Plan, build_plan
from mmref.data.reader import Batch
from mmref.data.shard_set import train_index
from mmref.errors import LedgerError
from mmref.run.checkpoints import latest_checkpoint
from mmref.run.directory import RunDir
from mmref.storage.parquet import read_parquet
from mmref.train import collectives

FOLDER, ENDING = "ledger", ".parquet"
COLUMNS = ("step", "position", "image_index")


class Ledger:
    """One rank's samples since the last checkpoint, brought together when the next one is due."""

    def __init__(self, run: RunDir, start: int, device: torch.device | str = "cpu") -> None:
        """`start` is the step that the run begins or resumes at; segments behind it are removed."""
        self.run, self.first, self.device = run, start, device
        self._seen: list[NDArray[np.int64]] = []
        if collectives.rank() == 0:
            for name in run.list(FOLDER):
                # A name that begins with a point was left by a process that was killed as it wrote.
                if name.startswith(".") or (name.endswith(ENDING) and _first_step(name) >= start):
                    run.remove(f"{FOLDER}/{name}")

    def add(self, batch: Batch) -> None:
        """Note this rank's samples of a step: step, position and image_index, (n,) each."""
        self._seen.append(np.stack([batch[name] for name in COLUMNS], axis=1).astype(np.int64))

    def images(self, step: int) -> list[int]:
        """What every rank has noted of a step since the last segment: image numbers in the order of positions (collective)."""
        own = np.concatenate(self._seen)
        rows = collectives.gather(torch.from_numpy(own[own[:, 0] == step]).to(self.device)).cpu().numpy()
        return rows[rows[:, 1].argsort(), 2].tolist()

    def write(self, end: int) -> None:
        """Write the segment that ends before step `end` (collective)."""
        own = np.concatenate(self._seen) if self._seen else np.zeros((0, len(COLUMNS)), np.int64)
        rows = collectives.gather(torch.from_numpy(own).to(self.device)).cpu().numpy()
        if collectives.rank() == 0 and len(rows):
            rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
            buffer = io.BytesIO()
            pq.write_table(pa.table(dict(zip(COLUMNS, rows.T))), buffer, compression="zstd")
            self.run.write_bytes(f"{FOLDER}/{self.first:08d}-{end:08d}{ENDING}", buffer.getvalue())
        self._seen, self.first = [], end


def read_ledger(run: RunDir) -> dict[str, NDArray[np.int64]]:
    """Columns step, position and image_index of a run's whole ledger, in order. Raises LedgerError."""
    names = sorted(name for name in run.list(FOLDER) if name.endswith(ENDING))
    if not names:
        raise LedgerError(f"{run.join(FOLDER)} holds no segment: the run has not reached its first checkpoint, or "
                          "the path is no run directory.")  # fmt: skip
    try:
        tables = [read_parquet(io.BytesIO(run.read_bytes(f"{FOLDER}/{name}"))) for name in names]
    except (OSError, ValueError) as error:
        raise LedgerError(f"{run.join(FOLDER)} cannot be read: {error}.") from error
    table = pa.concat_tables(tables)
    return {name: table[name].to_numpy() for name in COLUMNS}


@dataclass(frozen=True)
class Audit:
    """A ledger held against the plan of its run, in samples (one position of one step each)."""

    steps: int
    samples: int
    lost: int  # planned and not in the ledger
    repeated: int  # in the ledger more than once, or beyond the plan
    replaced: int  # another image than the planned one, which was broken: of the same object, or of one that stands in for it

    @property
    def sound(self) -> bool:
        return not self.lost and not self.repeated

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, {self.samples} samples: {self.lost} lost, {self.repeated} repeated, "
            f"{self.replaced} replaced (broken)"
        )


def audit(ledger: dict[str, NDArray[np.int64]], plan: Plan | MixedPlan, steps: int) -> Audit:
    """Compare a ledger with what steps 0 .. steps - 1 of the plan ask for."""
    batch = plan.objects_per_step * plan.images_per_object
    key = ledger["step"] * batch + ledger["position"]
    unique, at = np.unique(key, return_index=True)
    within = (unique >= 0) & (unique < steps * batch)
    planned = np.concatenate([plan(step).images for step in range(steps)]) if steps else np.zeros(0, np.int64)
    seen = ledger["image_index"][at[within]]
    return Audit(
        steps=steps,
        samples=len(key),
        lost=steps * batch - int(within.sum()),
        repeated=len(key) - int(within.sum()),
        replaced=int((planned[unique[within]] != seen).sum()),
    )


def audit_run(run_dir: str) -> Audit:
    """Audit of a run up to its latest checkpoint. Raises LedgerError, ShardSetError, RunDirectoryError."""
    run = RunDir(run_dir)
    latest = latest_checkpoint(run)
    if latest is None:
        raise LedgerError(f"{run.path} holds no complete checkpoint: give the run directory of `mmref train`.")
    config = run.read_config()
    plan = build_plan(config, train_index(config))
    return audit(read_ledger(run), plan, latest.step)


def _first_step(name: str) -> int:
    return int(name.split("-")[0])
