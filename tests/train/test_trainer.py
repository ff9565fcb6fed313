"""What a training refuses before it starts."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from support.pretrained import save_pretrained
from support.tiny_run import make_run
from support.tiny_set import tiny_config

from mmref.config import dump_yaml
from mmref.data.shard_set import ShardSet
from mmref.errors import ConfigError, DenseCodesError, ModelError, RunDirectoryError, TooFewPairsError
from mmref.evaluate import refinement
from mmref.run.directory import RunDir
from mmref.train import division, trainer
from mmref.train.trainer import check_inputs, prepare_run

NO_REFERENCES = {"loss.w_fuse": 0.0, "loss.w_guide": 0.0, "loss.w_rec": 0.0}


@pytest.mark.parametrize("held", ["manifest.json", "model.safetensors"])
def test_what_another_command_wrote_is_no_run_directory(tiny_set, tmp_path, held):
    (tmp_path / held).write_text("{}")
    (tmp_path / "config.yaml").write_text("of an export")
    with pytest.raises(RunDirectoryError, match=f"{tmp_path} is no run's: it holds {held}"):
        prepare_run(tiny_config(tiny_set, {}), RunDir(str(tmp_path)))
    assert (tmp_path / "config.yaml").read_text() == "of an export"


@pytest.mark.parametrize(
    ("changed", "refused_always"),
    [
        ({"eval.metric": "R@1"}, True),
        ({"eval.refine_weights": [1.6]}, False),
        ({"eval.refine_kinds": ["dense"]}, False),
        ({"eval.refine_top_rs": [4]}, False),
        ({"eval.refine_taus": [0.5]}, False),
        ({"eval.top_p": 10}, False),
    ],
)
def test_a_run_goes_on_only_where_its_checkpoints_scores_compare(make_config, monkeypatch, tmp_path, changed, refused_always):
    """Another refinement counts in them where training searches it."""
    run = RunDir(str(tmp_path))
    monkeypatch.setattr(trainer.checkpoints, "inspect_checkpoints", lambda run: [(SimpleNamespace(step=10), [])])
    (name,) = changed
    for searched in (True, False):
        fields = {"eval.refine_in_training": searched}
        run.write_text("config.yaml", dump_yaml(make_config(fields)))
        if searched or refused_always:
            with pytest.raises(RunDirectoryError, match=f"scored with `{name}` .*, and is to go on with "):
                prepare_run(make_config(fields | changed), run)
        prepare_run(make_config(fields), run)
        if not searched and not refused_always:
            prepare_run(make_config(fields | changed), run)


def test_too_few_pairs_to_divide_are_named_before_the_first_step(make_config, monkeypatch):
    monkeypatch.setattr(division, "LEAST", 10_000)
    check_inputs(make_config({}))
    with pytest.raises(TooFewPairsError, match="needs at least 10000"):
        check_inputs(make_config({"loss.align": "rde"}))


def test_few_objects_are_said_before_the_first_step(make_config, capsys):
    check_inputs(make_config({}))
    assert "objects are few for references" in capsys.readouterr().out
    check_inputs(make_config(NO_REFERENCES))
    assert not capsys.readouterr().out


def test_codes_that_an_evaluation_could_not_hold_are_refused_before_the_first_step(make_config, monkeypatch):
    config = make_config({"reference.per_object": 2})
    shards = ShardSet.open(config.data.root)
    largest, objects = max(len(shards.index(split)) for split in ("val", "test")), shards.index("train").n_objects
    monkeypatch.setattr(refinement, "DENSE_BYTES", 4 * largest * objects)
    check_inputs(config)
    monkeypatch.setattr(refinement, "DENSE_BYTES", 4 * largest * objects - 1)
    with pytest.raises(DenseCodesError, match=f"of {largest} images or texts over {objects} objects"):
        check_inputs(config)
    check_inputs(make_config({"reference.per_object": 2, "eval.refine_kinds": ["sparse"]}))
    check_inputs(make_config({"reference.per_object": 1}))


def test_a_start_without_references_teaches_none_either(make_config, tmp_path, monkeypatch):
    """A pretrained model brings no references, so that guidance would follow random ones as without any start; so a run that
    used none."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_run(make_config({"reference.update": "gradient", **NO_REFERENCES}), str(tmp_path / "run"), {})
    for place in (save_pretrained("clip", tmp_path / "clip"), tmp_path / "run"):
        start = {"train.start_from": str(place), "reference.update": "gradient"}
        with pytest.raises(ConfigError, match="guidance would follow random references"):
            check_inputs(make_config({**start, "loss.w_fuse": 0.0, "loss.w_rec": 0.0}))
        check_inputs(make_config({**start, "loss.w_fuse": 1.0}))


def test_a_run_goes_on_without_the_model_that_it_started_from(make_config, tmp_path, monkeypatch):
    """Its weights are in the run's own checkpoint."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    start = tmp_path / "start"
    make_run(make_config({}), str(start), {})
    config = make_config({"train.start_from": str(start), "run_dir": str(tmp_path / "run")})
    run = RunDir(config.run_dir)
    shutil.rmtree(start)
    with pytest.raises(ModelError, match=f"{start} is not there"):
        check_inputs(config)
    make_run(config, run.path, {})
    check_inputs(config)
    prepare_run(config, run)
    trainer.evaluate_before(config, run, "test")
    assert not run.exists("start")


def test_a_run_whose_checkpoints_are_all_damaged_is_no_other_config_s(make_config, tmp_path, monkeypatch):
    """They may be mended, and are then of the config that they were trained with."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = RunDir(str(tmp_path))
    config = make_config({"train.lr": 0.001})
    make_run(config, run.path, {})
    prepare_run(config, run)
    run.write_text("start/source.json", "{}")
    (folder,) = (tmp_path / "checkpoints").iterdir()
    (folder / "optimizer-0.safetensors").unlink()
    with pytest.raises(RunDirectoryError, match=r"another config: train.lr 0.001 -> 0.05"):
        prepare_run(make_config({"train.lr": 0.05}), run)
    assert run.read_config().train.lr == 0.001
    prepare_run(config, run)  # the workers say what is damaged
    assert run.exists("start"), "nor is it begun anew"
