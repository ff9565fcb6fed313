"""The ledger of samples seen: whether each step of the model that came out had the samples of its plan, and which others.

A plan is a function of the step, so what it says is not written down. A segment `ledger/<first step>-<end step>.parquet` has a
row for each step: how many positions of the plan were seen, how many samples came beyond them, a fingerprint of the image at
each position, and the images that stood in for broken ones. `audit` makes the fingerprints anew, of the plan and those
images. So what is gathered and written grows with steps and broken samples, not with workers.

A segment is written before the checkpoint that ends it. A resumed run drops the segments behind its checkpoint: those steps are
taken again, and the weights they led to are gone. So the segments hold each step of the final weights once, through any number
of failures.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
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
from mmref.randomness import RandomStream, draw
from mmref.run.checkpoints import latest_checkpoint
from mmref.run.directory import RunDir
from mmref.storage.parquet import read_parquet
from mmref.train import collectives

FOLDER, SEGMENT = "ledger", re.compile(r"([0-9]+)-[0-9]+\.parquet")
COUNTS = ("samples", "beyond", "fingerprint")
OLD = ("step", "position", "image_index")  # columns of segments of older versions: every sample
Ints = NDArray[np.int64]
AnyPlan = Plan | MixedPlan


def fingerprint(step: int, positions: Ints, images: Ints) -> int:
    """64 bits that tell which image stood at which position of a step. Those of all parts of a step add up, modulo 2**64."""
    return int(draw(RandomStream.LEDGER, 0, step, positions, images).sum(dtype=np.uint64).astype(np.int64))


@dataclass(frozen=True)
class Seen:
    """What is known of one step."""

    step: int
    samples: int  # positions of the plan that were seen, each counted once
    beyond: int  # samples that came more than once, or of other steps or positions
    fingerprint: int  # of those positions
    replaced: dict[int, int]  # position -> image that stood in for a broken one


class Ledger:
    """One rank's steps since the last checkpoint, brought together when the next one is due.

    Args:
        run: the run directory.
        start: the step that the run begins or resumes at; segments behind it are removed.
        positions: this rank's part of the global batch.
        device: where collectives take their tensors.
    """

    def __init__(self, run: RunDir, start: int, positions: range, device: torch.device | str = "cpu") -> None:
        self.run, self.first, self.positions, self.device = run, start, positions, device
        self._counts: list[tuple[int, int, int]] = []  # of each step since: COUNTS
        self._replaced: list[tuple[int, int, int]] = []  # step, position, image
        if collectives.rank() == 0:
            # A name that begins with a point was left by a process that was killed as it wrote.
            left = [name for name in run.list(FOLDER) if name.startswith(".")]
            for name in [*left, *(name for name, first in _segments(run).items() if first >= start)]:
                run.remove(f"{FOLDER}/{name}")

    def add(self, step: int, batch: Batch) -> None:
        """Note this rank's samples of a step, which follows the one before: step, position, image_index and bad, (n,) each."""
        positions, images = batch["position"].astype(np.int64), batch["image_index"].astype(np.int64)
        own = (batch["step"] == step) & (positions >= self.positions.start) & (positions < self.positions.stop)
        seen, at = np.unique(positions[own], return_index=True)
        self._counts.append((len(seen), len(positions) - len(seen), fingerprint(step, seen, images[own][at])))
        if (replaced := own & (batch["bad"] != "")).any():
            self._replaced += [(step, *one) for one in zip(positions[replaced].tolist(), images[replaced].tolist())]

    def images(self, step: int, plan: AnyPlan) -> list[int]:
        """Images of a step since the last segment, in the order of positions (collective)."""
        images = plan(step).images.copy()
        for _, position, image in (row for row in self._gather_replaced() if row[0] == step):
            images[position] = image
        return images.tolist()

    def write(self, end: int) -> None:
        """Write the segment that ends before step `end` (collective)."""
        own = torch.tensor(self._counts, dtype=torch.long).reshape(-1, len(COUNTS))
        counts = collectives.sum_over_ranks(own.to(self.device)).cpu().numpy()  # fingerprints modulo 2**64
        replaced = self._gather_replaced()
        if collectives.rank() == 0 and len(counts):
            of_step: dict[int, dict[int, int]] = {}
            for step, position, image in replaced:
                of_step.setdefault(step, {})[position] = image
            rows = [of_step.get(self.first + i, {}) for i in range(len(counts))]
            table = pa.table(
                {
                    "step": self.first + np.arange(len(counts)),
                    **{name: counts[:, i] for i, name in enumerate(COUNTS)},
                    "position": pa.array([list(row) for row in rows], pa.list_(pa.int64())),
                    "image_index": pa.array([list(row.values()) for row in rows], pa.list_(pa.int64())),
                }
            )
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression="zstd")
            self.run.write_bytes(f"{FOLDER}/{self.first:08d}-{end:08d}.parquet", buffer.getvalue())
        self._counts, self._replaced, self.first = [], [], end

    def _gather_replaced(self) -> list[list[int]]:
        """Step, position and image of what every rank has replaced, in order (collective)."""
        own = torch.tensor(self._replaced, dtype=torch.long).reshape(-1, 3)
        most = int(collectives.gather(torch.tensor([len(own)], device=self.device)).max())
        if not most:
            return []
        padded = torch.full((most, 3), -1)
        padded[: len(own)] = own
        rows = collectives.gather(padded.to(self.device)).cpu()
        return sorted(rows[rows[:, 0] >= 0].tolist())


def read_ledger(run: RunDir, plan: Callable[[], AnyPlan]) -> Iterator[Seen]:
    """The steps of a run's whole ledger, segment after segment. Raises LedgerError.

    plan: makes the run's plan, for segments of older versions, which name every sample.
    """
    names = _segments(run)
    if not names:
        raise LedgerError(f"{run.join(FOLDER)} holds no segment: the run has not reached its first checkpoint, or "
                          "the path is no run directory.")  # fmt: skip
    for name in names:
        try:
            table = read_parquet(io.BytesIO(run.read_bytes(f"{FOLDER}/{name}")))
            if "fingerprint" not in table.column_names:
                steps, positions, images = (table[column].to_numpy() for column in OLD)
                yield from _of_samples(steps, positions, images, plan())
                continue
            columns = [table[column].to_pylist() for column in ("step", *COUNTS, "position", "image_index")]
        except (OSError, ValueError, KeyError) as error:
            raise LedgerError(f"{run.join(FOLDER, name)} cannot be read: {error}.") from error
        for step, samples, beyond, found, positions, images in zip(*columns):
            yield Seen(step, samples, beyond, found, dict(zip(positions, images)))


def _of_samples(steps: Ints, positions: Ints, images: Ints, plan: AnyPlan) -> Iterator[Seen]:
    """Steps of a segment in which every sample has a row."""
    order = np.argsort(steps, kind="stable")
    numbers, start = np.unique(steps[order], return_index=True)
    for step, rows in zip(numbers.tolist(), np.split(order, start[1:])):
        planned = plan(step).images if step >= 0 else np.zeros(0, np.int64)
        within = (positions[rows] >= 0) & (positions[rows] < len(planned))
        seen, at = np.unique(positions[rows][within], return_index=True)
        found = images[rows][within][at]
        other = found != planned[seen]
        replaced = dict(zip(seen[other].tolist(), found[other].tolist()))
        yield Seen(step, len(seen), len(rows) - len(seen), fingerprint(step, seen, found), replaced)


@dataclass(frozen=True)
class Audit:
    """A ledger held against the plan of its run, in samples (one position of one step each)."""

    steps: int
    samples: int
    lost: int  # planned and not in the ledger
    repeated: int  # in the ledger more than once, or beyond the plan
    replaced: int  # another image than the planned one, which was broken: of the same object, or of one that stands in for it
    other: int = 0  # steps, none of whose samples was lost or repeated, with other images than the plan and `replaced` say

    @property
    def sound(self) -> bool:
        return not self.lost and not self.repeated and not self.other

    def __str__(self) -> str:
        others = f"; {self.other} steps had other images than their plan says" if self.other else ""
        return (
            f"{self.steps} steps, {self.samples} samples: {self.lost} lost, {self.repeated} repeated, "
            f"{self.replaced} replaced (broken){others}"
        )


def audit(ledger: Iterator[Seen], plan: AnyPlan, steps: int) -> Audit:
    """Compare a ledger with what steps 0 .. steps - 1 of the plan ask for."""
    batch = plan.objects_per_step * plan.images_per_object
    there: set[int] = set()
    found = beyond = replaced = other = 0
    for seen in ledger:
        if seen.step in there or not 0 <= seen.step < steps:
            beyond += seen.samples + seen.beyond
            continue
        there.add(seen.step)
        found, beyond, replaced = found + seen.samples, beyond + seen.beyond, replaced + len(seen.replaced)
        if seen.samples == batch:
            images = plan(seen.step).images.copy()
            images[list(seen.replaced)] = list(seen.replaced.values())
            other += fingerprint(seen.step, np.arange(batch), images) != seen.fingerprint
    return Audit(steps, found + beyond, steps * batch - found, beyond, replaced, other)


def audit_run(run_dir: str) -> Audit:
    """Audit of a run up to its latest checkpoint. Raises LedgerError, ShardSetError, RunDirectoryError."""
    run = RunDir(run_dir)
    latest = latest_checkpoint(run)
    if latest is None:
        raise LedgerError(f"{run.path} holds no complete checkpoint: give the run directory of `mmref train`.")
    plan = plan_of(run)
    return audit(read_ledger(run, lambda: plan), plan, latest.step)


def plan_of(run: RunDir) -> AnyPlan:
    """The plan of a run, by its config. Raises ShardSetError, RunDirectoryError."""
    config = run.read_config()
    return build_plan(config, train_index(config))


def _segments(run: RunDir) -> dict[str, int]:
    """Names of a run's segments in order, each with its first step. Files of other names beside them are somebody else's."""
    return {name: int(found[1]) for name in run.list(FOLDER) if (found := SEGMENT.fullmatch(name))}
