"""A sweep without training: what fits, what it refuses, how trials are recorded, and what it leaves."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmref.cluster import connect
from mmref.config import Config, load_config
from mmref.errors import ClusterTooSmallError, ConfigError, RunDirectoryError, SweepError
from mmref.rundir import RunDir
from tune import sweep as sweep_module
from tune.results import Recorder, format_trials
from tune.space import Space, read_space
from tune.sweep import Options, concurrency, main, sweep

SPACE = """
loss.w_guide: {type: uniform, low: 0.0, high: 1.0}
refinement.weight: {type: choice, values: [0.1, 0.4]}
"""


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "my_space.yaml").write_text(SPACE)
    return read_space(str(tmp_path / "my_space.yaml"))


# --- what fits


@pytest.mark.parametrize(
    ("cpus", "workers", "readers", "cores", "trials"),
    [
        (8, 1, 1, None, 3),  # (8 - 1) / 2.1
        (8, 1, 1, 2, 2),  # a local cluster on two cores
        (8, 2, 1, 2, 1),
        (64, 4, 2, None, 5),  # (64 - 1) / 12.1
        (3.1, 1, 1, None, 1),
    ],
)
def test_trials_at_a_time(
    cpus: float, workers: int, readers: int, cores: int | None, trials: int, make_config: Callable[..., Config]
) -> None:
    config = make_config({"train.workers": workers, "data.readers": readers})
    assert concurrency({"CPU": cpus}, config, None, cores) == trials


def test_gpus_bound_the_trials(make_config: Callable[..., Config]) -> None:
    config = make_config({"train.workers": 2, "train.gpu": True})
    assert concurrency({"CPU": 100, "GPU": 7}, config, None, None) == 3
    with pytest.raises(ClusterTooSmallError, match="1 GPUs / 2 workers"):
        concurrency({"CPU": 100, "GPU": 1}, config, None, None)


def test_a_sweep_that_cannot_fit_says_so_with_the_arithmetic(make_config: Callable[..., Config]) -> None:
    with pytest.raises(
        ClusterTooSmallError, match=r"only 0.*3 CPUs - 1 for Ray Data.*1 workers x \(1 CPU \+ 1 readers"
    ):
        concurrency({"CPU": 3}, make_config(), None, None)
    with pytest.raises(ClusterTooSmallError, match="5 trials at a time do not fit, only 3"):
        concurrency({"CPU": 8}, make_config(), 5, None)


# --- what it refuses before Ray starts


def test_command_line_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean `loss\.w_guide`"):
        main(["--loss.w_gide", "1"])
    with pytest.raises(ConfigError, match="cannot be read"):
        main(["--space", str(tmp_path / "none.yaml"), "--config", "configs/smoke.yaml"])
    with pytest.raises(SystemExit):
        main(["--trials", "0"])


def test_a_directory_that_holds_a_sweep_is_left_alone(
    tmp_path: Path, space: Space, make_config: Callable[..., Config]
) -> None:
    config = make_config({"run_dir": str(tmp_path / "sweep")})
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "space.yaml").write_text("of an earlier sweep")
    with pytest.raises(RunDirectoryError, match="holds a sweep already"):
        sweep(config, space, Options(trials=1))
    with pytest.raises(ConfigError, match="--reduction"):
        sweep(config, space, Options(trials=1, reduction=1.0))


# --- how trials are recorded


def recorded(tmp_path: Path) -> Recorder:
    """Three trials of 6 steps: finished with a dip at the end, stopped at 2, and failed after the best score of all."""
    recorder = Recorder(RunDir(str(tmp_path)), ["loss.w_guide"], trials=3, max_steps=6)
    trials = [SimpleNamespace(trial_id=f"id{i}", config={"loss.w_guide": i / 4}, last_result={}) for i in range(3)]
    for t in reversed(trials):  # the number of a trial is its place in the sweep, not when it started
        recorder.on_trial_start(0, trials, t)

    def report(trial: Any, step: int, score: float, weight: float) -> None:
        found = {
            "val_refine_kind": "sparse",
            "val_refine_weight": weight,
            "val_refine_top_r": 16,
            "val_refine_tau": 0.05,
        }
        recorder.on_trial_result(0, trials, trial, {"step": step, "score": score, "val_R@1": score / 3, **found})

    for step, score in ((2, 5.0), (4, 9.0), (6, 8.0)):
        report(trials[0], step, score, 0.4)
    report(trials[1], 2, 1.0, 0.0)
    report(trials[2], 2, 20.0, 0.1)
    recorder.on_trial_complete(0, trials, trials[0])
    recorder.on_trial_complete(0, trials, trials[1])
    recorder.run.write_text("trials/id2/error.txt", "NonFiniteLossError: the loss of step 3\nmore\n")
    recorder.on_trial_error(0, trials, trials[2])
    return recorder


def test_every_trial_is_a_row_with_its_best_evaluation(tmp_path: Path) -> None:
    recorder = recorded(tmp_path)
    rows = list(csv.DictReader(io.StringIO(recorder.run.read_text("trials.csv"))))
    keys = ("trial", "status", "score", "loss.w_guide", "refinement.weight", "best_step", "steps", "error")
    assert [tuple(row[k] for k in keys) for row in rows] == [
        ("0", "finished", "9.0", "0.0", "0.4", "4", "6", ""),
        ("1", "stopped-early", "1.0", "0.25", "0.0", "2", "2", ""),
        ("2", "failed", "20.0", "0.5", "0.1", "2", "2", "NonFiniteLossError: the loss of step 3"),
    ]
    assert (rows[0]["refinement.kind"], rows[1]["refinement.kind"]) == ("sparse", ""), "none where none helped"


def test_a_failed_trial_is_never_the_best(tmp_path: Path) -> None:
    recorder = recorded(tmp_path)
    best = recorder.best()
    assert best is not None and best.number == 0 and best.best["step"] == 4
    assert [t.number for t in recorder.ranked()] == [0, 1, 2]
    table = format_trials(recorder.ranked(), ["loss.w_guide"], 6)
    assert "10 steps run, 18 had every trial run to its end (56%)" in table
    assert "sparse 0.4" in table and "trial 2: NonFiniteLossError" in table


def test_what_still_runs_at_the_end_was_interrupted(tmp_path: Path) -> None:
    recorder = Recorder(RunDir(str(tmp_path)), ["a"], trials=2, max_steps=6)
    trial = SimpleNamespace(trial_id="x", config={"a": 1})
    recorder.on_trial_start(0, [trial], trial)
    recorder.close()
    assert recorder.trials["x"].status == "interrupted" and recorder.best() is None


def test_a_lost_process_leaves_a_reason_too(tmp_path: Path) -> None:
    recorder = Recorder(RunDir(str(tmp_path)), ["a"], trials=1, max_steps=6)
    trial = SimpleNamespace(trial_id="x", config={"a": 1})
    recorder.on_trial_start(0, [trial], trial)
    recorder.on_trial_error(0, [trial], trial)
    assert "out of memory" in recorder.trials["x"].error


# --- searchers and schedulers, with trials that only report


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with connect(4, 0.2):
        yield


@pytest.fixture
def quick_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that report score = w_guide x step at steps 2, 4 .. 12 without any training."""

    def report(values: dict[str, Any], base: dict[str, Any]) -> None:
        from ray import tune

        for step in range(2, base["train"]["max_steps"] + 1, 2):
            tune.report({"step": step, "score": values["loss.w_guide"] * step, "val_refine_weight": 0.0})
            time.sleep(0.1)  # time for a decision of the scheduler

    monkeypatch.setattr(sweep_module, "run_trial", report)


@pytest.mark.usefixtures("ray_cluster", "quick_trials")
@pytest.mark.parametrize(("searcher", "scheduler"), [("optuna", "asha"), ("random", "none")])
def test_searchers_and_schedulers(
    searcher: str, scheduler: str, tmp_path: Path, space: Space, make_config: Callable[..., Config]
) -> None:
    config = make_config({"run_dir": str(tmp_path / "sweep"), "loss.w_guide": 0.9, "train.max_steps": 100})
    best = sweep(
        config, space, Options(5, searcher, scheduler, max_concurrent=1, trial_steps=12, grace_steps=2, reduction=4)
    )
    rows = list(csv.DictReader((tmp_path / "sweep" / "trials.csv").open()))
    guides = [float(row["loss.w_guide"]) for row in rows]
    assert guides[0] == 0.9, "the config's own values come first"
    assert len(set(guides)) == 5
    leader = max(rows, key=lambda row: float(row["score"]))
    assert best.loss.w_guide == float(leader["loss.w_guide"])
    for i, row in enumerate(rows):
        assert row["status"] == ("finished" if row["steps"] == "12" else "stopped-early")
        assert float(row["score"]) == pytest.approx(guides[i] * int(row["steps"]))
    if scheduler == "none":
        assert all(row["status"] == "finished" for row in rows)
    else:  # one after the other, so that whoever is below all before it at the first rung ends there
        worse = [i for i in range(1, 5) if guides[i] < min(guides[:i])]
        assert worse and all(rows[i]["steps"] == "2" for i in worse)
    loaded = load_config(["--config", str(tmp_path / "sweep" / "best.yaml")])
    assert loaded.train.max_steps == 100 and loaded.run_dir == str(tmp_path / "sweep" / "best")


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_of_failures_ends_with_the_first_reason(
    tmp_path: Path, space: Space, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(values: dict[str, Any], base: dict[str, Any]) -> None:
        raise RuntimeError("no luck")

    monkeypatch.setattr(sweep_module, "run_trial", fail)
    with pytest.raises(SweepError, match=r"no trial of .* ended with a score"):
        sweep(make_config({"run_dir": str(tmp_path / "sweep")}), space, Options(2, "random", max_concurrent=1))
    rows = list(csv.DictReader((tmp_path / "sweep" / "trials.csv").open()))
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert not (tmp_path / "sweep" / "best.yaml").exists()
