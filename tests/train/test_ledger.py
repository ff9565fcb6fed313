"""The ledger of samples seen, written, cut at a resume, and held against the plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmref.data.plan import Plan
from mmref.errors import LedgerError
from mmref.run.directory import RunDir
from mmref.train.ledger import Ledger, audit, read_ledger

PLAN = Plan(np.array([0, 2, 5, 6, 9, 11]), objects_per_step=2, images_per_object=2, seed=3)


def steps(ledger: Ledger, first: int, end: int) -> None:
    """What a run of one rank notes from step `first` to a checkpoint at `end`."""
    for step in range(first, end):
        n = len(PLAN(step).images)
        ledger.add({"step": np.full(n, step), "position": np.arange(n), "image_index": PLAN(step).images})
    ledger.write(end)


def test_an_undisturbed_run_is_sound(tmp_path: Path) -> None:
    ledger = Ledger(RunDir(str(tmp_path)), 0)
    steps(ledger, 0, 4)
    steps(ledger, 4, 7)
    seen = read_ledger(RunDir(str(tmp_path)))
    assert seen["step"].tolist() == np.repeat(np.arange(7), 4).tolist()
    found = audit(seen, PLAN, 7)
    assert found.sound and (found.samples, found.lost, found.repeated, found.replaced) == (28, 0, 0, 0)
    assert str(found).startswith("7 steps, 28 samples: 0 lost, 0 repeated")


def test_what_a_killed_process_left_does_not_stop_the_next(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    steps(Ledger(run, 0), 0, 4)
    run.write_text("ledger/.00000004-00000007.parquet-x1y2", "half")
    run.write_text("ledger/notes.txt", "not ours")
    steps(Ledger(run, 4), 4, 7)
    assert audit(read_ledger(run), PLAN, 7).sound
    assert run.list("ledger") == ["00000000-00000004.parquet", "00000004-00000007.parquet", "notes.txt"]


def test_a_resumed_run_drops_what_its_checkpoint_does_not_hold(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    ledger = Ledger(run, 0)
    steps(ledger, 0, 4)
    steps(ledger, 4, 6)  # its checkpoint was lost with the worker: the run goes on at 4, with other checkpoints
    again = Ledger(run, 4)
    steps(again, 4, 9)
    assert audit(read_ledger(run), PLAN, 9).sound


def test_lost_repeated_and_replaced_samples_are_counted(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    ledger = Ledger(run, 0)
    steps(ledger, 0, 3)
    seen = read_ledger(run)
    without = {name: np.delete(column, [1, 2]) for name, column in seen.items()}
    assert (audit(without, PLAN, 3).lost, audit(without, PLAN, 3).repeated) == (2, 0)
    twice = {name: np.append(column, column[:3]) for name, column in seen.items()}
    assert (audit(twice, PLAN, 3).lost, audit(twice, PLAN, 3).repeated) == (0, 3)
    beyond = audit(seen, PLAN, 2)
    assert (beyond.lost, beyond.repeated) == (0, 4) and not beyond.sound
    other = {**seen, "image_index": np.where(seen["step"] == 1, -1, seen["image_index"])}
    assert audit(other, PLAN, 3).replaced == 4 and audit(other, PLAN, 3).sound


def test_no_ledger_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="holds no segment"):
        read_ledger(RunDir(str(tmp_path)))
    folder = tmp_path / "ledger"
    folder.mkdir()
    (folder / "00000000-00000004.parquet").write_bytes(b"torn")
    with pytest.raises(LedgerError, match="cannot be read"):
        read_ledger(RunDir(str(tmp_path)))
