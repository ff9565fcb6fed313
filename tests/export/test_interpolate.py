"""Exports of fine-tuned weights mixed with those of the start: the share that val chooses, and scores of that very mixture."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_run import make_run
from support.tiny_set import BERT, VIT
from transformers import AutoConfig, AutoModel

import mmref
from mmref.cli import main
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.data.tokens import load_tokens
from mmref.errors import ExportError
from mmref.evaluate.features import read_queries
from mmref.evaluate.metrics import evaluate_features, summarize
from mmref.export import interpolate as mixing
from mmref.export.write import export_run
from mmref.model.mmref import build_model


@pytest.fixture(autouse=True)
def cpu_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def pretrained(make_config, tmp_path):
    """A config whose towers are read from directories."""
    torch.manual_seed(1)
    for name, values in (("vit", VIT), ("bert", BERT)):
        AutoModel.from_config(AutoConfig.for_model(**values)).save_pretrained(tmp_path / name)
    tokenizer = ShardSet.open(make_config().data.root).root + "/tokenizer"
    return {
        "model.vision_config": None, "model.text_config": None, "model.vision": str(tmp_path / "vit"),
        "model.text": str(tmp_path / "bert"), "data.tokenizer": tokenizer, "eval.bootstrap": 20,
    }  # fmt: skip


def scores(folder, config, split):
    """Metrics of an exported model on a split, before refinement, from pixels on."""
    model, index = mmref.load(folder), ShardSet.open(config.data.root).index(split)
    reader = SampleReader(index)
    pixels, _ = mixing.read_pixels(reader, range(len(index)), config.data)
    queries = read_queries(index)
    text, image = model.encode_text(queries.texts), model.encode_images(list(pixels))
    objects = np.asarray(index.object_row).astype(np.int64)
    return summarize(evaluate_features(text[queries.text], image, queries.objects, objects))


def test_the_best_share_on_val_is_exported_with_scores_of_its_own(make_config, pretrained, tmp_path, monkeypatch, capsys):
    config = make_config(pretrained)
    tuned = make_run(config, str(tmp_path / "run"), {})
    begun = dict(build_model(config, load_tokens(config).vocab_size).named_parameters())
    reached = {}
    for share in (0.0, 0.3, 1.0):
        monkeypatch.setattr(mixing, "SHARES", (share,))
        folder = export_run(str(tmp_path / "run"), str(tmp_path / f"out{share}"), interpolated=True)
        weights, card = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        for name, p in tuned.named_parameters():
            new = "_projection" in name or not name.startswith("backbone.")
            expected = p if new else (1 - share) * begun[name] + share * p
            torch.testing.assert_close(weights[name], expected, atol=1e-6, rtol=1e-5, msg=name)
        reached[share] = scores(folder, config, "val")
        assert card["val"] == pytest.approx(reached[share], abs=1e-3)
        assert card["test"]["initial"] == pytest.approx(scores(folder, config, "test"), abs=1e-3)
    assert len({round(found["mAP"], 3) for found in reached.values()}) > 1, "the mixtures differ"
    monkeypatch.setattr(mixing, "SHARES", tuple(reached))
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "best"), "--interpolate"]) == 0
    card = json.loads((tmp_path / "best" / "config.json").read_text())
    best = max(reached, key=lambda share: (reached[share]["mAP"], share))
    assert card["interpolation"]["share"] == best and [row["share"] for row in card["interpolation"]["tried"]] == list(reached)
    assert f"{best:.0%} those of the fine-tuned model" in (tmp_path / "best" / "README.md").read_text()


def test_a_run_from_another_run_is_mixed_with_that_one(make_config, tmp_path, monkeypatch):
    first = make_run(make_config({"loss.w_rec": 0.2}), str(tmp_path / "first"), {})
    config = make_config({"train.start_from": str(tmp_path / "first"), "train.seed": 3, "eval.bootstrap": 20})
    second = dict(make_run(config, str(tmp_path / "second"), {}).named_parameters())
    monkeypatch.setattr(mixing, "SHARES", (0.5,))
    weights = load_file(export_run(str(tmp_path / "second"), str(tmp_path / "out"), interpolated=True) / "model.safetensors")
    for name, p in first.named_parameters():
        if name.startswith("backbone."):
            torch.testing.assert_close(weights[name], (p + second[name]) / 2, atol=1e-6, rtol=1e-5, msg=name)


RESNET = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


def test_statistics_of_batch_norm_are_mixed_from_every_kind_of_start(make_config, pretrained, tmp_path):
    """They are those of the weights beside them: at a share of 0 the tower is the start's."""
    net = AutoModel.from_config(AutoConfig.for_model(**RESNET))
    for name, buffer in net.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2.0)
    net.save_pretrained(tmp_path / "resnet")
    config = make_config(pretrained | {"model.vision": str(tmp_path / "resnet"), "model.vision_config": None})
    tokens = load_tokens(config)
    make_run(config, str(tmp_path / "run"), {})
    export_run(str(tmp_path / "run"), str(tmp_path / "export"))
    for start in ("", "run", "export"):
        given = dataclasses.replace(config.train, start_from=start and str(tmp_path / start))
        tuned = build_model(config, tokens.vocab_size)
        statistics = {name: x for name, x in tuned.state_dict().items() if "running" in name}
        begun = {name: x.clone() for name, x in statistics.items()}
        for x in statistics.values():
            x.add_(1.0)
        found = mixing.start_weights(dataclasses.replace(config, train=given), tuned, tokens)
        assert statistics and statistics.keys() <= found.keys()
        mixing._mix(tuned, found, {name: x.clone() for name, x in mixing.mixed_tensors(tuned).items()}, 0.25)
        for name, x in statistics.items():
            torch.testing.assert_close(x, begun[name] + 0.25, msg=f"{start}: {name}")


def test_there_must_be_a_start_and_a_val_split(make_config, own_set, tmp_path):
    make_run(make_config(), str(tmp_path / "run"), {})
    with pytest.raises(ExportError, match="started from random weights"):
        export_run(str(tmp_path / "run"), str(tmp_path / "out"), interpolated=True)
    manifest = json.loads((own_set / "manifest.json").read_text())
    manifest["splits"].pop("val")
    (own_set / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(own_set / "val")
    with pytest.raises(ExportError, match="has no val split to choose the share on"):
        export_run(str(tmp_path / "run"), str(tmp_path / "out"), str(own_set), interpolated=True)
    assert not (tmp_path / "out").exists()
