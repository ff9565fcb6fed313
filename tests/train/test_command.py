"""What a user reads last: where the report lies, and what to do next."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mmref.cli import main
from mmref.train import trainer

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("metrics", [{"split": "test"}, None])
def test_the_last_lines_name_the_report_and_the_next_command(tmp_path, monkeypatch, capsys, metrics):
    monkeypatch.setattr(trainer, "train", lambda config: metrics)
    assert main(["train", "--config", str(ROOT / "configs/smoke.yaml"), "--run_dir", str(tmp_path / "a run")]) == 0
    *report, following = capsys.readouterr().out.splitlines()[-2:]
    assert following.endswith(f"mmref index PHOTOS --model '{tmp_path / 'a run'}' --out INDEX")
    assert report == ([f"report: {tmp_path / 'a run'}/report.html"] if metrics else []), "none is written without an evaluation"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_demo_ends_with_the_command_that_searches():
    said = subprocess.run(["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    training, last = said.splitlines()[-2:]
    assert "jobs/train.py --config configs/emoji.yaml --run_dir runs/demo" in training and last.endswith(': make serve"')
