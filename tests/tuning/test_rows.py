"""Rows of an ablation: what the file may say, and the trainings that follow."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmref.config import Config, load_config, to_dict
from mmref.errors import ConfigError
from mmref.tuning.rows import Rows, Training, read_rows, trainings

ROOT = Path(__file__).parents[2]
TEXT = """
baseline: plain
rows:
  plain: {set: {loss.w_guide: 0.0}}
  longer: {set: {loss.w_guide: 0.0}, steps: 1.5}
  full: {}
  full, refined: {of: full, refined: true, against: full}
"""


@pytest.fixture
def base(tiny_set: Path) -> Config:
    from support.tiny_set import tiny_config

    return tiny_config(tiny_set, {})


@pytest.fixture
def rows(tmp_path: Path, base: Config):  # type: ignore[no-untyped-def]
    def read(text: str = TEXT) -> Rows:
        path = tmp_path / "rows.yaml"
        path.write_text(text)
        return read_rows(str(path), base)

    return read


def test_each_training_is_there_once_seed_by_seed(rows) -> None:  # type: ignore[no-untyped-def]
    found = trainings(rows(), [3, 5])
    assert [(t.row, t.seed) for t in found] == [(row, s) for s in (3, 5) for row in ("plain", "longer", "full")]
    noisy = rows(TEXT + "over: {data.caption_noise: [0.0, 0.5]}")
    assert len(trainings(noisy, [3, 5])) == 12
    assert len({t.folder for t in trainings(noisy, [3, 5])}) == 12


def test_configs_of_trainings(rows, base: Config) -> None:  # type: ignore[no-untyped-def]
    found = rows(TEXT + "over: {data.caption_noise: [0.0, 0.5]}")
    config = found.config(base, "longer", 0.5, 7, "there")
    assert (config.loss.w_guide, config.train.max_steps, config.train.seed) == (0.0, 30, 7)
    assert (config.data.caption_noise, config.run_dir) == (0.5, "there")
    full = found.config(base, "full, refined", 0.0, 7, "there")
    assert (full.loss.w_guide, full.train.max_steps) == (base.loss.w_guide, 20)


def test_some_rows_bring_what_they_need(rows) -> None:  # type: ignore[no-untyped-def]
    some = rows().only(["full, refined"], "--only")
    assert [row.name for row in some.rows] == ["plain", "full", "full, refined"]
    assert rows().compared_with("full", "--baseline").baseline == "full"
    with pytest.raises(ConfigError, match=r"--only: there is no row `ful`. Did you mean `full`"):
        rows().only(["ful"], "--only")


def test_folders_are_plain_names() -> None:
    assert Training("+GF, refined / x", None, 0).folder == "+GF-refined-x-seed0"
    assert Training("full", 0.2, 3).folder == "full-0.2-seed3"
    assert Training("full", -10, 3).folder == "full-minus10-seed3" != Training("full", 10, 3).folder


@pytest.mark.parametrize("text, said", [
    ("row: {}", "unknown key `row`"),
    ("baseline: a", "needs `rows`"),
    ("rows: {a: {sets: {}}}", "row `a` takes"),
    ("rows: {a: {set: {loss.w_guid: 1.0}}}", "Did you mean `loss.w_guide`"),
    ("rows: {a: {set: {train.seed: 1}}}", "set by the ablation"),
    ("rows: {a: {set: {train.workers: 2}}}", "on the command line"),
    ("rows: {a: {set: {loss.w_guide: much}}}", "w_guide"),
    ("rows: {a: {set: {data.mix: [other]}}}", r"rows.yaml: `data.mix` takes dict\[str, float\], found \['other'\]"),
    ("rows: {a: {set: {eval.refine_weights: [0.1, much]}}}", "rows.yaml: `eval.refine_weights` takes float, found 'much'"),
    ("rows: {a: {set: {loss: {tau: 0.1}}}}", "`loss` is a section: set its fields, as `loss.align`"),
    ("rows: {a: {set: {data.flip: 3.0}}}", "row `a`.*share between 0 and 1"),
    ("rows: {a: {steps: -1}}", "multiplies the length"),
    ("rows: {a: {steps: 0}}", "row `a`: `steps: 0` evaluates the weights .* random. Set `train.start_from`"),
    ("rows: {a: {of: b}}", "there is no row `b`"),
    ("rows: {a: {}, b: {of: a, set: {data.flip: 0.1}}}", "cannot `set`"),
    ("rows: {a: {}, b: {of: a}, c: {of: b}}", "no training of its own"),
    ("rows: {a: {}}\nbaseline: b", "baseline: there is no row `b`"),
    ("rows: {a: {}}\nover: {data.flip: 1}", "one field and its values"),
    ("rows: {a: {}}\nover: {eval.refine_weights: [[0.1], [0.2]]}", "takes single values"),
    ("rows: {a: {set: {data.flip: 0.1}}}\nover: {data.flip: [0.0]}", "row `a` sets `data.flip`, which `over` sets"),
    ("rows: {a: {}}\nover: {data.flop: [1.0]}", "unknown config key `data.flop`"),
    ("rows: {a b: {}, a-b: {}}", "share a folder"),
    ("rows: {a: {}}\nover: {data.flip: [0.2, 0.5, 0.2]}", "`over` has 0.2 twice"),
    ("rows: {a: {}}\nover: {1: [2]}", "takes a config field and its values, found 1"),
    ("rows: {a: {set: [train.lr, 0.1]}}", "row `a`: `set` takes fields with values"),
    ("rows: {a: {set: train.lr}}", "row `a`: `set` takes fields with values"),
    ("rows: {a: {set: {1: 2}}}", "row `a`: `set` takes fields with values"),
    ("rows: {a: {steps: .inf}}", "multiplies the length"),
    ("rows: {a: {}, b: {of: a, refined: 'no'}}", "row `b`: `refined` is true or false, found 'no'"),
    ("1: {}\nfoo: {}", "the key `1` is no text"),
])  # fmt: skip
def test_mistakes_are_named(rows, text: str, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=said):
        rows(text)


IRRA = {"IRRA objective": ("sdm", 1.0, 1.0, 0.0), "InfoNCE + IRRA's heads": ("infonce", 0.05, 0.05, 0.0)}


@pytest.mark.parametrize("name, config, w_fuse, rival", [
    ("default", "emoji", 0, "IRRA objective"), ("robustness", "emoji", 1, "InfoNCE + IRRA's heads"),
    ("emoji", "emoji", 1, "InfoNCE + IRRA's heads"), ("cub", "cub_cpu", 1, "IRRA objective"),
    ("icons", "icons", 1, "InfoNCE + IRRA's heads"),
])  # fmt: skip
def test_the_files_of_the_project(name: str, config: str, w_fuse: float, rival: str) -> None:
    base = load_config(["--config", str(ROOT / "configs" / f"{config}.yaml")])
    found = read_rows(name, base)
    plain = found.config(base, found.baseline, found.points[-1], 0, "there")
    assert (plain.loss.w_fuse, plain.loss.w_guide, plain.loss.w_rec) == (w_fuse, 0, 0)
    irra = found.config(base, rival, found.points[-1], 0, "there").loss
    assert (irra.align, irra.w_id, irra.w_mlm, irra.w_guide) == IRRA[rival]


def test_icons_have_the_recipe_of_emoji() -> None:
    """Frozen before it was trained: nothing but the set, the length that follows from it and the run's folder differs."""
    emoji, icons = (load_config(["--config", str(ROOT / "configs" / f"{name}.yaml")]) for name in ("emoji", "icons"))
    assert (icons.data.root, icons.run_dir, icons.train.max_steps) == ("shards/icons", "runs/icons", 700)
    icons.data.root, icons.run_dir, icons.train.max_steps = emoji.data.root, emoji.run_dir, emoji.train.max_steps
    assert icons == emoji
    rows = [read_rows(name, emoji) for name in ("emoji", "icons")]
    assert rows[0].rows == rows[1].rows and rows[0].baseline == rows[1].baseline


@pytest.mark.parametrize("row, align", [("RDE", "rde"), ("sigmoid alignment", "sigmoid")])
def test_other_alignments_of_wrong_captions_differ_from_the_baseline_in_the_loss_alone(row: str, align: str) -> None:
    base = load_config(["--config", str(ROOT / "configs" / "emoji.yaml")])
    found = read_rows("robustness", base)
    assert found.points == (0.0, 0.2, 0.5, 0.8)
    for point in found.points:
        plain, other = (to_dict(found.config(base, name, point, 0, "there")) for name in (found.baseline, row))
        assert other["loss"]["align"] == align and other["loss"].pop("tau") == plain["loss"].pop("tau")
        assert {**plain, "loss": None} == {**other, "loss": None}, "the same steps, batch and towers"
