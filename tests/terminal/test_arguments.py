"""What commands take for a place, a path of this machine, or a text: see mmref/terminal/arguments.py."""

import argparse
import os
import re

import pytest

from mmref.config import config_hash, dump_yaml, from_dict, load_config, to_dict, with_absolute_paths
from mmref.errors import ConfigError, PathError, TextError
from mmref.storage.locations import cache_folder, expanded
from mmref.terminal.arguments import amount, images, local_path, model, place, source, text
from mmref.terminal.parser import Parser

DUAL = ["--model.dual", "x"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return str(tmp_path / "home")


def test_places(home, tmp_path):
    assert place("~/a/../b/") == f"{home}/b" and place("b") == str(tmp_path / "b") and local_path("~") == home
    assert place("s3://bucket/~/b/") == "s3://bucket/~/b" and expanded("a/b") == "a/b"
    with pytest.raises(PathError, match="s3://bucket/b is a URL, and this must be a path of this machine"):
        local_path("s3://bucket/b")
    with pytest.raises(PathError, match=re.escape(r"caf\udce9' is no UTF-8: rename the folder")):
        local_path(os.fsdecode(b"caf\xe9"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "'' is no path"),
        (" ", "' ' is no path"),
        ("a\0b", r"'a\x00b' is no path"),
        ("~nobody-of-this-name/x", "there is no home directory of ~nobody-of-this-name here"),
        ("$HOME/x", "holds $HOME, which nothing expands"),
        ("/scratch/$USER/x", "holds $USER, which nothing expands"),
        ("/scratch/${USER}-x", "holds ${USER}, which nothing expands"),
        ("s3://", "s3:// is a URL without a place"),
        ("file:///", "file:/// is a URL without a place"),
        ("s3:/bucket/x", "is a URL with one slash: write s3://bucket/x"),
    ],
)
def test_what_would_become_a_folder_of_that_name_is_refused(home, given, message):
    with pytest.raises(PathError, match=re.escape(message)):
        place(given)


@pytest.mark.parametrize("given", ["~nobody-of-this-name", "$HOME", "s3:/a", "price$usd", "a~b", "a$", "./$HOME/x"])
def test_names_that_are_there_or_only_look_odd_are_taken(home, given):
    os.makedirs(given)
    assert place(given) == os.path.abspath(given)


def test_texts_are_utf8():
    assert text("café 🙂") == "café 🙂"
    with pytest.raises(TextError, match=re.escape(r"b'caf\xe9' is no UTF-8")):
        text(os.fsdecode(b"caf\xe9"))


def test_amounts_are_finite_and_not_below_nothing():
    assert amount("0") == 0 and amount("2.5") == 2.5
    for given in ("-1", "nan", "inf"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be a number from 0 up, found {given}"):
            amount(given)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["serve", "i", "--max-rate", "-1"], "--max-rate: must be a number from 0 up, found -1"),
        (["serve", "i", "--max-rate", "nan"], "--max-rate: must be a number from 0 up, found nan"),
        (["search", "i", "x", "--image-weight", "nan"], "--image-weight: must be from 0 to 1, found nan"),
        (["index", "p", "--model", "m", "--out", "o", "--recall", "95"], "--recall: must be from 0 to 1, found 95"),
        (["shards", "build", "table", "t", "--out", "o", "--target-mb", "inf"], "--target-mb: must be a number from 0 up"),
        (["shards", "build", "table", "t", "--out", "o", "--max-download-mb", "inf"], "--max-download-mb: must be a number"),
        (["tune", "--reduction", "nan"], "--reduction: must be a number from 0 up, found nan"),
    ],
)
def test_numbers_that_are_none_are_named(argv, words, capsys):
    from mmref.cli import main

    with pytest.raises(SystemExit):
        main(argv)
    assert words in capsys.readouterr().err


def options(parser):
    """Every action of a parser and of its subparsers."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from options(sub)


def test_every_option_that_takes_a_place_expands_it(monkeypatch):
    """Whatever a parser of ours calls a file, folder, run, set or index."""
    from mmref import cli

    parsers = []

    def caught(self, args=None, namespace=None):
        parsers.append(self)
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_known_args", caught)
    for argv in ("index", "index add", "index remove", "index info", "search", "judge", "judge export", "serve", "sizing",
                 "tune", "ablate", "shards", "evaluate", "explain", "references", "export", "ledger"):  # fmt: skip
        with pytest.raises(SystemExit):
            cli._dispatch(argv.split())
    places = {"FILE", "FILE|NAME", "DIR", "RUN", "SHARDS", "INDEX", "PNG", "MODEL", "IMAGES"}
    found = [a for p in parsers for a in options(p) if a.metavar in places or a.dest in ("path", "root")]
    assert len(found) > 50
    # The two words of `mmref search` are read when it is known whether a service is asked, which takes no INDEX.
    later = ["index", "text"]
    kinds = (place, local_path, source, expanded, model, images)
    assert [a.option_strings or a.dest for a in found if a.type not in kinds] == later[:1]
    texts = [a for p in parsers for a in options(p) if a.metavar in ("ID", "TEXT", "COLUMN=VALUE")]
    assert len(texts) > 8 and [a.option_strings or a.dest for a in texts if a.type is not text] == later[1:]


def test_paths_of_a_config(home, tmp_path):
    (tmp_path / "c.yaml").write_text('data: {root: "~/set", mix: {"~/more": 0.3}}\ntrain: {start_from: "~/run"}\n')
    os.rename(tmp_path / "c.yaml", f"{home}/c.yaml")
    os.makedirs("openai/model")
    for config_flag in (["--config=~/c.yaml"], ["--config", "~/c.yaml"]):
        config = load_config([*config_flag, "--run_dir=~/out", "--data.tokenizer", "~/tok", *DUAL])
        assert (config.run_dir, config.data.root, config.data.mix) == (
            f"{home}/out",
            f"{home}/set",
            {f"{home}/more": 0.3},
        )
        assert (config.train.start_from, config.data.tokenizer) == (f"{home}/run", f"{home}/tok")
    assert load_config(["--data.cache_dir", "~/shards", *DUAL]).data.cache_dir == "~/shards"  # of each node
    config = load_config(["--run_dir", "out", "--model.vision", "openai/model", "--model.text", "openai/clip"])
    assert (config.run_dir, config.model.vision, config.model.text) == ("out", "openai/model", "openai/clip")
    kept = with_absolute_paths(config)
    assert kept.run_dir == str(tmp_path / "out") and kept.data.root == str(tmp_path / "data_shards/emoji")
    assert kept.model.vision == str(tmp_path / "openai/model") and kept.model.text == "openai/clip"
    assert kept.data.tokenizer == kept.train.start_from == kept.model.dual == ""
    # a run that holds the folder as an older version kept it is the same run
    assert config_hash(kept) == config_hash(config)
    package = with_absolute_paths(load_config(["--model.vision", "package://torch/x", "--model.text", "package://torch/y"]))
    assert package.model.vision == "package://torch/x" and "package://torch/x" in dump_yaml(package)


def test_paths_of_a_config_that_cannot_be_meant(home):
    for flag in ("--run_dir=", "--data.root=", "--run_dir=$HOME/x", "--train.start_from=~nobody-of-this-name/x",
                 "--model.feature_cache=~nobody-of-this-name/x"):  # fmt: skip
        with pytest.raises(PathError):
            load_config([flag, *DUAL])
    values = to_dict(load_config(DUAL))
    values["data"]["mix"] = {"more": 0.2, "./more": 0.3}
    with pytest.raises(ConfigError, match="names a shard set twice"):
        with_absolute_paths(from_dict(values))


def test_rows_and_spaces_mean_the_same_in_another_directory(home, tmp_path, monkeypatch):
    from mmref.tuning.space import parse_space

    space = parse_space(
        "data.tokenizer: {type: choice, values: ['~/tok', hub/name]}\ntrain.lr: {type: choice, values: [0.1]}", "s"
    )
    kept = space.with_absolute_paths().grid()
    assert [point["data.tokenizer"] for point in kept] == [f"{home}/tok", "hub/name"] and kept[0]["train.lr"] == 0.1


def test_rows_of_an_ablation_mean_the_same_in_another_directory(home, tmp_path, monkeypatch):
    """Their trainings run in another one."""
    from mmref.tuning import ablate
    from mmref.tuning.rows import read_rows

    class Told(Exception):
        pass

    def told(configs):
        raise Told({t.row: config.data.tokenizer for t, config in configs.items()})

    (tmp_path / "tok").mkdir()
    (tmp_path / "rows.yaml").write_text(
        "rows: {a: {set: {data.tokenizer: tok}}, b: {set: {data.tokenizer: '~/tok'}}, c: {set: {data.tokenizer: hub/name}}}"
    )
    base = load_config(DUAL)
    monkeypatch.setattr(ablate, "settled", lambda config: config)  # no model is looked at
    monkeypatch.setattr(ablate, "check_inputs", lambda config: None)
    monkeypatch.setattr(ablate.ShardSet, "open", lambda root: type("Set", (), {"splits": ["train", "val", "test"]}))
    monkeypatch.setattr(ablate, "fingerprints", told)
    with pytest.raises(Told) as found:
        ablate.ablate(base, read_rows("rows.yaml", base), [0])
    assert found.value.args[0] == {"a": str(tmp_path / "tok"), "b": f"{home}/tok", "c": "hub/name"}


def test_the_cache_lies_where_a_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MMREF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert cache_folder("npm") == f"{tmp_path}/.cache/mmref/npm"
    monkeypatch.setenv("XDG_CACHE_HOME", f"{tmp_path}/x")
    assert cache_folder("npm") == f"{tmp_path}/x/mmref/npm"
    monkeypatch.setenv("MMREF_CACHE", "~/own")
    assert cache_folder("npm") == f"{tmp_path}/own/npm"
