"""Towers that give no features are named before anything starts, by a forward pass without memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.tiny_set import BERT, CONVNEXT, VIT
from transformers import AutoConfig, AutoModel

from mmref.config import ModelConfig
from mmref.errors import ModelError
from mmref.model import backbone
from mmref.model.backbone import build_backbone, check_towers, try_towers
from mmref.sizing.estimate import measure_model

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SIZES, "patch_size": 8, "image_size": 16}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 12}
EFFICIENT = {
    "image_size": 16, "hidden_dim": 16, "kernel_sizes": [3], "in_channels": [32], "out_channels": [16], "strides": [1],
    "num_block_repeats": [1], "expand_ratios": [1], "depthwise_padding": [],
}  # fmt: skip
WORK = {
    "chinese_clip": {"projection_dim": 8, "vision_config": VISION, "text_config": TEXT},
    "vision-text-dual-encoder": {
        "projection_dim": 8, "vision_config": {**VISION, "model_type": "vit"}, "text_config": {**TEXT, "model_type": "bert"},
    },
    "clip": {"projection_dim": 8, "vision_config": VISION, "text_config": {**TEXT, "eos_token_id": 2}},
    "metaclip_2": {"projection_dim": 8, "vision_config": VISION, "text_config": {**TEXT, "eos_token_id": 2}},
    "siglip": {"vision_config": VISION, "text_config": {**TEXT, "projection_size": 16}},
}  # fmt: skip
FAIL = {
    "align": {"projection_dim": 8, "vision_config": EFFICIENT, "text_config": TEXT},
    "groupvit": {"projection_dim": 8, "text_config": TEXT, "vision_config": {
        **SIZES, "image_size": 16, "patch_size": 8, "depths": [1, 1, 1], "num_group_tokens": [2, 1, 0],
        "num_output_groups": [2, 1, 0]}},
    "xclip": {"projection_dim": 8, "vision_config": VISION, "text_config": {**TEXT, "eos_token_id": 2}},
}  # fmt: skip
WITHOUT_PLACES = {  # families whose features are sound, but not what heads and masked captions need of them
    "altclip": {
        "projection_dim": 8,
        "vision_config": VISION,
        "text_config": {**TEXT, "project_dim": 8, "pad_token_id": 1},
    },
    "owlvit": {"projection_dim": 8, "vision_config": VISION, "text_config": TEXT},
}
NONE = {
    "flava": {"image_config": VISION, "text_config": TEXT, "multimodal_config": SIZES},
    "clap": {"projection_dim": 8, "text_config": TEXT},
    "bert": TEXT,
}
T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 40}


@pytest.mark.parametrize("family", WORK)
def test_families_that_work(family, monkeypatch):
    monkeypatch.setattr(backbone, "_no_features", lambda *_: pytest.fail("needed memory"))
    check_towers(ModelConfig(dual_config={"model_type": family, **WORK[family]}), 2, (32, 24))


@pytest.mark.parametrize("kind", ["config", "folder"])
@pytest.mark.parametrize("family", FAIL)
def test_families_that_give_no_features_are_named(family, kind, tmp_path):
    values = {"model_type": family, **FAIL[family]}
    config = ModelConfig(dual_config=values)
    if kind == "folder":
        AutoModel.from_config(AutoConfig.for_model(**values)).save_pretrained(tmp_path)
        config = ModelConfig(dual=str(tmp_path))
    message = rf"model.dual: .*family `{family}` gives no features of images of 16 x 16 px.*clip, metaclip_2, siglip"
    with pytest.raises(ModelError, match=message):
        check_towers(config, None, (16, 16))
    with pytest.raises(ModelError, match=f"family `{family}`"):  # without the check before a run
        build_backbone(config, 40)


def test_a_family_that_cannot_work_is_refused_with_the_reason():
    towers = {"vision_config": {**SIZES, "patch_size": 8, "num_patches": 4}, "text_config": {**TEXT, "projection_size": 16}}
    config = ModelConfig(dual_config={"model_type": "siglip2", **towers})
    for attempt in (lambda: check_towers(config, None, (16, 16)), lambda: build_backbone(config, 40)):
        with pytest.raises(ModelError, match="family `siglip2` cannot be used: NaFlex reads patches"):
            attempt()


@pytest.mark.parametrize("family, said", [("altclip", "(2, 8, 8) where 16 and 16 wide"), ("owlvit", "get_input_embeddings")])
def test_tokens_of_another_width_and_fixed_vocabularies_are_named(family, said):
    with pytest.raises(ModelError, match=f"family `{family}`") as raised:
        check_towers(ModelConfig(dual_config={"model_type": family, **WITHOUT_PLACES[family]}), None, (16, 16))
    assert said in str(raised.value)


@pytest.mark.parametrize("family", NONE)
def test_models_that_are_no_dual_encoder_are_named(family):
    with pytest.raises(ModelError, match="needs a dual encoder such as CLIP or SigLIP, found"):
        check_towers(ModelConfig(dual_config={"model_type": family, **NONE[family]}), None, (16, 16))


@pytest.mark.parametrize(
    ("vision", "text", "size", "said"),
    [
        (CONVNEXT, T5, (16, 16), "model.text `t5` .*ValueError.* no encoder-decoder"),
        ({"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}, VIT, (16, 16), "`vit`"),
        (BERT, BERT, (16, 16), "model.vision `bert`"),
        ({"model_type": "swin", "image_size": 16, "patch_size": 8, "embed_dim": 8, "depths": [1], "num_heads": [1],
          "window_size": 2, "num_channels": 1}, BERT, (16, 16), "model.vision `swin`"),
    ],
)  # fmt: skip
def test_pairs_that_give_no_features_are_named(vision, text, size, said):
    with pytest.raises(ModelError, match=said):
        check_towers(ModelConfig(vision_config=vision, text_config=text), None, size)


SMALL_NET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


@pytest.mark.parametrize("vision", [
    {"model_type": "resnet", "layer_type": "basic", **SMALL_NET}, {"model_type": "regnet", "groups_width": 8, **SMALL_NET},
    {"model_type": "bit", "num_groups": 4, **SMALL_NET}, VIT,
], ids=lambda values: values["model_type"])  # fmt: skip
@pytest.mark.parametrize("more", [{"pool": "mean"}, {"pool": "first"}, {"adapter_layers": 1, "embed_dim": 32}])
def test_towers_that_call_their_pooler_work_with_other_pools(vision, more):
    config = ModelConfig(vision_config=vision, text_config=BERT, **more)
    check_towers(config, None, (32, 32) if vision is not VIT else (16, 16))
    parts = build_backbone(config, 40).named_parameters()
    assert not [name for name, _ in parts if "pooler" in name], "none without a gradient"


def test_pairs_that_work_need_no_memory(monkeypatch):
    monkeypatch.setattr(backbone, "_no_features", lambda *_: pytest.fail("needed memory"))
    for vision in (CONVNEXT, {**VIT, "image_size": 32}):
        for layers in (0, 1):
            config = ModelConfig(vision_config=vision, text_config=BERT, adapter_layers=layers)
            check_towers(dataclasses.replace(config, feature_cache="/nowhere"), None, (48, 32))


def test_sound_towers_that_cannot_run_without_memory_pass(monkeypatch):
    """They look at values: the pass without memory fails, the one with it decides."""
    see = backbone.PairBackbone._see

    def looking(self, pixels):
        assert float(pixels.sum()) == 0
        return see(self, pixels)

    monkeypatch.setattr(backbone.PairBackbone, "_see", looking)
    try_towers(ModelConfig(vision_config=CONVNEXT, text_config=BERT), (32, 32))


def test_trying_towers_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    check_towers(ModelConfig(dual_config={"model_type": "clip", **WORK["clip"]}), 2, (32, 24))
    assert torch.equal(before, torch.get_rng_state())


def test_sizing_names_them_too(make_config):
    config = make_config()
    config.model = ModelConfig(dual_config={"model_type": "xclip", **FAIL["xclip"]})
    with pytest.raises(ModelError, match="family `xclip`"):
        measure_model(config, 2)
