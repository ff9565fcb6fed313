"""An ablation of real trainings: Ray Train, DeepSpeed and Ray Data inside tasks that share a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmref.cluster.connection import connect
from mmref.errors import SweepError
from mmref.run.directory import RunDir, read_jsonl
from mmref.tuning.ablate import ablate
from mmref.tuning.rows import Row, Rows

PLAIN = {"loss.w_guide": 0.0, "loss.w_fuse": 0.0}
ROWS = Rows((Row("plain", PLAIN), Row("diverges", {**PLAIN, "train.lr": 1e30}), Row("full")), "plain")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rows_are_trained_at_once_and_the_same_command_goes_on(tiny_set: Path, tmp_path: Path) -> None:
    from support.tiny_set import tiny_config

    overrides = {"train.max_steps": 12, "train.log_every": 3, "train.eval_every": 6, "train.storage_gb": 0.2,
                 "train.clip_norm": 0.0, "eval.bootstrap": 50, "eval.examples": 1}  # fmt: skip
    base = tiny_config(tiny_set, overrides)
    base.run_dir = str(tmp_path / "out")
    with connect(8, 0.4):
        with pytest.raises(SweepError, match=r"1 of 3 trainings failed.*diverges.*NonFiniteLossError"):
            ablate(base, ROWS, [0], max_concurrent=2)
        found = json.loads((tmp_path / "out" / "ablation.json").read_text())
        assert [row["name"] for row in found["rows"]] == ["plain", "full"]
        assert found["rows"][1]["delta_R@1"]["ci95"] is None and found["rows"][1]["step_ratio"] > 0
        full = tmp_path / "out" / "full-seed0"
        (full / "result-test.json").unlink()
        lines = read_jsonl(RunDir(str(full)))
        ablate(base, Rows((ROWS["plain"], ROWS["full"]), "plain"), [0])
    assert (full / "result-test.json").exists()
    assert read_jsonl(RunDir(str(full))) == lines, "trained again"
