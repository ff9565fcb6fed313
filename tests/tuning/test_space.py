"""Search spaces: what they read, and what they refuse before anything starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmref.config import Config
from mmref.config.files import make_config
from mmref.errors import ConfigError
from mmref.tuning.space import parse_space, read_space, with_values


def space_of(tmp_path: Path, **entries: Any):  # type: ignore[no-untyped-def]
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({name.replace("__", "."): entry for name, entry in entries.items()}))
    return read_space(str(path))


def test_default_space_covers_what_a_sweep_is_for(make_config: Callable[..., Config]) -> None:
    space = read_space("default")
    names = {p.name for p in space.parameters}
    assert names >= {"reference.per_object", "reference.memory_tokens", "reference.lr", "reference.tau", "loss.tau",
                     "loss.w_fuse", "loss.w_rec", "loss.w_guide", "loss.mask_rate"}  # fmt: skip
    base = make_config()
    prepared = space.prepare(base)
    assert prepared.eval.refine_in_training and len(prepared.eval.refine_weights) > 1
    assert space.default_point(Config()) is not None, "the defaults are the first trial"
    assert not base.eval.refine_in_training, "the given config is left alone"


def test_values_take_the_type_of_their_field(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("train.lr: {type: loguniform, low: 1e-4, high: 1e-2}\n"  # strings to YAML: there is no point in them
                    "loss.w_rec: {type: choice, values: [0, 1]}\n"
                    "reference.memory_tokens: {type: int, low: 1, high: 3}\n")  # fmt: skip
    lr, rec, tokens = read_space(str(path)).parameters
    assert (lr.low, lr.high) == (1e-4, 1e-2)
    assert [type(v) for v in rec.values] == [float, float]
    assert {tokens.at(i / 60) for i in range(60)} == {1, 2, 3}, "both ends included"
    assert lr.at(0.0) == pytest.approx(1e-4) and lr.at(0.999) < 1e-2


def test_a_whole_number_is_what_a_range_of_them_holds(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("loss.w_rec: {type: int, low: 0, high: 3}\n")
    space = read_space(str(path))
    base = make_config("emoji", {"loss.w_rec": 0.3})
    assert space.outside(base) == ["loss.w_rec 0.3"] and space.default_point(base) is None
    assert space.default_point(make_config("emoji", {"loss.w_rec": 2.0})) == {"loss.w_rec": 2}
    path.write_text("reference.per_object: {type: int, low: 1, high: 1000000000000}\n")
    (large,) = read_space(str(path)).parameters
    assert large.listed() is None and large.contains(5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"loss.tau: {type: choice, values: [1]}\nloss.tau: {type: choice, values: [2]}\n", "in line 1 and in line 2"),
        (b"loss.tau: {type: choice, values: [1], values: [2]}\n", "`values` is given twice"),
        ("# Größe\nloss.tau: {}\n".encode("latin-1"), "is not UTF-8: in line 1"),
        (b"- loss.tau\n", "must hold keys and values"),
        (b"on: {type: choice, values: [1]}\n", "the key `True` is no text to YAML, but a bool: put it in quotes"),
        (b"loss.tau: {type: [uniform]}\n", "`loss.tau` needs {type: "),
    ],
)
def test_a_file_that_is_no_space_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"space\.yaml.*{message}"):
        read_space(str(path))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"loss.w_gide": {"type": "uniform", "low": 0, "high": 1}}, "Did you mean `loss.w_guide`"),
        ({"loss": {"type": "choice", "values": [1]}}, "not a single value"),
        ({"model.text_config": {"type": "choice", "values": [1]}}, "not a single value"),
        ({"train.max_steps": {"type": "choice", "values": [1]}}, "--trial-steps"),
        ({"loss.w_rec": 0.3}, "needs {type: choice"),
        ({"loss.w_rec": {"type": "normal", "low": 0, "high": 1}}, "needs {type: choice"),
        ({"loss.w_rec": {"type": "uniform", "low": 0, "hihg": 1}}, "takes high and low, found hihg, low"),
        ({"loss.w_rec": {"type": "uniform", "low": 1, "high": 0}}, "low must be below high"),
        ({"loss.w_rec": {"type": "uniform", "low": 0, "high": "much"}}, "takes float, found 'much'"),
        ({"loss.w_rec": {"type": "loguniform", "low": 0, "high": 1}}, "needs low above 0"),
        ({"loss.w_rec": {"type": "choice", "values": []}}, "needs a list of values"),
        ({"reference.per_object": {"type": "uniform", "low": 1, "high": 4}}, "whole number"),
        ({"reference.per_object": {"type": "choice", "values": [1, 2.5]}}, "takes int, found 2.5"),
        ({"reference.per_object": {"type": "choice", "values": [True]}}, "takes int, found True"),
        ({"reference.update": {"type": "uniform", "low": 0, "high": 1}}, "is no number"),
        ({"reference.update": {"type": "choice", "values": ["sometimes"]}}, "one of moving_average, gradient"),
        ({"loss.w_rec": {"type": "choice", "values": [0.1]}, "refinement.wieght": {"type": "choice", "values": [1]}},
         "Did you mean `refinement.weight`"),
        ({"refinement.weight": {"type": "choice", "values": [0.1]}}, "searches refinement alone"),
        ({"refinement.weight": {"type": "uniform", "low": 0, "high": 1}}, "is searched exactly"),
        ({"refinement.top_r": {"type": "choice", "values": [1.5]}}, "takes int, found 1.5"),
        ({"train.seed": {"type": "int", "low": 0, "high": 3}}, "seeds that no trial used"),
        ({"eval.top_p": {"type": "choice", "values": [10, 100]}}, "it is how trials are compared"),
        ({}, "is empty"),
    ],
)  # fmt: skip
def test_a_wrong_space_is_an_error_that_says_what_is_right(entries: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        space_of(tmp_path, **entries)
    assert message in str(error.value) and "space.yaml" in str(error.value)


def test_a_value_that_does_not_fit_the_config_is_found_before_the_start(
    tmp_path: Path, make_config: Callable[..., Config]
) -> None:
    space = space_of(tmp_path, reference__per_object={"type": "choice", "values": [2, 3]})
    space.prepare(make_config({"reference.per_object": 2}))
    with pytest.raises(ConfigError, match=r"reference.per_object = 3 does not fit the config.*even"):
        space.prepare(make_config({"reference.assign": "modality", "reference.per_object": 2}))


def test_the_configs_own_point_is_tried_only_where_the_space_contains_it(tmp_path: Path) -> None:
    entries = {"loss__w_guide": {"type": "uniform", "low": 0, "high": 1}}
    assert space_of(tmp_path, **entries).default_point(Config()) == {"loss.w_guide": 0.5}
    assert space_of(tmp_path, **entries, loss__w_rec={"type": "choice", "values": [0.1]}).default_point(Config()) is None


def test_auto_is_the_number_that_it_stands_for(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    config = with_values(make_config(), {"data.max_tokens": "auto"})
    assert config.data.max_tokens == "auto", "another model settles it in another way"
    space = space_of(tmp_path, data__max_tokens={"type": "choice", "values": [12, 24]})
    assert space.default_point(config) == {"data.max_tokens": 24} and space.outside(config) == []


def test_with_values_copies(make_config: Callable[..., Config]) -> None:
    base = make_config()
    changed = with_values(base, {"loss.w_rec": 0.3, "run_dir": "elsewhere"})
    assert (changed.loss.w_rec, changed.run_dir) == (0.3, "elsewhere")
    assert (base.loss.w_rec, base.run_dir) == (0.0, Config().run_dir)
    assert changed.model.text_config == base.model.text_config
    assert changed.model.text_config is not base.model.text_config


def test_every_value_and_combinations_are_tried_before_the_start(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    """Ends that fit say nothing of what lies between them, nor of two fields at once."""
    batch = space_of(tmp_path, train__global_batch={"type": "int", "low": 24, "high": 28})
    with pytest.raises(ConfigError, match=r"train.global_batch = 25 does not fit"):
        batch.prepare(make_config({"train.global_batch": 24}))
    ramp = {
        "loss__guide_from": {"type": "uniform", "low": 0.0, "high": 0.4},
        "loss__guide_full": {"type": "uniform", "low": 0.3, "high": 0.8},
    }
    with pytest.raises(ConfigError, match=r"loss.guide_from = 0.3\d*, loss.guide_full = 0.3\d* does not fit.*comes before"):
        space_of(tmp_path, **ramp).prepare(make_config({"loss.guide_from": 0.2, "loss.guide_full": 0.4}))


def test_the_refinement_s_values_stand_beside_the_config_s_own(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    space = space_of(
        tmp_path, loss__w_guide={"type": "uniform", "low": 0.0, "high": 1.0},
        refinement__weight={"type": "choice", "values": [0.3, 0.1]},
        refinement__kind={"type": "choice", "values": ["expansion", "sparse"]},
    )  # fmt: skip
    base = make_config({"eval.refine_weights": [3.2, 0.1], "eval.refine_kinds": ["sparse", "dense"]})
    prepared = space.prepare(base)
    assert prepared.eval.refine_weights == [0.1, 0.3, 3.2] and prepared.eval.refine_in_training
    assert prepared.eval.refine_kinds == ["sparse", "dense", "expansion"]
    assert prepared.eval.refine_taus == base.eval.refine_taus and not base.eval.refine_in_training


def test_a_number_or_a_word_is_one_value(tmp_path: Path) -> None:
    (lock,) = space_of(tmp_path, train__lock_image={"type": "choice", "values": [0, 6, "all"]}).parameters
    assert lock.values == (0, 6, "all")
    for entry, message in (
        ({"type": "choice", "values": ["most"]}, "`train.lock_image` takes all or int, found 'most'"),
        ({"type": "int", "low": 0, "high": 6}, "is no number: use type `choice`"),
    ):
        with pytest.raises(ConfigError, match=message):
            space_of(tmp_path, train__lock_image=entry)


def test_fine_tuning_is_searched(tmp_path: Path) -> None:
    fields = {
        "train.ema": 0.99, "train.layer_decay": 0.8, "train.lock_text": "all", "model.lora_image": 8, "model.lora_alpha": 8.0,
        "loss.align": "sigmoid", "loss.bias": -5.0,
    }  # fmt: skip
    entries = {name.replace(".", "__"): {"type": "choice", "values": [value]} for name, value in fields.items()}
    assert {p.name: p.values for p in space_of(tmp_path, **entries).parameters} == {n: (v,) for n, v in fields.items()}
    with pytest.raises(ConfigError, match=r"`train.epochs` cannot be searched"):
        space_of(tmp_path, train__epochs={"type": "choice", "values": [1.0]})


def test_relative_paths_of_a_space_mean_the_same_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    text = "train.start_from: {type: choice, values: ['', runs/a, user/model]}\nloss.w_guide: {type: uniform, low: 0, high: 1}"
    whole = parse_space(text, "space.yaml").with_absolute_paths()
    monkeypatch.chdir("/")
    again = parse_space(whole.text, "space.yaml")
    assert again.parameters == whole.parameters
    assert again.parameters[0].values == ("", str(tmp_path / "runs" / "a"), "user/model")
    plain = parse_space("loss.w_guide: {type: uniform, low: 0, high: 1}  # as it stands", "space.yaml")
    assert plain.with_absolute_paths() is plain
