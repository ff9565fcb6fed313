"""Numbers that are not finite behind a finite loss: the run ends by name, and no checkpoint holds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.lone_workers import SCENARIOS, outcomes

from mmref.data.shard_set import ShardSet
from mmref.run.checkpoints import list_checkpoints
from mmref.run.directory import RunDir, read_jsonl
from mmref.train.loop import CHECKED, Window


@pytest.fixture(scope="module")
def ended(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("ended")
    return folder, outcomes(folder, tiny_set)


def checkpoints(folder: Path) -> list[int]:
    return [info.step for info in list_checkpoints(RunDir(str(folder)))]


@pytest.mark.parametrize(("name", "said"), [
    *((name, "the gradient of step {} is not finite")
      for name, (what, *_) in SCENARIOS.items() if what == "gradient"),
    ("gradient of the references", "the references' gradient of step {} is not finite"),
    *((name, "the update of step {} has left weights or references that are not finite")
      for name in ("weights", "weights that are partitioned", "references")),
])  # fmt: skip
def test_the_first_step_is_named_and_nothing_is_saved_behind_it(ended, tiny_set, name: str, said: str) -> None:
    folder, errors = ended
    step = SCENARIOS[name][1]
    assert all(e.startswith("NonFiniteLossError") and said.format(step) in e for e in errors[name]), errors[name]
    assert len(set(errors[name])) == 1, "every rank says the same"
    assert checkpoints(folder / name) == [s for s in (2, 4) if s <= step]
    offenders = json.loads((folder / name / "nonfinite.json").read_text())
    known = ShardSet.open(str(tiny_set)).index("train").image_ids
    assert offenders["step"] == step and len(offenders["image_ids"]) == 8 and set(offenders["image_ids"]) <= set(known)


@pytest.mark.parametrize("name", ["nothing", "nothing at stage 3"])
def test_a_sound_run_comes_to_its_end_and_logs_the_norm_and_the_speed(ended, name: str) -> None:
    folder, errors = ended
    assert errors[name] == ["", ""] and checkpoints(folder / name) == [2, 4, 6]
    lines = [r for r in read_jsonl(RunDir(str(folder / name))) if "loss" in r]
    assert lines and all(line["grad_norm"] > 0 for line in lines)
    flops = [line["tflops_per_worker"] / line["images_per_second_per_worker"] * 1e12 for line in lines]
    assert flops == pytest.approx([flops[0]] * len(flops)) and 1e5 < flops[0] < 1e7, "a pair of tiny towers"
    assert not any("mfu" in line for line in lines), "nobody says what a CPU can do"


def test_a_window_keeps_the_first_step_of_each_kind() -> None:
    window, sound = Window(torch.device("cpu")), torch.ones(7)
    window.add(3, sound, torch.tensor(1.0), torch.tensor(0.0))
    assert window.first_bad.tolist() == [-1] * len(CHECKED)
    window.add(4, sound, float("inf"), torch.tensor(0.0))  # as DeepSpeed tells of a step that it did not take
    window.add(5, sound * torch.nan, torch.tensor(torch.nan), torch.tensor(torch.nan))
    window.add(6, sound, torch.tensor(1.0), torch.tensor(0.0))
    assert window.first_bad.tolist() == [5, 4, 5]


def test_a_gradient_whose_square_adam_cannot_keep_is_not_finite() -> None:
    window = Window(torch.device("cpu"))
    window.add(1, torch.ones(7), torch.tensor(1e18), torch.tensor(0.0))
    window.add(2, torch.ones(7), torch.tensor(1e20), torch.tensor(0.0))
    assert window.first_bad.tolist() == [-1, 2, -1]
