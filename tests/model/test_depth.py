"""How deep parameters lie in towers of several families, and what fine-tuning makes of it: locked layers, rates by depth."""

from __future__ import annotations

import pytest
import torch
from support.plain_training import PlainTraining
from support.tiny_set import BERT, CONVNEXT, VIT
from transformers import AutoConfig, AutoModel

from mmref.config import config_hash
from mmref.errors import ConfigError, ModelError
from mmref.model.depth import depths, layers_of
from mmref.model.mmref import build_model
from mmref.train.engine import parameter_groups

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
TWO = {"model.vision_config": {**VIT, "num_hidden_layers": 2}, "model.text_config": {**BERT, "num_hidden_layers": 2}}
DROPPING = {
    "model.vision_config": {**TWO["model.vision_config"], "hidden_dropout_prob": 0.4},
    "model.text_config": {**TWO["model.text_config"], "hidden_dropout_prob": 0.4},
}
FAMILIES = {  # config -> parameters before the first layer, behind the last (some of each)
    "vit": ({**VIT, **SIZES}, 3, ["embeddings.cls_token"], ["layernorm.weight"]),
    "bert": ({**BERT, **SIZES}, 3, ["embeddings.word_embeddings.weight"], ["pooler.dense.weight"]),
    "clip_vision_model": (
        {"model_type": "clip_vision_model", **SIZES, "image_size": 16, "patch_size": 8}, 3, ["embeddings", "pre_layrnorm"],
        ["post_layernorm"],
    ),
    "siglip_vision_model": (
        {"model_type": "siglip_vision_model", **SIZES, "image_size": 16, "patch_size": 8}, 3, ["embeddings"],
        ["post_layernorm", "head"],
    ),
    "convnext": (CONVNEXT, 2, ["embeddings"], ["layernorm"]),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_in_every_family(family):
    values, count, before, behind = FAMILIES[family]
    tower = AutoModel.from_config(AutoConfig.for_model(**values))
    found = depths(tower, "train.lock_image")
    assert len(layers_of(tower, "train.lock_image")) == count
    assert set(found) == {name for name, _ in tower.named_parameters()} and set(found.values()) == set(range(count + 2))
    for part, depth in [*((p, 0) for p in before), *((p, count + 1) for p in behind)]:
        named = [
            d
            for name, d in found.items()
            if name.removeprefix("vision_model.").startswith(part) and not any(f".{i}." in name for i in range(count))
        ]
        assert named and set(named) == {depth}, part


def trained(model, tower):
    return {n for n, p in getattr(model.backbone, tower).named_parameters() if p.requires_grad}


def test_first_layers_are_locked_and_the_others_learn_what_they_learned(make_config):
    locked = PlainTraining(make_config({**TWO, "train.lock_image": 1, "train.lock_text": "all"}))
    free = PlainTraining(make_config(TWO))
    names = set(depths(free.model.backbone.vision_model, "x"))
    assert trained(locked.model, "vision_model") == {n for n in names if ".0." not in n and "embeddings" not in n}
    assert trained(locked.model, "text_model") == set() and locked.model.backbone.text_projection.weight.requires_grad
    torch.testing.assert_close(locked.step(0), free.step(0))
    expected = free.gradients()
    for name, gradient in locked.gradients().items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_what_is_locked_drops_nothing_out(make_config):
    model = build_model(make_config({**DROPPING, "train.lock_image": 1, "train.lock_text": "all"}), 80).train()
    drops = {n: m.training for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.p > 0}
    vision = {n: on for n, on in drops.items() if "vision_model" in n}
    assert vision and all(on == (".1." in n) for n, on in vision.items()), vision
    assert not any(on for n, on in drops.items() if "text_model" in n)


def test_freezing_the_backbone_is_locking_both_towers(make_config):
    frozen = build_model(make_config({**TWO, "model.freeze_backbone": True}), 80)
    locked = build_model(make_config({**TWO, "train.lock_image": "all", "train.lock_text": "all"}), 80)
    state = [{n: p.requires_grad for n, p in model.named_parameters()} for model in (frozen, locked)]
    assert state[0] == state[1] and not any(on for n, on in state[0].items() if "_model." in n)


@pytest.mark.parametrize("overrides, said", [
    ({"train.lock_image": 3}, r"`train.lock_image` 3: ViTModel has 2 layers. Give at most 2, or `all`"),
    ({"train.lock_text": 5}, r"`train.lock_text` 5: BertModel has 2 layers"),
])  # fmt: skip
def test_more_layers_than_there_are(make_config, overrides, said):
    with pytest.raises(ModelError, match=said):
        build_model(make_config({**TWO, **overrides}), 80)


def test_a_tower_without_layers(make_config, foreign_towers):
    overrides = {**foreign_towers, "model.freeze_backbone": False}
    model = build_model(make_config({**overrides, "train.lock_image": "all"}), 80)
    assert not trained(model, "vision_model") and trained(model, "text_model")
    parameter_groups(model, make_config({**overrides, "train.layer_decay": 0.5}).train)  # nothing of the tower is trained
    with pytest.raises(ModelError, match=r"`train.lock_image` goes by the layers .* Maps has no list of them"):
        build_model(make_config({**overrides, "train.lock_image": 1}), 80)
    with pytest.raises(ModelError, match=r"`train.layer_decay` goes by the layers"):
        parameter_groups(build_model(make_config(overrides), 80), make_config({**overrides, "train.layer_decay": 0.5}).train)


def test_fields_take_a_number_or_a_word(make_config):
    assert config_hash(make_config({"train.lock_image": "all"})) != config_hash(make_config({"train.lock_image": 1}))
    for wrong in (-1, "some"):
        with pytest.raises((ConfigError, TypeError), match=r"lock_image|'<'|'>='"):
            make_config({"train.lock_image": wrong})


def test_rates_fall_with_depth(make_config):
    config = make_config({**TWO, "train.layer_decay": 0.5, "train.lr_new": 3.0})
    model = build_model(config, 80)
    share = {id(p): group["lr_share"] for group in parameter_groups(model, config.train) for p in group["params"]}
    rates = {n: share[id(p)] for n, p in model.named_parameters() if p.requires_grad}
    assert len(share) == len(rates)
    for name, rate in rates.items():
        if model.is_new(name):
            expected = 3.0
        elif "embeddings" in name:
            expected = 0.125
        else:
            expected = {".0.": 0.25, ".1.": 0.5}.get(next((p for p in (".0.", ".1.") if p in name), ""), 1.0)
        assert rate == expected, name
    alike = make_config(TWO)
    assert {group["lr_share"] for group in parameter_groups(build_model(alike, 80), alike.train)} == {1.0}
