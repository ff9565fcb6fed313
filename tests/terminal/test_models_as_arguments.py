"""A model on the command line: a path or a name on a hub, as an argument or an option."""

from __future__ import annotations

import argparse

import pytest

from mmref.errors import PathError
from mmref.terminal.arguments import chosen_model, model, model_argument


def test_a_name_of_a_hub_stays_and_a_path_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert model("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    assert model("hf://me/mine") == "hf://me/mine" and model("s3://bucket/run") == "s3://bucket/run"
    assert model("runs/one") == model("./runs/one") == f"{tmp_path}/runs/one", "a folder that is here comes first"
    assert model("runs/a/b") == f"{tmp_path}/runs/a/b", "no hub has names of three parts"
    with pytest.raises(PathError):
        model("")


def test_a_model_is_given_once(capsys):
    parser = argparse.ArgumentParser()
    model_argument(parser, "a model")
    assert (
        chosen_model(parser, parser.parse_args(["a/b"])) == chosen_model(parser, parser.parse_args(["--model", "a/b"])) == "a/b"
    )
    for words in ([], ["a/b", "--model", "a/b"]):
        with pytest.raises(SystemExit) as left:
            chosen_model(parser, parser.parse_args(words))
        assert left.value.code == 2 and "give one MODEL" in capsys.readouterr().err
