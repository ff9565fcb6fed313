"""A whole run on S3: trained, killed, resumed, evaluated, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.jobs import Job, wait_for, write_config

import mmref
from mmref.run.checkpoints import latest_checkpoint
from mmref.run.directory import RunDir, read_jsonl
from mmref.train.ledger import audit_run

STEPS, EVERY = 60, 15


@pytest.mark.slow
def test_a_run_lives_on_s3(s3_bucket: str, tiny_set: Path, tmp_path: Path) -> None:
    from support.tiny_set import tiny_config

    url = f"{s3_bucket}/team/run"
    run = RunDir(url)
    overrides = {
        "train.workers": 2, "train.max_steps": STEPS, "train.log_every": 1, "train.eval_every": EVERY,
        "train.storage_gb": 0.2, "eval.bootstrap": 50, "eval.examples": 2,
    }  # fmt: skip
    config = write_config(tiny_config(tiny_set, overrides), tmp_path)
    command = ("train.py", "--config", str(config), "--run_dir", url)
    job = Job(*command)
    wait_for(lambda: (latest := latest_checkpoint(run)) and latest.step >= EVERY, job)
    job.kill()
    reached = latest_checkpoint(run).step
    assert EVERY <= reached < STEPS, "killed on the way"

    status, output = Job(*command).wait()
    assert status == 0, output
    assert f"resuming at step {reached}" in output
    assert [r["step"] for r in read_jsonl(run) if "loss" in r] == list(range(1, STEPS + 1)), "every step exactly once"
    assert sorted(r["step"] for r in read_jsonl(run) if "checkpoint_seconds" in r)[-1] == STEPS
    audit = audit_run(url)
    assert audit.sound and audit.steps == STEPS, audit
    assert {
        "checkpoints",
        "config.yaml",
        "data_fingerprint",
        "ledger",
        "metrics.json",
        "metrics.jsonl",
        "report.html",
        "tensorboard",
    } == set(run.list(""))
    assert len(run.list("tensorboard")) >= 1
    kept = [name for name in run.list("checkpoints") if name.startswith("step-")]
    assert 1 <= len(kept) <= 4, "Ray removes old ones there too (a kill may leave one behind)"

    out = tmp_path / "metrics.json"
    status, output = Job("evaluate.py", "--checkpoint", url, "--out", str(out), "--no-report").wait()
    assert status == 0, output
    assert json.loads(out.read_text())["refined"] == json.loads(run.read_text("metrics.json"))["refined"]

    from mmref.export.write import export_run

    model = mmref.load(export_run(url, str(tmp_path / "exported")))
    assert model.encode_text(["red circle 0"]).shape == (1, model.dim)
