"""What a user reads last: where the report lies, and what to do next."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from support.plain_training import PlainTraining

from mmref.cli import main
from mmref.config import config_hash, from_dict, load_config, to_dict
from mmref.config.inputs import settled
from mmref.model.flops import flop_counter
from mmref.run.directory import JsonLines, RunDir
from mmref.train import trainer

ROOT = Path(__file__).parents[2]
DEMO = runpy.run_path(str(ROOT / "jobs/demo.py"))


@pytest.mark.parametrize("metrics", [{"split": "test"}, None])
def test_the_last_lines_name_the_report_and_the_next_command(tmp_path, monkeypatch, capsys, metrics):
    monkeypatch.setattr(trainer, "train", lambda config: metrics)
    assert main(["train", "--config", str(ROOT / "configs/smoke.yaml"), "--run_dir", str(tmp_path / "a run")]) == 0
    *report, following = capsys.readouterr().out.splitlines()[-2:]
    assert following.endswith(f"mmref index PHOTOS --model '{tmp_path / 'a run'}' --out INDEX")
    assert report == ([f"report: {tmp_path / 'a run'}/report.html"] if metrics else []), "none is written without an evaluation"


@pytest.mark.parametrize(
    ("words", "steps"),
    [([], 0), (["--profile"], 5), (["--profile", "2"], 2), (["--profile=2"], 2), (["--train.profile", "3"], 3)],
)
def test_profile_is_a_flag_of_its_own(tmp_path, monkeypatch, words, steps):
    given = []
    monkeypatch.setattr(trainer, "train", given.append)
    argv = ["train", *words, "--config", str(ROOT / "configs/smoke.yaml"), "--run_dir", str(tmp_path / "run")]
    assert main(argv) == 0
    assert given[0].train.profile == steps
    assert config_hash(given[0]) == config_hash(load_config(argv[-4:])), "the same run"


def test_the_demo_ends_with_the_commands_that_come_next(tmp_path, monkeypatch, capsys):
    def train(config):
        lines = JsonLines(RunDir(config.run_dir))
        for seconds in (9.0, 1.5, 1.5):
            lines.append({"step": 10, "step_seconds": seconds})
        lines.flush()
        return {"split": "test"}

    monkeypatch.setattr(trainer, "train", train)
    assert DEMO["demo"](["--run_dir", str(tmp_path / "run")]) == 0
    serve, recipe = capsys.readouterr().out.splitlines()[-2:]
    assert serve.endswith(": make serve")
    assert "20 min of training here" in recipe and recipe.endswith("/mmref train --config configs/emoji.yaml")  # 800 steps


def test_the_demo_s_training_costs_at_most_50_tflop():
    config = load_config(DEMO["DEMO"])
    values = to_dict(config)
    values["data"]["root"], values["train"]["precision"] = str(ROOT / "data_shards/emoji"), "fp32"
    values["loss"] |= {"guide_from": 0.0, "guide_full": 0.0}  # guidance costs as much once it is there
    training = PlainTraining(settled(from_dict(values)))
    with flop_counter() as counter:
        training.step(0)
    assert counter.get_total_flops() * config.train.max_steps < 50e12
