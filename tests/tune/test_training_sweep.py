"""A sweep of real trainings: Ray Train, DeepSpeed and Ray Data inside Ray Tune."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from mmref.cluster import connect
from mmref.config import Config, load_config, read_yaml
from mmref.rundir import RunDir, read_jsonl
from mmref.train.checkpoint import best_checkpoint
from mmref.train.trainer import train
from tune import sweep as sweep_module
from tune.space import read_space
from tune.sweep import Options, sweep

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 60, 20
RATES = (0.003, 0.004, 1e-9, 1e30)  # two that learn, one that stands still, one that diverges
SPACE = """
train.lr: {type: loguniform, low: 1e-10, high: 1e31}
loss.w_guide: {type: uniform, low: 0.0, high: 1.0}
refinement.kind: {type: choice, values: [sparse, dense]}
refinement.weight: {type: choice, values: [0.1, 0.4]}
refinement.top_r: {type: choice, values: [16]}
refinement.tau: {type: choice, values: [0.05]}
"""


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with connect(8, 0.4):
        yield


def fixed_trials(config: Config, space: Any, options: Options, concurrent: int) -> Any:
    from ray.tune.search import BasicVariantGenerator

    points = [{"train.lr": lr, "loss.w_guide": 0.5} for lr in RATES]
    return BasicVariantGenerator(points_to_evaluate=points, max_concurrent=concurrent)


def alive() -> list[str]:
    """Processes of trainings, and the placement groups that hold resources."""
    from ray.util import placement_group_table

    kinds = ("RayTrainWorker", "TrainController", "PlacementGroupCleaner", "TaskReader", "ImplicitFunc", "run_trial")
    titles = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles.append(" ".join(process.cmdline()))
    found = [title for title in titles if any(kind in title for kind in kinds)]
    return found + [
        f"placement group {g['bundles']}" for g in placement_group_table().values() if g["state"] != "REMOVED"
    ]


def settled(seconds: float = 60) -> list[str]:
    """What is still alive once nothing is, or after some time."""
    until = time.monotonic() + seconds
    while (left := alive()) and time.monotonic() < until:
        time.sleep(1)
    return left


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_of_four_short_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "_searcher", fixed_trials)
    (tmp_path / "space.yaml").write_text(SPACE)
    flags = {
        "train.max_steps": 6, "train.eval_every": EVERY, "train.warmup_steps": 2, "train.storage_gb": 0.3, "loss.w_rec": 0,
        "data.root": ROOT / "data_shards" / "emoji", "run_dir": tmp_path / "sweep",
    }  # fmt: skip
    argv = ["--config", str(ROOT / "configs" / "smoke.yaml")]
    base = load_config([*argv, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])
    options = Options(4, max_concurrent=2, trial_steps=STEPS, grace_steps=EVERY, reduction=2)
    best = sweep(base, read_space(str(tmp_path / "space.yaml")), options)

    assert settled() == [], "stopped, failed and finished trials leave nothing behind"
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]

    rows = list(csv.DictReader((tmp_path / "sweep" / "trials.csv").open()))
    assert [float(row["train.lr"]) for row in rows] == list(RATES)
    status = [row["status"] for row in rows]
    assert status[3] == "failed" and rows[3]["error"].startswith("NonFiniteLossError"), rows[3]
    assert status[2] == "stopped-early" and int(rows[2]["steps"]) < STEPS, (
        "it stands still, others were better before it"
    )
    assert "finished" in status[:2]
    for row in rows[:3]:
        check_row(row, RunDir(str(tmp_path / "sweep" / "trials" / row["id"])))

    leader = max(rows[:3], key=lambda row: float(row["score"]))
    assert best.train.lr == float(leader["train.lr"])
    check_best_starts(tmp_path / "sweep" / "best.yaml", leader)


def check_row(row: dict[str, str], run: RunDir) -> None:
    """A row of trials.csv against what that trial's own training wrote."""
    assert float(row["train.lr"]) == read_yaml(run.join("config.yaml"))["train"]["lr"]
    scored = [r for r in read_jsonl(run) if "val_R@1" in r and r["step"] <= int(row["steps"])]
    assert [r["step"] for r in scored] == list(range(EVERY, int(row["steps"]) + 1, EVERY))
    scores = [r["val_refined_R@1"] + r["val_refined_mAP"] for r in scored]
    assert math.isclose(float(row["score"]), max(scores)), "the best over evaluations and refinements"
    at = scored[scores.index(max(scores))]
    assert row["best_step"] == str(at["step"]) and float(row["refinement.weight"]) == at["val_refine_weight"]
    for r in scored:  # no refinement always competes
        assert r["val_refined_R@1"] + r["val_refined_mAP"] >= r["val_R@1"] + r["val_mAP"] - 1e-9
        assert r["val_refine_weight"] in (0.0, 0.1, 0.4)
    if row["status"] == "finished":
        assert row["steps"] == str(STEPS)
        assert best_checkpoint(run).step == at["step"], "checkpoints are picked by the same score"


def check_best_starts(path: Path, leader: dict[str, str]) -> None:
    """best.yaml is a config of its own, and trains."""
    config = load_config(["--config", str(path), "--train.eval_every", "6"])
    assert config.train.max_steps == 6 and config.train.lr == float(leader["train.lr"])
    assert config.eval.refine_weights == [0.1, 0.4] and config.eval.refine_in_training
    assert f"trial {leader['trial']}" in path.read_text().splitlines()[0]
    assert train(config, final_evaluation=False) is None
    info = best_checkpoint(RunDir(str(path.parent / "best")))
    assert info.step == 6 and json.loads(json.dumps(info.meta))["val"]["refine_weight"] in (0.0, 0.1, 0.4)
