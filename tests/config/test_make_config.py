"""A config of what a program holds is the config of the same flags and files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmref.config import load_config, make_config
from mmref.errors import ConfigError


@pytest.mark.parametrize("name", ["clip-finetune", "emoji"])
def test_a_name_is_the_preset_or_the_config_that_comes_with_mmref(name):
    flag = "--preset" if name == "clip-finetune" else "--config"
    assert make_config(name) == load_config([flag, name])


def test_values_win_as_flags_do_and_are_read_alike(tmp_path):
    flags = ["--train.lr", "1e-5", "--run_dir", str(tmp_path), "--train.gpu", "auto", "--model.vision_config.hidden_act", "relu"]
    fields = {"train.lr": 1e-5, "run_dir": Path(tmp_path), "train.gpu": "auto", "model.vision_config.hidden_act": "relu"}
    found = make_config("emoji", fields)
    assert found == load_config(["--config", "emoji", *flags])
    assert make_config("emoji", {"train.lr": "1e-5"}).train.lr == 1e-5, "as a text too"
    assert make_config(found) == found, "a config as it is"
    assert make_config(found, {"train.seed": 7}).train.seed == 7 and found.train.seed != 7


def test_sections_and_files(tmp_path):
    sections = {"model": {"dual": "openai/clip-vit-base-patch32"}, "train": {"lr": 1e-5}}
    path = tmp_path / "own.yaml"
    path.write_text("model: {dual: openai/clip-vit-base-patch32}\ntrain: {lr: 1e-5}\n")
    found = make_config(sections, {"train.max_steps": 40})
    assert found == make_config(path, {"train.max_steps": 40}) == load_config([f"--config={path}", "--train.max_steps", "40"])
    assert sections["train"] == {"lr": 1e-5}, "what was given is left as it is"


@pytest.mark.parametrize(
    ("given", "fields", "message"),
    [
        ("emoji", {"train.lrr": 1}, r"fields: unknown config key `train.lrr`. Did you mean `train.lr`\?"),
        ("emoji", {"train": {"lr": 1}}, "`train` is a section: name its fields"),
        ("emoji", {"train.lr": "fast"}, r'"train.lr"'),
        ("emoji", {"train.lr": np.float64(1)}, "is a float64, and fields hold plain values: of a NumPy number give `.item"),
        ("emoji", {"train.lr": None}, "`train.lr` has no value"),
        ("emojis", None, "emojis: there is no such file, and none of that name comes with mmref"),
        ({"trian": {}}, None, r"unknown config key `trian`. Did you mean `train`\?"),
        ({"train": 3}, None, "`train` is a section and takes keys below it, found 3"),
    ],
)
def test_what_is_wrong_is_named(given, fields, message):
    with pytest.raises(ConfigError, match=message):
        make_config(given, fields)
