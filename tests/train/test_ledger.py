"""The ledger of samples seen, written, cut at a resume, and held against the plan."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmref.data.plan import Plan
from mmref.data.reader import Batch
from mmref.errors import LedgerError
from mmref.run.directory import RunDir
from mmref.train.ledger import Audit, Ledger, audit, read_ledger

PLAN = Plan(np.array([0, 2, 5, 6, 9, 11]), objects_per_step=2, images_per_object=2, seed=3)
N = 4


def batch(step: int, **other: Any) -> Batch:
    """What a rank that is alone has read of a step."""
    made = {"step": np.full(N, step), "position": np.arange(N), "image_index": PLAN(step).images, "bad": np.full(N, "", object)}
    return made | other


def replaced(step: int, position: int, image: int) -> Batch:
    images, bad = PLAN(step).images.copy(), np.full(N, "", object)
    images[position], bad[position] = image, "x.tar:7 is no image"
    return batch(step, image_index=images, bad=bad)


def steps(ledger: Ledger, first: int, end: int, read: Callable[[int], Batch] = batch) -> None:
    """What a run of one rank notes from step `first` to a checkpoint at `end`."""
    for step in range(first, end):
        ledger.add(step, read(step))
    ledger.write(end)


def audited(run: RunDir, end: int) -> Audit:
    return audit(read_ledger(run, lambda: PLAN), PLAN, end)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(str(tmp_path))


def test_an_undisturbed_run_is_sound(run: RunDir) -> None:
    ledger = Ledger(run, 0, range(N))
    steps(ledger, 0, 4)
    steps(ledger, 4, 7)
    seen = list(read_ledger(run, lambda: PLAN))
    assert [one.step for one in seen] == list(range(7)) and not any(one.replaced for one in seen)
    found = audited(run, 7)
    assert found.sound and (found.samples, found.lost, found.repeated, found.replaced) == (28, 0, 0, 0)
    assert str(found) == "7 steps, 28 samples: 0 lost, 0 repeated, 0 replaced (broken)"


def test_what_a_killed_process_left_does_not_stop_the_next(run: RunDir) -> None:
    steps(Ledger(run, 0, range(N)), 0, 4)
    run.write_text("ledger/.00000004-00000007.parquet-x1y2", "half")
    others = ["all.parquet", "notes.txt"]
    for name in others:
        run.write_text(f"ledger/{name}", "not ours")
    steps(Ledger(run, 4, range(N)), 4, 7)
    run.write_text("ledger/._00000000-00000004.parquet", "as a Mac leaves it beside a copy")
    assert audited(run, 7).sound
    run.remove("ledger/._00000000-00000004.parquet")
    assert run.list("ledger") == ["00000000-00000004.parquet", "00000004-00000007.parquet", *others]


def test_a_resumed_run_drops_what_its_checkpoint_does_not_hold(run: RunDir) -> None:
    ledger = Ledger(run, 0, range(N))
    steps(ledger, 0, 4)
    steps(ledger, 4, 6)  # its checkpoint was lost with the worker: the run goes on at 4, with other checkpoints
    steps(Ledger(run, 4, range(N)), 4, 9)
    assert audited(run, 9).sound


def test_lost_and_repeated_samples_are_counted(run: RunDir) -> None:
    def read(step: int) -> Batch:
        if step == 1:  # two are lost
            return {name: np.delete(column, [1, 2]) for name, column in batch(1).items()}
        if step == 2:  # three came twice
            return {name: np.append(column, column[:3]) for name, column in batch(2).items()}
        if step == 3:  # those of another step, and a position of another rank
            return batch(3) | {"step": np.array([3, 3, 2, 3]), "position": np.array([0, 1, 2, 4])}
        return batch(step)

    steps(Ledger(run, 0, range(N)), 0, 5, read)
    found = audited(run, 5)
    assert (found.samples, found.lost, found.repeated, found.other) == (4 + 2 + 7 + 4 + 4, 4, 5, 0) and not found.sound
    assert (audited(run, 4).lost, audited(run, 4).repeated) == (4, 9), "a step beyond the last checkpoint"
    run.remove("ledger/00000000-00000005.parquet")
    steps(Ledger(run, 5, range(N)), 5, 7)
    assert (audited(run, 7).lost, audited(run, 7).repeated) == (20, 0), "a segment is gone"


def test_replaced_samples_are_counted_and_named(run: RunDir) -> None:
    ledger = Ledger(run, 0, range(N))
    other = int(PLAN(1).images[2]) + 1
    for step in range(3):
        ledger.add(step, replaced(1, 2, other) if step == 1 else batch(step))
    assert ledger.images(1, PLAN) == [other if i == 2 else image for i, image in enumerate(PLAN(1).images.tolist())]
    assert ledger.images(2, PLAN) == PLAN(2).images.tolist()
    ledger.write(3)
    assert [one.replaced for one in read_ledger(run, lambda: PLAN)] == [{}, {2: other}, {}]
    found = audited(run, 3)
    assert found.sound and found.replaced == 1


def test_another_image_than_the_plan_s_that_nobody_tells_of_is_found(run: RunDir) -> None:
    """Readers say what they replaced. The fingerprint of a step tells of any other difference."""

    def read(step: int) -> Batch:
        return batch(step, image_index=PLAN(step).images[[1, 0, 2, 3]]) if step == 1 else batch(step)

    assert PLAN(1).images[0] != PLAN(1).images[1]
    steps(Ledger(run, 0, range(N)), 0, 3, read)
    found = audited(run, 3)
    assert (found.lost, found.repeated, found.other) == (0, 0, 1) and not found.sound
    assert str(found).endswith("; 1 steps had other images than their plan says")


def test_a_ledger_of_an_older_version_is_read_too(run: RunDir) -> None:
    """Its segments name every sample. A run that goes on writes the others behind them."""
    rows = {name: np.concatenate([batch(step)[name] for step in range(3)]) for name in ("step", "position", "image_index")}

    def old(**columns: np.ndarray) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.table(rows | columns), buffer, compression="zstd")
        run.write_bytes("ledger/00000000-00000003.parquet", buffer.getvalue())

    old()
    steps(Ledger(run, 3, range(N)), 3, 5)
    assert audited(run, 5).sound and audited(run, 5).samples == 20
    whole = list(read_ledger(run, lambda: PLAN))
    run.remove("ledger/00000000-00000003.parquet")
    steps(Ledger(run, 0, range(N)), 0, 3)
    steps(Ledger(run, 3, range(N)), 3, 5)
    assert list(read_ledger(run, lambda: PLAN)) == whole, "the same is known of both"
    old(image_index=np.where(rows["step"] == 1, -1, rows["image_index"]))
    assert audited(run, 5).replaced == 4 and audited(run, 5).sound
    old(position=np.where(rows["step"] == 1, 0, rows["position"]))
    assert (audited(run, 5).lost, audited(run, 5).repeated) == (3, 3)


def test_what_is_gathered_and_written_does_not_grow_with_the_batch(run: RunDir) -> None:
    """4,000 samples a step, one in a thousand of them replaced: 24 bytes of each were 96 kB a step."""
    large = Plan(np.arange(9001), objects_per_step=4000, images_per_object=1, seed=0)
    ledger = Ledger(run, 0, range(4000))
    for step in range(50):
        bad = np.full(4000, "", object)
        bad[step::1000] = "broken"
        images = np.where(bad == "", large(step).images, 0)
        ledger.add(step, {"step": np.full(4000, step), "position": np.arange(4000), "image_index": images, "bad": bad})
    ledger.write(50)
    assert run.sizes("ledger")["00000000-00000050.parquet"] < 50 * 200
    found = audit(read_ledger(run, lambda: large), large, 50)
    assert found.sound and found.replaced == 200


def test_no_ledger_is_a_named_error(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="holds no segment"):
        audited(run, 1)
    folder = tmp_path / "ledger"
    folder.mkdir()
    (folder / "00000000-00000004.parquet").write_bytes(b"torn")
    with pytest.raises(LedgerError, match="cannot be read"):
        audited(run, 1)
