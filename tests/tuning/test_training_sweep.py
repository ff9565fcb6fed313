"""A sweep of real trainings: Ray Train, DeepSpeed and Ray Data inside Ray Tune."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
from support.jobs import titled

from mmref.cluster.connection import connect
from mmref.config import load_config, read_yaml
from mmref.run.checkpoints import best_checkpoint, latest_checkpoint
from mmref.run.directory import RunDir, read_jsonl
from mmref.train.trainer import train
from mmref.tuning import sweep as sweep_module
from mmref.tuning.options import Options
from mmref.tuning.search import Propose
from mmref.tuning.space import read_space
from mmref.tuning.sweep import resume, sweep
from mmref.tuning.trial_log import Trial, folder

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 60, 20
KINDS = ("RayTrainWorker", "TrainController", "TaskReader", "ImplicitFunc", "run_trial")  # processes of a trial
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


def fixed_trials(*given: Any) -> Propose:
    def propose(number: int, before: list[Trial]) -> dict[str, Any]:
        return {"train.lr": RATES[number], "loss.w_guide": 0.5}

    return propose


def processes(*kinds: str) -> list[psutil.Process]:
    """Processes that this one has started, by their titles."""
    return titled(psutil.Process().children(recursive=True), *kinds)


def alive(kinds: tuple[str, ...]) -> list[str]:
    """Processes of trainings, and the placement groups that hold resources."""
    from ray.util import placement_group_table

    return [process.name() for process in processes(*kinds)] + [
        f"placement group {g['bundles']}" for g in placement_group_table().values() if g["state"] != "REMOVED"
    ]


def settled(kinds: tuple[str, ...] = (*KINDS, "PlacementGroupCleaner"), seconds: float = 60) -> list[str]:
    """What is still alive once nothing is, or after some time."""
    until = time.monotonic() + seconds
    while (left := alive(kinds)) and time.monotonic() < until:
        time.sleep(1)
    return left


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_of_four_short_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "proposer", fixed_trials)
    (tmp_path / "space.yaml").write_text(SPACE)
    flags = {
        "train.max_steps": 6, "train.eval_every": EVERY, "train.warmup_steps": 2, "train.storage_gb": 0.3, "loss.w_rec": 0,
        "data.root": ROOT / "data_shards" / "emoji", "run_dir": tmp_path / "sweep", "eval.refine_weights": "[0.4, 0.1]",
    }  # fmt: skip
    argv = ["--config", str(ROOT / "configs" / "smoke.yaml")]
    base = load_config([*argv, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])
    options = Options(4, max_concurrent=2, trial_steps=STEPS, grace_steps=EVERY, reduction=2)
    best = sweep(base, read_space(str(tmp_path / "space.yaml")), options)

    assert settled() == [], "stopped, failed and finished trials leave nothing behind"
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]

    rows = pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()
    assert [row["train.lr"] for row in rows] == list(RATES)
    status = [row["status"] for row in rows]
    assert status[3] == "failed" and rows[3]["error"].startswith("NonFiniteLossError"), rows[3]
    assert status[2] == "stopped-early" and rows[2]["steps"] < STEPS, "it stands still, others were better before it"
    assert "finished" in status[:2]
    for row in rows[:3]:
        check_row(row, RunDir(str(tmp_path / "sweep" / folder(row["trial"]))))

    leader = max(rows[:3], key=lambda row: row["score"])
    assert best.train.lr == leader["train.lr"]
    check_best_starts(tmp_path / "sweep" / "best.yaml", leader)
    assert settled(KINDS) == [], "nor does a training whose driver goes on"


def check_row(row: dict[str, Any], run: RunDir) -> None:
    """A row of trials.parquet against what that trial's own training wrote."""
    assert row["train.lr"] == read_yaml(run.join("config.yaml"))["train"]["lr"]
    scored = [r for r in read_jsonl(run) if "val_R@1" in r and r["step"] <= row["steps"]]
    assert [r["step"] for r in scored] == list(range(EVERY, row["steps"] + 1, EVERY))
    scores = [r["val_refined_mAP"] for r in scored]  # eval.metric
    assert math.isclose(row["score"], max(scores)), "the best over evaluations and refinements"
    at = scored[scores.index(max(scores))]
    assert row["best_step"] == at["step"] and row["refinement.weight"] == at["val_refine_weight"]
    for r in scored:  # no refinement always competes
        assert r["val_refined_mAP"] >= r["val_mAP"] - 1e-9
        assert r["val_refine_weight"] in (0.0, 0.1, 0.4)
    if row["status"] == "finished":
        assert row["steps"] == STEPS
        assert best_checkpoint(run).step == at["step"], "checkpoints are picked by the same score"


def check_best_starts(path: Path, leader: dict[str, Any]) -> None:
    """best.yaml is a config of its own, and trains."""
    config = load_config(["--config", str(path), "--train.eval_every", "6"])
    assert config.train.max_steps == 6 and config.train.lr == leader["train.lr"]
    assert config.eval.refine_weights == [0.1, 0.4] and config.eval.refine_in_training
    assert f"trial {leader['trial']}" in path.read_text().splitlines()[0]
    assert train(config, final_evaluation=False) is None
    info = best_checkpoint(RunDir(str(path.parent / "best")))
    assert info.step == 6 and json.loads(json.dumps(info.meta))["val"]["refine_weight"] in (0.0, 0.1, 0.4)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_the_answer_on_test_and_a_longer_sweep_that_ends_with_another_best(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from support.tiny_set import tiny_config

    monkeypatch.setattr(sweep_module, "best_of", lambda trials: trials[-1])
    (tmp_path / "space.yaml").write_text(
        "loss.w_guide: {type: uniform, low: 0.0, high: 1.0}\nrefinement.weight: {type: choice, values: [0.7]}\n"
    )
    overrides = {
        "run_dir": str(tmp_path / "sweep"), "train.max_steps": 6, "train.eval_every": 3, "train.warmup_steps": 2,
        "train.seed": 4, "train.workers": 2, "eval.bootstrap": 50, "eval.examples": 1,
    }  # fmt: skip
    config, final = tiny_config(tiny_set, overrides), tmp_path / "sweep" / "final"
    space = read_space(str(tmp_path / "space.yaml"))
    sweep(config, space, Options(2, "random", "none", max_concurrent=1, final_seeds=1))
    table = json.loads((final / "ablation.json").read_text())
    assert table["split"] == "test" and table["seeds"] == [5], "a seed that no trial used"
    assert [row["name"] for row in table["rows"]][:2] == ["default", "best, trial 1"]
    default, best = (RunDir(str(final / name)).read_config() for name in ("default-seed5", "best-trial-1-seed5"))
    assert default.eval == config.eval and default.loss == config.loss, "the config as it was given"
    asked = load_config(["--config", str(tmp_path / "sweep" / "best.yaml")])
    assert (best.loss, best.eval, best.reference) == (asked.loss, asked.eval, asked.reference)
    assert 0.7 in best.eval.refine_weights and best.eval.refine_in_training
    lines = read_jsonl(RunDir(str(final / "default-seed5")))

    resume(str(tmp_path / "sweep"), trials=3)
    table = json.loads((final / "ablation.json").read_text())
    assert [row["name"] for row in table["rows"]][:2] == ["default", "best, trial 2"]
    assert read_jsonl(RunDir(str(final / "default-seed5"))) == lines, "trained again"
    assert "best, trial 2" in (tmp_path / "sweep" / "sweep.html").read_text()
    assert settled(KINDS) == []


class Killer(threading.Thread):
    """Kills the processes of these kinds, once, as soon as a condition holds."""

    def __init__(self, condition: Callable[[], Any], *kinds: str) -> None:
        super().__init__(daemon=True)
        self.condition, self.kinds, self.killed, self.over = condition, kinds, 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.killed and not self.over.wait(0.2):
            if self.condition():
                for process in processes(*self.kinds):
                    process.kill()
                    self.killed += 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("lost", ["worker", "trial"])
def test_a_trial_goes_on_without_a_process_it_had(lost: str, tiny_set: Path, tmp_path: Path) -> None:
    from support.tiny_set import tiny_config

    (tmp_path / "space.yaml").write_text("loss.w_guide: {type: uniform, low: 0.0, high: 1.0}\n")
    overrides = {
        "run_dir": str(tmp_path / "sweep"),
        "train.max_steps": 300,
        "train.eval_every": 50,
        "train.log_every": 1,
    }
    run = RunDir(str(tmp_path / "sweep" / folder(0)))
    if lost == "worker":  # with a checkpoint to go on from
        killer = Killer(lambda: latest_checkpoint(run), "RayTrainWorker")
    else:  # the trial's own process, before Tune has heard of any evaluation
        killer = Killer(lambda: processes("RayTrainWorker"), "ImplicitFunc", "run_trial")
    try:
        space = read_space(str(tmp_path / "space.yaml"))
        sweep(tiny_config(tiny_set, overrides), space, Options(1, scheduler="none", max_concurrent=1))
    finally:
        killer.over.set()
    assert killer.killed
    (row,) = pq.read_table(tmp_path / "sweep" / "trials.parquet").to_pylist()
    assert (row["status"], row["steps"], row["error"]) == ("finished", 300, "")
    assert [r["step"] for r in read_jsonl(run) if "val_mAP" in r] == list(range(50, 301, 50))
    # but Ray's cleaner, which holds nothing, and ends where there is a dashboard to tell it when
    assert settled(KINDS) == [], "what the lost process had started is gone"
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]
