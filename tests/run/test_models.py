"""Models that are no runs become runs without a step, and are evaluated, given references and trained on from there."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pretrained import PHOTOGRAPHS, TEXTS, own_features, save_pretrained
from support.tiny_run import make_run
from support.tiny_set import TinySource, build_tiny_set

import mmref
from mmref.config import Config, dump_yaml, from_dict
from mmref.config.inputs import settled
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.data.tokens import load_tokens
from mmref.errors import ModelError, ReferencesError, RunDirectoryError
from mmref.evaluate import evaluation, split_features
from mmref.evaluate.command import main as evaluate
from mmref.evaluate.evaluation import START_METRICS, evaluate_model, start_metrics
from mmref.export.write import export_pretrained, export_run
from mmref.model.mmref import build_model
from mmref.model.reference_rows import warm_rows
from mmref.references.bank_rows import add_objects
from mmref.references.command import main as references
from mmref.run.checkpoints import TensorFolder, best_checkpoint, fetched, load_model, load_object_ids, load_references
from mmref.run.directory import DATA, RunDir
from mmref.run.models import SOURCE, START, as_run, config_on, find_model, pretrained_config, source_of, start_of
from mmref.train import checkpoint_files, trainer
from mmref.train.bank import ReferenceBank
from mmref.train.trainer import first_weights
from mmref.tuning.space import with_values


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_pretrained("clip", tmp_path_factory.mktemp("hub") / "clip")


@pytest.fixture
def in_process(monkeypatch):
    """Evaluation in this process, as where Ray is not installed."""
    monkeypatch.setattr(split_features, "missing", lambda *_: ["ray"])


def test_what_a_place_holds(clip, tmp_path):
    export = export_pretrained(str(clip), str(tmp_path / "export"))
    run = as_run(str(clip), str(tmp_path), str(tmp_path / "run"))
    kinds = [find_model(str(place)).kind for place in (clip, export, run, "s3://bucket/run")]
    assert kinds == ["pretrained", "export", "run", "run"]
    with pytest.raises(ModelError, match="is not there: give a run directory"):
        find_model(str(tmp_path / "gone"))


@pytest.mark.parametrize("exported", [False, True])
def test_a_run_without_steps_has_the_model_s_features(exported, clip, tiny_set, tmp_path):
    source = export_pretrained(str(clip), str(tmp_path / "export")) if exported else clip
    path = as_run(str(source), str(tiny_set), str(tmp_path / "run"))
    run, config, info = evaluation.open_run(path)
    assert (info.step, config.data.root, config.data.resize) == (0, str(tiny_set), "crop")
    tokens = load_tokens(config)
    module = build_model(config, tokens.vocab_size).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    with fetched(run, info, "model", "references") as folder:
        load_model(folder, module)
        assert load_references(folder, info.meta).shape == (0, 1, module.embed_dim) and load_object_ids(folder, info.meta) == []
    encoder = split_features.Encoder(module, module, config.data, tokens, torch.device("cpu"))
    with encoder:
        assert np.abs(encoder.texts(TEXTS) - own_features(clip, PHOTOGRAPHS[:1], TEXTS)[1]).max() < 1e-4


def test_the_same_model_finds_its_run_again_and_another_one_does_not(clip, tiny_set, tmp_path):
    given = str(clip), str(tiny_set), str(tmp_path / "run")
    path = as_run(*given)
    written = (tmp_path / "run" / "config.yaml").stat().st_mtime_ns
    assert as_run(*given) == path and (tmp_path / "run" / "config.yaml").stat().st_mtime_ns == written
    other = save_pretrained("siglip", tmp_path / "siglip")
    with pytest.raises(RunDirectoryError, match=r"is a run of .*clip, and would become one of .*siglip: give another"):
        as_run(str(other), str(tiny_set), path)
    with pytest.raises(ModelError, match="is no run, which would have a shard set of its own"):
        as_run(str(clip), None, str(tmp_path / "third"))
    # What was interrupted before the last file is made anew, and a training's run is left alone.
    (tmp_path / "run" / best_checkpoint(RunDir(path)).folder / "meta.json").unlink()
    assert as_run(*given) == path and best_checkpoint(RunDir(path)).step == 0
    (tmp_path / "run" / SOURCE).unlink()
    with pytest.raises(RunDirectoryError, match="is a run of a training"):
        as_run(*given)


def changed(folder):
    """A model's weights are others from now on."""
    for file in folder.glob("*.safetensors"):
        save_file({n: t + 1 if t.is_floating_point() else t for n, t in load_file(file).items()}, file, {"format": "pt"})


def weights_of(run):
    with fetched(run, best_checkpoint(run), "model") as folder:
        return TensorFolder(folder, "model").get("backbone.visual_projection.weight")


def test_a_model_that_has_changed_becomes_a_run_anew(clip, tiny_set, tmp_path):
    """Without it the weights of before would be evaluated, explained and trained on; references are not thrown away for it."""
    export = export_pretrained(str(clip), str(tmp_path / "export"))
    given = str(export), str(tiny_set), str(tmp_path / "run")
    run = RunDir(as_run(*given))
    before, folder = weights_of(run), best_checkpoint(run).folder
    (export / "README.md").write_text("a card in other words")
    assert as_run(*given) == run.path and best_checkpoint(run).folder == folder
    changed(export)
    as_run(*given)
    torch.testing.assert_close(weights_of(run), before + 1)
    assert best_checkpoint(run).folder != folder and len(run.list("checkpoints")) == 1
    run.write_text(SOURCE, json.dumps({"model": str(export)}))  # of a version before, which kept no more
    as_run(*given)
    info = best_checkpoint(run)
    run.write_text(f"{info.folder}/meta.json", json.dumps({**info.meta, "removed": 0}))
    changed(export)
    with pytest.raises(RunDirectoryError, match=r"export have changed since .* the references that were added .*another `--run"):
        as_run(*given)
    torch.testing.assert_close(weights_of(run), before + 1)


def test_a_shard_set_that_was_moved_is_known_again(make_config, own_set, tmp_path, monkeypatch, in_process):
    """Its tokenizer lies in it: given with `--data`, the set is the run's own wherever it is, and no other set is."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = RunDir(str(tmp_path / "run"))
    make_run(make_config({}, own_set), run.path, {})
    run.write_text(DATA, f"{ShardSet.open(str(own_set)).fingerprint} neighbors:0123456789ab")
    moved = str(own_set.rename(tmp_path / "elsewhere"))
    other = build_tiny_set(tmp_path / "other", TinySource("other", first=100))
    with pytest.raises(ModelError, match=f"no tokenizer at {own_set}/tokenizer"):
        evaluate_model(run.path, str(other), report=False)
    mmref.load(export_run(run.path, str(tmp_path / "out"), moved))
    evaluate_model(run.path, moved, report=False)
    assert not run.exists("metrics-tiny.json"), "it is the run's own set"
    run.remove(DATA)  # of an older version
    assert config_on(run, moved).data.root == moved


def test_a_run_of_an_export_can_be_moved(make_config, tiny_set, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_run(make_config(), str(tmp_path / "run"), {})
    path = as_run(str(export_run(str(tmp_path / "run"), str(tmp_path / "export"))), str(tiny_set), str(tmp_path / "of-export"))
    moved = RunDir(str(Path(path).rename(tmp_path / "elsewhere")))
    assert load_tokens(moved.read_config()).vocab_size == load_tokens(make_config()).vocab_size
    assert config_on(moved, str(tmp_path)).data.root == str(tiny_set), "its model was not trained on its set"


def test_another_start_than_that_of_an_attempt_before(make_config, clip, tmp_path):
    """An attempt that ended before its first checkpoint leaves its start, and what that achieves, to the same start alone."""
    export = export_pretrained(str(clip), str(tmp_path / "export"))
    other = RunDir(as_run(str(clip), make_config().data.root, str(tmp_path / "other")))
    run = RunDir(str(tmp_path / "run"))
    configs = [make_config({"train.start_from": str(place)}) for place in (export, other.path, export)]
    trainer.prepare_run(configs[0], run)
    run.write_text(START_METRICS, json.dumps(source_of(str(export))))
    trainer.prepare_run(configs[0], run)
    assert run.exists(START_METRICS) and start_of(configs[0], run).path == run.join(START)
    before = weights_of(start_of(configs[0], run))
    trainer.prepare_run(configs[1], run)
    assert not run.exists(START_METRICS) and start_of(configs[1], run).path == other.path
    run.write_text(START_METRICS, json.dumps(source_of(other.path)))
    trainer.prepare_run(configs[2], run)
    assert not run.exists(START_METRICS)
    run.write_text(START_METRICS, json.dumps(source_of(str(export))))
    changed(export)
    trainer.prepare_run(configs[2], run)
    assert not run.exists(START_METRICS)
    torch.testing.assert_close(weights_of(start_of(configs[2], run)), before + 1)
    trainer.prepare_run(make_config(), run)
    assert not run.exists(START)


def test_zero_shot_is_scored_by_the_model_s_own_features(clip, tiny_set, tmp_path, in_process, capsys):
    """`mmref evaluate --model FOLDER --data SHARDS`: metrics of features that transformers gives too, and a report."""
    assert evaluate(["--model", str(clip), "--data", str(tiny_set), "--run_dir", str(tmp_path / "run")]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    index = ShardSet.open(str(tiny_set)).index("test")
    reader = SampleReader(index)
    samples = [reader.read(i) for i in range(len(index))]
    captions = [(c["text"] if isinstance(c, dict) else c, i) for i, s in enumerate(samples) for c in s.meta["captions"]]
    image, text = own_features(clip, [s.image_bytes for s in samples], [c for c, _ in captions])
    hits = [
        index.object_row[int(np.argmax(t @ image.T))] == index.object_row[i] for t, (_, i) in zip(text, captions, strict=True)
    ]
    assert metrics["initial"]["R@1"] == pytest.approx(100 * np.mean(hits))
    assert metrics["refined"] == metrics["initial"] and metrics["checkpoint_step"] == 0
    assert "R@1" in capsys.readouterr().out and (tmp_path / "run" / "report.html").stat().st_size > 1000
    # What has been evaluated can be exported and loaded, as any run.
    model = mmref.load(tmp_path / "run")
    assert np.abs(model.encode_text(TEXTS) - own_features(clip, PHOTOGRAPHS[:1], TEXTS)[1]).max() < 1e-4


def test_references_of_a_pretrained_model_are_means_and_refine(clip, tiny_set, tmp_path, in_process, capsys):
    """`mmref references add --model FOLDER --data SHARDS`."""
    assert references(["add", "--model", str(clip), "--data", str(tiny_set), "--run_dir", str(tmp_path / "run")]) == 0
    run = RunDir(str(tmp_path / "run"))
    info = best_checkpoint(run)
    with fetched(run, info, "references") as folder:
        rows, ids = load_references(folder, info.meta).numpy(), load_object_ids(folder, info.meta)
    shards = ShardSet.open(str(tiny_set))
    assert ids == list(shards.index("train").object_ids) and "14 objects added" in capsys.readouterr().out
    index = shards.index("train")
    reader = SampleReader(index)
    samples = [reader.read(i) for i in np.flatnonzero(np.asarray(index.object_row) == 3)]
    texts = [c["text"] if isinstance(c, dict) else c for s in samples for c in s.meta["captions"]]
    image, text = own_features(clip, [s.image_bytes for s in samples], texts)
    assert np.abs(rows[3, 0] - (image.mean(0) + text.mean(0)) / 2).max() < 1e-4
    evaluate(["--model", str(clip), "--data", str(tiny_set), "--run_dir", run.path, "--no-report"])
    metrics = run.read_json("metrics.json")
    assert len(metrics["refinement"]["tried"]) > 10 and metrics["refinement"]["chosen_on"] == "val"


def test_several_references_of_an_object_without_training(clip, tiny_set, tmp_path, in_process, capsys):
    """`mmref references add --per-object K`, also of a model that has been evaluated before."""
    place = ["--model", str(clip), "--data", str(tiny_set), "--run_dir", str(tmp_path / "run")]
    assert evaluate([*place, "--no-report"]) == 0
    with pytest.raises(
        ReferencesError, match=r"1000 references for each object: .* make more than (\d+). Give at most that"
    ) as e:
        references(["add", *place, "--per-object", "1000"])
    most = int(str(e.value).split("more than ")[1].split(".")[0])
    run = RunDir(str(tmp_path / "run"))
    assert run.read_config().reference.per_object == 1 and best_checkpoint(run).meta["bank"]["objects"] == 0
    assert references(["add", *place, "--per-object", "3"]) == 0
    info = best_checkpoint(run)
    assert run.read_config().reference.per_object == info.meta["bank"]["per_object"] == 3 < most
    with fetched(run, info, "references") as folder:
        rows, ids = load_references(folder, info.meta), load_object_ids(folder, info.meta)
    index = ShardSet.open(str(tiny_set)).index("train")
    assert ids == list(index.object_ids) and len(set(run.list(info.folder))) == len(info.meta["files"]) + 1
    reader = SampleReader(index)
    samples = [reader.read(i) for i in np.flatnonzero(np.asarray(index.object_row) == 3)]
    texts = [c["text"] if isinstance(c, dict) else c for s in samples for c in s.meta["captions"]]
    image, text = map(torch.from_numpy, own_features(clip, [s.image_bytes for s in samples], texts))
    torch.testing.assert_close(rows[3], warm_rows(image, text, 3, "nearest"), atol=1e-4, rtol=0)
    with pytest.raises(ReferencesError, match=r"2 references for each object: the 14 objects of .* have 3, and all must"):
        references(["add", *place, "--per-object", "2"])
    assert evaluate([*place, "--no-report"]) == 0
    assert len(run.read_json("metrics.json")["refinement"]["tried"]) > 10
    with pytest.raises(SystemExit, match="2"):
        references(["add", *place, "--per-object", "0"])
    assert "must be at least 1, found 0" in capsys.readouterr().err


def test_images_and_captions_share_references_evenly(clip, tiny_set, tmp_path, in_process):
    run = RunDir(as_run(str(clip), str(tiny_set), str(tmp_path / "run")))
    config = run.read_config()
    config.reference.assign, config.reference.per_object = "modality", 2
    run.write_text("config.yaml", dump_yaml(config))
    with pytest.raises(ReferencesError, match=r"`reference.assign: modality`, one half of them of images .* Give an even"):
        add_objects(run.path, str(tiny_set), per_object=3)
    assert add_objects(run.path, str(tiny_set), per_object=2).objects == 14


def test_training_begins_with_the_weights_of_a_pretrained_model(clip, tiny_set, tmp_path):
    """`train.start_from` of what is no run: the driver leaves it in the run directory, where each worker finds it."""
    given = json.loads((clip / "config.json").read_text())
    towers = {k: v for k, v in given.items() if k not in ("architectures", "dtype", "transformers_version")}
    data, run = {"root": str(tiny_set), "tokenizer": str(clip)}, RunDir(str(tmp_path / "run"))
    values = {"model": {"dual_config": towers}, "data": data, "train": {"start_from": str(clip), "seed": 3}}
    values["reference"] = {"per_object": 2}  # which the model, that has none, does not contradict
    config = settled(from_dict(values))
    first_weights(config, run)
    vocabulary = load_tokens(config).vocab_size
    model, pretrained = build_model(config, vocabulary), build_model(pretrained_config(str(clip)), vocabulary)
    wanted = dict(pretrained.named_parameters())
    assert any(not torch.equal(p, wanted[name]) for name, p in model.named_parameters())
    engine = SimpleNamespace(module=model, optimizer=torch.optim.AdamW(model.parameters()))
    checkpoint_files.start_from(start_of(config, run), engine, ReferenceBank(14, model.embed_dim, config.reference, 0))
    for name, parameter in model.named_parameters():
        if name != "log_scale":  # the temperature is the config's
            torch.testing.assert_close(parameter, wanted[name])


@pytest.mark.parametrize("field", ["train.start_from", "model.dual"])
def test_what_a_fine_tuning_starts_from_is_evaluated(clip, tiny_set, tmp_path, monkeypatch, in_process, capsys, field):
    """Once, before its first step; and it stands in the metrics of the run."""
    values = {"data.root": str(tiny_set), "model.dual": str(clip), field: str(clip), "eval.bootstrap": 20}
    config, run = settled(with_values(Config(), values)), RunDir(str(tmp_path / "run"))
    first_weights(config, run)
    trainer.evaluate_before(config, run, "test")
    assert run.exists(START) == (field == "train.start_from"), "what training begins with stays, what was made here goes"
    alone = evaluate_model(str(clip), str(tiny_set), report=False, run_dir=str(tmp_path / "zero"))
    start = start_metrics(run, "test")
    assert start["initial"] == start["refined"] == alone["initial"] and start["model"] == str(clip)
    assert start_metrics(run, "val") is None
    assert f"before training: R@1 {alone['initial']['R@1']:.1f}, " in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "evaluate_start", None)
    trainer.evaluate_before(config, run, "test")  # known already


def test_a_training_of_random_weights_has_nothing_before_it(make_config, tmp_path):
    trainer.evaluate_before(make_config(), RunDir(str(tmp_path / "run")), "test")
    assert not (tmp_path / "run" / START_METRICS).exists()
