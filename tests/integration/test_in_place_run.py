"""A run on tars that were indexed in place is the run on a set that was built of the same samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.jobs import Job, losses, wait_for, write_config
from support.tiny_set import tiny_config
from support.web_tars import downloaded, write_tar

from mmref.cli import main
from mmref.data.shard_set import ShardSet
from mmref.run.checkpoints import latest_checkpoint
from mmref.run.directory import RunDir
from mmref.train.ledger import audit_run

STEPS, EVERY, TARS, IMAGES, OBJECTS = 20, 4, 20, 50, 300


def write_samples(folder: Path) -> None:
    """Tars whose objects have images in several of them, and a table of the same images as files."""
    rows = []
    for tar in range(TARS):
        samples = [downloaded(tar * IMAGES + i, sku=f"sku {(tar * IMAGES + i) * 7 % OBJECTS}") for i in range(IMAGES)]
        write_tar(folder / "tars" / f"{tar:05d}.tar", samples)
        (folder / f"{tar:05d}").mkdir()
        for sample in samples:
            name = f"{tar:05d}/{sample['__key__']}"
            (folder / name).write_bytes(sample["jpg"])
            rows.append({"image": name, "object_id": sample["json"]["sku"], "caption": sample["json"]["caption"]})
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.slow
def test_trained_on_two_workers_resumed_on_one(tmp_path: Path) -> None:
    write_samples(tmp_path)
    made = ["--tokenizer-vocab", "80", "--workers", "0"]
    assert main(["shards", "index", f"{tmp_path}/tars", "--object-id", "sku", "--out", f"{tmp_path}/found", *made]) == 0
    assert main(["shards", "build", "table", f"{tmp_path}/t.jsonl", "--out", f"{tmp_path}/built", *made]) == 0
    built, found = (ShardSet.open(str(tmp_path / name)).index("train") for name in ("built", "found"))
    assert list(built.image_ids) == list(found.image_ids) and len(set(found.shard.tolist())) == TARS

    def job(name: str, workers: int) -> Job:
        overrides: dict[str, Any] = {
            "train.workers": workers, "train.max_steps": STEPS, "train.log_every": 1, "train.eval_every": EVERY,
            "train.storage_gb": 0.2, "eval.bootstrap": 20, "eval.examples": 2,
        }  # fmt: skip
        (tmp_path / f"{name}-{workers}").mkdir()
        config = write_config(tiny_config(tmp_path / name, overrides), tmp_path / f"{name}-{workers}")
        return Job("train.py", "--config", str(config), "--run_dir", str(tmp_path / f"run-{name}"))

    status, output = job("built", 2).wait()
    assert status == 0, output
    run = RunDir(str(tmp_path / "run-found"))
    first = job("found", 2)
    wait_for(lambda: (latest := latest_checkpoint(run)) and latest.step >= EVERY, first)
    first.kill()
    status, output = job("found", 1).wait()
    assert status == 0 and "resuming at step" in output, output
    expected, resumed = losses(tmp_path / "run-built"), losses(tmp_path / "run-found")
    assert list(expected) == list(resumed) == list(range(1, STEPS + 1))
    for step, value in expected.items():
        assert resumed[step] == pytest.approx(value, rel=1e-4), step
    assert audit_run(run.path).sound
