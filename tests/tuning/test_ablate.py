"""The command around trainings: what is done, what is not repeated, what is refused. Trainings are stood in for."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmref.cluster import connection
from mmref.config import AUTO, Config, config_hash, dump_yaml, from_dict, to_dict
from mmref.config.inputs import BEFORE, PLAIN, settled
from mmref.data.shard_set import data_fingerprint
from mmref.errors import ConfigError, RunDirectoryError, ShardSetError, SweepError
from mmref.evaluate import split_features
from mmref.evaluate.evaluation import evaluate_run
from mmref.run.directory import DATA, RunDir
from mmref.run.models import as_run
from mmref.tuning import ablate as module
from mmref.tuning.ablate import ablate, result_name
from mmref.tuning.command import ablate_main as main
from mmref.tuning.failure import reason
from mmref.tuning.reuse import Recorded
from mmref.tuning.rows import Row, Rows, Training
from mmref.tuning.space import with_values

ROWS = Rows((Row("plain", {"loss.w_guide": 0.0}), Row("full"), Row("full, refined", of="full", refined=True)), "plain")


@pytest.fixture
def base(tiny_set: Path, tmp_path: Path) -> Config:
    from support.tiny_set import tiny_config

    config = tiny_config(tiny_set, {})
    config.run_dir = str(tmp_path / "out")
    return config


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders trained, in order. A training leaves a result at once; the first of full-seed1 fails below a folder `fail`."""
    done: list[str] = []

    def fake(base: Config, planned: dict, split: str, wanted: int | None, starts: set) -> Iterator[tuple[Training, str]]:
        for training, config in planned.items():
            done.append(training.folder)
            if training.folder == "full-seed1" and done.count("full-seed1") == 1 and "fail" in base.run_dir:
                yield training, "RuntimeError: no."
                continue
            state = {"R@1": 40.0 + training.seed, "mAP": 30.0}
            metrics = {"initial": state, "refined": state, "by_caption_kind": {}, "config_hash": config_hash(config)}
            metrics |= {"machine": "one", **module.started_from(config)}
            run = RunDir(config.run_dir)
            run.write_text(result_name(split), json.dumps(metrics))
            lines = [{"step": i, "step_seconds": s} for i, s in enumerate((9.0, 1.0, 1.0))]
            run.write_text("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
            run.write_text("config.yaml", dump_yaml(config))
            yield training, ""

    monkeypatch.setattr(module, "_train", fake)
    return done


def test_the_same_command_does_only_what_is_missing(base: Config, trained: list[str]) -> None:
    table = ablate(base, ROWS, [0, 1])
    assert trained == ["plain-seed0", "full-seed0", "plain-seed1", "full-seed1"]
    assert [row["name"] for row in table] == ["plain", "full", "full, refined"] and table[0]["step_ratio"] == 1.0
    again = ablate(base, ROWS, [0, 1, 2])
    assert trained[4:] == ["plain-seed2", "full-seed2"] and again[0]["R@1"]["mean"] == pytest.approx(41)
    out = Path(base.run_dir)
    written = json.loads((out / "ablation.json").read_text())
    assert written["rows"] == again and written["seeds"] == [0, 1, 2] and written["split"] == "test"
    assert all((out / f"ablation.{kind}").stat().st_size for kind in ("md", "csv", "png"))


def test_tables_are_there_as_soon_as_a_training_is(base: Config, trained: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake, seen = module._train, []

    def watch(*args: Any) -> Iterator[tuple[Training, str]]:
        for training, failure in fake(*args):
            yield training, failure
            seen.append([row["name"] for row in json.loads(Path(base.run_dir, "ablation.json").read_text())["rows"]])

    monkeypatch.setattr(module, "_train", watch)
    ablate(base, ROWS, [0])
    assert seen == [["plain"], ["plain", "full", "full, refined"]]


@pytest.mark.parametrize("over", [False, True])
def test_each_row_is_prepared_for_its_own_model(
    over: bool, base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `mmref train` of the row's config would have it, whatever the model of the base."""
    from support.pretrained import save_pretrained

    clip, siglip = (str(save_pretrained(name, tmp_path / name)) for name in ("clip", "siglip"))
    values = to_dict(base)
    values["data"] |= dict.fromkeys({**PLAIN, **BEFORE}, AUTO)
    towers = {f"model.{name}": values["model"][name] for name in ("vision_config", "text_config")}
    no_pair = dict.fromkeys(towers)
    pair = from_dict(values)
    values["model"] |= {"vision_config": None, "text_config": None}
    of = {name: from_dict({**values, "model": {**values["model"], "dual": name}}) for name in (clip, siglip)} | {"": pair}
    seen: dict[str, Config] = {}

    def note(base: Config, planned: dict, *rest: Any) -> list:
        seen.update({config.model.dual: config for config in planned.values()})
        return []

    monkeypatch.setattr(module, "_train", note)
    monkeypatch.setattr(module, "check_inputs", lambda config: None)
    if over:
        ablate(of[clip], Rows((Row("a"),), "a", "model.dual", (clip, siglip)), [0])
    else:
        ablate(of[clip], Rows((Row("a"), Row("b", {"model.dual": siglip}), Row("c", {"model.dual": "", **towers})), "a"), [0])
        clips, seen = seen, {}
        ablate(pair, Rows((Row("a"), Row("b", {**no_pair, "model.dual": siglip})), "a"), [0])
        assert seen[""].data == settled(pair).data and seen[siglip].data == clips[siglip].data
        seen |= clips
    assert len(seen) == (2 if over else 3)
    for name, config in seen.items():
        assert config.data == settled(of[name]).data, name


def test_a_row_may_train_on_other_shards(base: Config, trained: list[str], tiny_set: Path, tmp_path: Path) -> None:
    """What came of each training is noted with the fingerprint of its own shards."""
    other = str(shutil.copytree(tiny_set, tmp_path / "other_set"))
    rows = Rows((Row("plain"), Row("more", {"data.mix": {other: 0.5}})), "plain")
    ablate(base, rows, [0])
    plain, more = json.loads(Path(base.run_dir, "ablation.json").read_text())["trainings"]
    assert plain["data"] == data_fingerprint(base) and more["data"] == f"{plain['data']} {plain['data']}"


def test_a_failure_is_told_at_the_end_and_tried_again(base: Config, trained: list[str], tmp_path: Path) -> None:
    base.run_dir = str(tmp_path / "fail")
    with pytest.raises(SweepError, match="1 of 4 trainings failed; the first, full, seed 1: RuntimeError: no"):
        ablate(base, ROWS, [0, 1])
    assert (tmp_path / "fail" / "ablation.md").exists()
    ablate(base, ROWS, [0, 1])
    assert trained.count("full-seed1") == 2 and trained.count("full-seed0") == 1


def test_the_starting_weights_are_a_row(
    base: Config, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`steps: 0`: what comes of the model that training starts from, as `mmref evaluate` scores it, and no training."""
    from support.pretrained import save_pretrained

    monkeypatch.setattr(split_features, "missing", lambda *_: ["ray"])
    clip = str(save_pretrained("clip", tmp_path / "clip"))
    config = with_values(base, {"train.start_from": clip, "run_dir": str(tmp_path / "zero")})
    config.train.gpu = False
    monkeypatch.setattr(module, "SETTINGS", {})
    monkeypatch.setattr(connection, "named_address", contextlib.nullcontext)
    module.train_and_evaluate(to_dict(config), "test", trains=False)
    metrics = RunDir(config.run_dir).read_json(result_name("test"))
    expected = evaluate_run(as_run(clip, base.data.root, str(tmp_path / "run")), report=False, workers=0)
    assert metrics["initial"] == expected["initial"] and metrics["config_hash"] == config_hash(config)
    left = {path.name for path in (tmp_path / "zero").iterdir()} - {".lock"}
    assert left == {"config.yaml", DATA, result_name("test")}
    rows = Rows((Row("zero-shot", steps=0), Row("tuned")), "zero-shot")
    base.train.start_from = clip
    ablate(base, rows, [0])
    assert trained == ["zero-shot-seed0", "tuned-seed0"]
    written = json.loads(Path(base.run_dir, "ablation.json").read_text())
    assert [entry["row"] for entry in written["trainings"]] == ["tuned"], "a training is not read in place of its start"
    other = with_values(base, {"run_dir": str(tmp_path / "other")})
    ablate(other, rows, [0], files=[str(Path(base.run_dir, "ablation.json"))])
    assert trained[2:] == ["zero-shot-seed0"]


def test_results_of_another_config_are_refused(base: Config, trained: list[str]) -> None:
    ablate(base, ROWS, [0])
    result = next(Path(base.run_dir).glob("*/result-*.json"))
    whole = result.read_text()
    for damaged, said in ((json.dumps({"refined": {}}), "another config"), ("[]", "is damaged: it holds no names and values")):
        result.write_text(damaged)
        with pytest.raises(RunDirectoryError, match=said):
            ablate(base, ROWS, [0])
    result.write_text(whole)
    base.train.lr *= 2
    with pytest.raises(RunDirectoryError, match="another config"):
        ablate(base, ROWS, [0])


def test_results_of_a_start_whose_files_changed_are_refused(base: Config, trained: list[str], tmp_path: Path) -> None:
    from support.pretrained import save_pretrained

    clip = str(save_pretrained("clip", tmp_path / "clip"))
    rows = Rows((Row("tuned"), Row("zero-shot", steps=0)), "tuned")
    base.train.start_from = clip
    for _ in range(2):
        ablate(base, rows, [0])
    assert trained == ["tuned-seed0", "zero-shot-seed0"]
    weights = next(Path(clip).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes() + b"\0")
    with pytest.raises(RunDirectoryError, match="before its files changed"):
        ablate(base, rows, [0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eval.metric", "R@1"),
        ("eval.refine_weights", [0.3]),
        ("train.eval_every", 3),
        ("eval.refine_in_training", True),
    ],
)
def test_results_that_were_chosen_otherwise_are_refused(name: str, value: Any, base: Config, trained: list[str]) -> None:
    ablate(base, ROWS, [0])
    with pytest.raises(RunDirectoryError, match=f"plain-seed0 was trained with `{name}`"):
        ablate(with_values(base, {name: value}), ROWS, [0])
    ablate(with_values(base, {"eval.workers": 2, "eval.examples": 3}), ROWS, [0])
    assert trained == ["plain-seed0", "full-seed0"]


def test_evaluations_at_the_same_steps_are_the_same_however_they_are_asked_for(
    base: Config, trained: list[str], tmp_path: Path
) -> None:
    """By default there are ten: every second of 20 steps."""
    by_default = with_values(base, {"train.eval_every": 0})
    ablate(by_default, ROWS, [0])
    ablate(with_values(base, {"train.eval_every": 2}), ROWS, [0])
    published = Path(base.run_dir, "ablation.json").rename(tmp_path / "published.json")
    found = json.loads(published.read_text())
    assert {entry["choices"]["train.eval_every"] for entry in found["trainings"]} == {2}
    for entry in found["trainings"]:
        entry["choices"]["train.eval_every"] = 0  # as earlier versions noted it
    published.write_text(json.dumps(found))
    elsewhere = {"run_dir": str(tmp_path / "elsewhere")}
    ablate(with_values(base, {**elsewhere, "train.eval_every": 2}), ROWS, [0], files=[str(published)])
    ablate(with_values(by_default, elsewhere), ROWS, [0], files=[str(published)])
    assert trained == ["plain-seed0", "full-seed0"]
    with pytest.raises(ConfigError, match=r"trained with `train.eval_every` 2, and is now asked for with 4"):
        ablate(with_values(base, {**elsewhere, "train.eval_every": 4}), ROWS, [0], files=[str(published)])


def test_one_row_again_keeps_the_others_in_the_tables(base: Config, trained: list[str]) -> None:
    rows = Rows((*ROWS.rows, Row("none", {"loss.w_fuse": 0.0})), "plain")
    ablate(base, rows, [0, 1], only=["full"])
    assert trained == ["plain-seed0", "full-seed0", "plain-seed1", "full-seed1"]
    table = ablate(base, rows, [0, 1], only=["none"])
    assert trained[4:] == ["none-seed0", "none-seed1"]
    assert [row["name"] for row in table] == ["plain", "full", "full, refined", "none"]


@pytest.mark.parametrize("recorded", [False, True])
def test_seeds_that_are_not_asked_for_stay_in_the_tables(
    recorded: bool, base: Config, trained: list[str], tmp_path: Path
) -> None:
    """Whether their folders are there, or their records alone."""
    out = Path(base.run_dir)
    before = ablate(base, ROWS, [0, 1, 2])
    written = json.loads((out / "ablation.json").read_text())
    if recorded:
        for folder in out.glob("*-seed*"):
            shutil.rmtree(folder)
    files = [str(out / "ablation.json")] if recorded else []
    assert ablate(base, ROWS, [0], files=files) == before and len(trained) == 6
    again = json.loads((out / "ablation.json").read_text())
    assert again["seeds"] == [0, 1, 2] and again["rows"] == written["rows"]
    by_training = [sorted(found["trainings"], key=lambda t: (t["row"], t["seed"])) for found in (written, again)]
    assert by_training[0] == by_training[1]
    more = ablate(base, ROWS, [4], only=["plain"], files=files)
    assert trained[6:] == ["plain-seed4"], "the other seeds are not trained, nor are other rows"
    assert [row["seeds"] for row in more] == [[0, 1, 2, 4], [0, 1, 2], [0, 1, 2]]
    assert more[1]["delta_R@1"] == before[1]["delta_R@1"], "paired over the seeds that both have"


def test_what_was_not_evaluated_is_not_reused_in_silence(
    base: Config, trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablate(base, ROWS, [0])
    published = str(Path(base.run_dir, "ablation.json").rename(tmp_path / "published.json"))
    by_class = {"eval.class_protocol": True}
    with pytest.raises(RunDirectoryError, match=r"plain-seed0 was evaluated without `eval.class_protocol`.*Remove result-test"):
        ablate(with_values(base, by_class), ROWS, [0])
    elsewhere = {"run_dir": str(tmp_path / "elsewhere")}
    with pytest.raises(ConfigError, match=r"`plain`, seed 0, was evaluated without `eval.class_protocol`"):
        ablate(with_values(base, {**by_class, **elsewhere}), ROWS, [0], files=[published])
    with pytest.raises(ConfigError, match=r"`--kind names`: no caption of test in .* is of that kind, only name, sentence"):
        ablate(base, ROWS, [0], kind="names")
    capsys.readouterr()
    ablate(with_values(base, elsewhere), ROWS, [0], kind="name", files=[published])
    assert "note: plain, seed 0: no captions of the kind `name` on record" in capsys.readouterr().out
    assert trained == ["plain-seed0", "full-seed0"]


def test_trainings_of_another_ablation_are_not_repeated(base: Config, trained: list[str], tmp_path: Path) -> None:
    before = ablate(base, ROWS, [0, 1])
    published = tmp_path / "published.json"
    Path(base.run_dir, "ablation.json").rename(published)
    base.run_dir = str(tmp_path / "elsewhere")
    # a row is known by what it trains, whatever it is called
    rows = Rows((Row("other", {"loss.w_fuse": 0.0}), Row("all"), Row("plain", {"loss.w_guide": 0.0})), "plain")
    table = ablate(base, rows, [0, 1], kind="", files=[str(published)])
    assert trained[4:] == ["other-seed0", "other-seed1"]
    for name, was in (("plain", before[0]), ("all", before[1])):
        row = next(row for row in table if row["name"] == name)
        assert row["R@1"] == was["R@1"] and row["mAP"] == was["mAP"] and row["step_ratio"] == was["step_ratio"]
    # the tables of it can be read in turn, and another config's are not taken
    again = [str(tmp_path / "elsewhere" / "ablation.json")]
    base.run_dir = str(tmp_path / "third")
    assert ablate(base, rows, [0, 1], files=again) == table and len(trained) == 6
    base.train.lr *= 2
    base.run_dir = str(tmp_path / "fourth")
    ablate(base, rows, [0], files=again)
    assert trained[6:] == ["other-seed0", "all-seed0", "plain-seed0"]


def test_recorded_trainings_that_cannot_be_compared_are_refused(base: Config, trained: list[str], tmp_path: Path) -> None:
    ablate(base, ROWS, [0])
    published = str(Path(base.run_dir, "ablation.json").rename(tmp_path / "published.json"))
    base.run_dir = str(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"`plain`, seed 0, was trained with `train.eval_every` .* asked for with 3"):
        ablate(with_values(base, {"train.eval_every": 3}), ROWS, [0], files=[published])
    with pytest.raises(ConfigError, match="has the split `test`, and `val`"):
        ablate(base, ROWS, [0], split="val", files=[published])
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(ConfigError, match=r"other.json` holds no `trainings`"):
        ablate(base, ROWS, [0], files=[str(other)])
    with pytest.raises(ConfigError, match=r"none.json`: .*No such file"):
        ablate(base, ROWS, [0], files=[str(tmp_path / "none.json")])
    assert trained == ["plain-seed0", "full-seed0"]
    shards = json.loads(Path(published).read_text())
    for entry in shards["trainings"]:
        entry["data"] = "0123456789ab"
    Path(published).write_text(json.dumps(shards))
    with pytest.raises(ConfigError, match=r"`plain`, seed 0, was trained on shards with the fingerprint 0123456789ab, .* has"):
        ablate(base, ROWS, [0], files=[published])


def test_the_entry_that_fits_is_taken_wherever_it_stands(base: Config, trained: list[str], tmp_path: Path) -> None:
    ablate(base, ROWS, [0])
    published = Path(base.run_dir, "ablation.json").rename(tmp_path / "published.json")
    files = [str(tmp_path / name) for name in ("before.json", "published.json", "after.json")]
    found = json.loads(published.read_text())
    for path, changed in ((files[0], {"data": "0123456789ab"}), (files[2], {"choices": {}})):
        entries = [entry | changed for entry in found["trainings"]]
        Path(path).write_text(json.dumps(found | {"trainings": entries}))
    base.run_dir = str(tmp_path / "elsewhere")
    ablate(base, ROWS, [0], files=files)
    assert trained == ["plain-seed0", "full-seed0"]


def test_folders_of_shards_that_were_built_anew_are_refused(base: Config, trained: list[str]) -> None:
    ablate(base, ROWS, [0])
    run = RunDir(f"{base.run_dir}/full-seed0")
    run.write_text(DATA, data_fingerprint(base))
    ablate(base, ROWS, [0])
    run.write_text(DATA, "0123456789ab")
    with pytest.raises(RunDirectoryError, match="full-seed0 was trained on shards with the fingerprint 0123456789ab"):
        ablate(base, ROWS, [0])


def test_a_training_without_what_a_row_shows_is_trained(base: Config, trained: list[str], tmp_path: Path) -> None:
    ablate(base, ROWS, [0])
    published = Path(base.run_dir, "ablation.json").rename(tmp_path / "published.json")
    found = json.loads(published.read_text())
    for entry in found["trainings"]:
        del entry["refined"]
    published.write_text(json.dumps(found))
    base.run_dir = str(tmp_path / "elsewhere")
    ablate(base, ROWS, [0], files=[str(published)])
    assert trained[2:] == ["full-seed0"], "`plain` is shown without refinement"


def test_what_can_be_known_before_is_said_before(base: Config, trained: list[str]) -> None:
    with pytest.raises(ShardSetError, match="no split `dev`"):
        ablate(base, ROWS, [0], split="dev")
    with pytest.raises(ConfigError, match="a seed twice"):
        ablate(base, ROWS, [0, 0])
    assert trained == []


def test_the_command_line(base: Config, trained: list[str], tmp_path: Path, capsys: Any) -> None:
    config, rows = tmp_path / "config.yaml", tmp_path / "rows.yaml"
    config.write_text(dump_yaml(base))
    rows.write_text("rows: {a: {}, b: {set: {loss.w_guide: 0.1}}, c: {}}")
    argv = ["--config", str(config), "--rows", str(rows), "--seeds", "4", "--run_dir", str(tmp_path / "cli")]
    assert main([*argv, "--only", "b", "--baseline", "c", "--train.max_steps", "10"]) == 0
    assert trained == ["b-seed4", "c-seed4"]
    assert "over c" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no row `d`"):
        main([*argv, "--baseline", "d"])


def test_configs_reach_the_trainings(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Config] = {}

    def note(base: Config, planned: dict, *rest: Any) -> list:
        seen.update({str(training): config for training, config in planned.items()})
        return []

    monkeypatch.setattr(module, "_train", note)
    ablate(base, ROWS, [3])
    assert seen["plain, seed 3"].loss.w_guide == 0.0 and seen["full, seed 3"].loss.w_guide == base.loss.w_guide
    assert seen["full, seed 3"].run_dir.endswith("out/full-seed3") and seen["full, seed 3"].train.seed == 3


def test_the_reason_of_a_failure_is_one_line() -> None:
    deep = RuntimeError("the actor died\n  File x\nmmref.errors.CheckpointError: another model. Use its config.\n")
    assert reason(deep) == "CheckpointError: another model. Use its config."
    assert reason(ValueError("no\nmore")) == "ValueError: no"


@pytest.mark.parametrize("trainings, said", [([{}], "no `row`"), (["a"], "no `row`"), ([{"row": "a", "seed": "0"}], "no `seed`")])
def test_a_training_that_cannot_be_read_is_named(tmp_path: Path, trainings: list[Any], said: str) -> None:
    path = tmp_path / "ablation.json"
    path.write_text(json.dumps({"split": "test", "trainings": trainings}))
    with pytest.raises(ConfigError, match=f"ablation.json`: training 0 is damaged, or of another version: {said}"):
        Recorded([str(path)], "test")
