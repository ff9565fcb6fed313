"""The module: what a forward gives, which parameters are new, seeds."""

from __future__ import annotations

import pytest
import torch
from support.tiny_set import BERT

from mmref.config import Config
from mmref.errors import ModelError
from mmref.losses import reconstruction_loss
from mmref.model.mmref import Masked, build_model
from mmref.model.text_groups import group_texts
from mmref.model.word_decoder import places_of

CLIP_TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP = {
    "model_type": "clip", "projection_dim": 8,
    "vision_config": {**CLIP_TEXT, "image_size": 16, "patch_size": 8},
    "text_config": {**CLIP_TEXT, "vocab_size": 80, "max_position_embeddings": 16, "eos_token_id": 3},
}  # fmt: skip


def batch(n=4):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 80, (n, 10), generator=g)
    ids[:, 0], ids[:, -1] = 2, 3
    return torch.randn(n, 3, 16, 16, generator=g), ids, torch.ones_like(ids)


def masked_inputs(ids, dim=8):
    at = torch.zeros_like(ids, dtype=torch.bool)
    at[:, 4] = True
    references = torch.nn.functional.normalize(torch.ones(len(ids), 1, dim), dim=-1)
    return Masked(ids.masked_fill(at, 4), places_of(at), ids[at], references)


def test_a_forward_gives_what_was_asked_for(make_config):
    model = build_model(make_config({"loss.w_rec": 0.5}), 80)
    pixels, ids, mask = batch()
    out = model(pixels)
    assert out.text is None and out.rec_sum is None and out.image.shape == (4, 8)
    torch.testing.assert_close(out.image.norm(dim=1), torch.ones(4))
    out = model(None, ids, mask)
    assert out.image is None and out.rec_sum is None
    torch.testing.assert_close(out.text.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(out.scale, torch.tensor([1 / 0.07]))
    masked = masked_inputs(ids)
    out = model(pixels, ids, mask, masked)
    states = model.backbone.encode_text(masked.ids, mask)[1]
    logits = model.reconstruct(states, mask, masked.references, masked.at)
    assert out.rec_sum.item() == pytest.approx(reconstruction_loss(logits, masked.words).item(), rel=1e-6)


def test_without_its_weight_there_is_no_reconstruction_head(make_config):
    model = build_model(make_config({"loss.w_rec": 0.0}), 80)
    pixels, ids, mask = batch()
    assert model.reconstruct is None and model(pixels, ids, mask, masked_inputs(ids)).rec_sum is None


@pytest.mark.parametrize("detach", [True, False])
def test_reconstruction_can_leave_the_text_tower_alone(make_config, detach):
    model = build_model(make_config({"loss.w_rec": 0.5, "loss.rec_detach_text": detach}), 80)
    _, ids, mask = batch()
    model(None, None, mask, masked_inputs(ids)).rec_sum.backward()
    touched = any(p.grad is not None and p.grad.abs().max() > 0 for p in model.backbone.text_model.parameters())
    assert touched is not detach and model.reconstruct.vocabulary.weight.grad.abs().max() > 0


def test_temperature_is_learned_when_asked_and_bounded(make_config):
    assert not build_model(make_config(), 80).log_scale.requires_grad
    model = build_model(make_config({"loss.learn_tau": True}), 80)
    assert model.log_scale.requires_grad and model.log_scale.shape == (1,)
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    assert model(batch()[0]).scale.item() == 100.0


def test_the_bias_belongs_to_the_sigmoid_loss(make_config):
    assert build_model(make_config(), 80).logit_bias is None
    model = build_model(make_config({"loss.align": "sigmoid", "loss.bias": -5.0}), 80)
    assert model.is_new("logit_bias") and model.logit_bias.requires_grad
    bias = model(*batch()).bias
    assert bias.item() == -5.0
    bias.backward()
    assert model.logit_bias.grad.item() == 1.0


def test_new_parameters_are_heads_projections_and_temperature(make_config):
    model = build_model(make_config({"loss.w_rec": 0.5}), 80)
    new = {n for n, _ in model.named_parameters() if model.is_new(n)}
    assert {"log_scale", "backbone.visual_projection.weight", "reconstruct.vocabulary.weight"} <= new
    old = {n for n, _ in model.named_parameters()} - new
    assert old and all(n.startswith(("backbone.vision_model.", "backbone.text_model.")) for n in old)
    dual = {"model.vision_config": None, "model.text_config": None, "model.dual_config": CLIP}
    model = build_model(make_config(dual), 80)
    assert [n for n, _ in model.named_parameters() if model.is_new(n)] == ["log_scale"]


def test_weights_depend_on_the_seed_and_not_on_the_global_state(make_config):
    def weights(config: Config):
        return torch.cat([p.flatten() for p in build_model(config, 80).parameters()])

    torch.manual_seed(1)
    first = weights(make_config())
    torch.manual_seed(2)
    assert torch.equal(weights(make_config()), first)
    assert not torch.equal(weights(make_config({"train.seed": 1})), first)
    before = torch.get_rng_state()
    build_model(make_config(), 80)
    assert torch.equal(torch.get_rng_state(), before), "the caller's generator is left alone"


def test_a_frozen_backbone_trains_projections_and_heads_only(make_config):
    model = build_model(make_config({"model.freeze_backbone": True, "loss.w_rec": 0.5}), 80)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if model.is_new(n)} - {"log_scale"}


def test_gradient_checkpointing_changes_nothing_but_memory(make_config):
    pixels, ids, mask = batch()
    grads = []
    for on in (False, True):
        model = build_model(make_config({"train.gradient_checkpointing": on}), 80).train()
        assert model.backbone.vision_model.is_gradient_checkpointing is on
        out = model(pixels, ids, mask)
        (out.image * out.text).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name])


def test_bf16_keeps_weights_and_features_in_fp32(make_config):
    pixels, ids, mask = batch()
    exact = build_model(make_config(), 80)(pixels, ids, mask)
    model = build_model(make_config({"train.precision": "bf16"}), 80)
    out = model(pixels, ids, mask)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert out.image.dtype == out.text.dtype == torch.float32
    for a, b in ((out.image, exact.image), (out.text, exact.text)):
        assert not torch.equal(a, b) and (a * b).sum(1).min() > 0.99


def test_captions_longer_than_the_text_tower_s_positions_are_a_named_error(make_config):
    with pytest.raises(ModelError, match=r"data.max_tokens 20.*16"):
        build_model(make_config({"data.max_tokens": 20}), 80)
    longer = {**BERT, "max_position_embeddings": 20}
    model = build_model(make_config({"data.max_tokens": 20, "model.text_config": longer}), 80)
    assert model.backbone.max_positions == 20


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm"])
def test_positions_of_text_towers_that_count_from_padding_on(make_config, family):
    text = {**BERT, "model_type": family, "pad_token_id": 1}
    with pytest.raises(ModelError, match=r"data.max_tokens 15 .*14 positions .* to at most 14"):
        build_model(make_config({"data.max_tokens": 15, "model.text_config": text}), 80)
    model = build_model(make_config({"data.max_tokens": 14, "model.text_config": text}), 80)
    ids = torch.full((1, 14), 5)
    assert model(None, ids, torch.ones_like(ids)).text.isfinite().all(), "as many as it says, without padding"


LEFT = {"data.padding": "left"}
CONVBERT = {**BERT, "model_type": "convbert", "num_attention_heads": 4, "embedding_size": 16}


@pytest.mark.parametrize("found, overrides", [
    ("BertModel, is given the first places of a caption", {}),
    ("CLIPText.*, is given the first places of a caption",
     {"model.vision_config": None, "model.text_config": None, "model.dual_config": CLIP}),
    ("`model.pool: first` takes the first token", {"model.text_config": CONVBERT, "model.pool": "first"}),
])  # fmt: skip
def test_padding_before_a_caption_is_refused_where_words_are_read(make_config, found, overrides):
    with pytest.raises(ModelError, match=rf"data.padding is left.*{found}.*set `data.padding: right`"):
        build_model(make_config(LEFT | overrides), 80)
    build_model(make_config(overrides), 80)


def test_padding_before_a_caption_is_for_towers_that_keep_it(make_config):
    model = build_model(make_config(LEFT | {"model.text_config": CONVBERT}), 80).eval()
    _, ids, mask = batch()
    for row in range(len(ids)):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    assert torch.equal(model(None, ids, mask).text, model(None, ids, mask, groups=group_texts(mask.numpy())).text)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_temperature_at_its_bound_can_leave_it(make_config, sign):
    """CLIP's start is its bound, 0.01: a gradient away from it is kept, one across it is not."""
    model = build_model(make_config({"loss.tau": 0.01, "loss.learn_tau": True}), 80)
    scale = model(*batch()).scale
    assert scale.item() == pytest.approx(100, abs=1e-4) and scale <= 100
    (sign * scale).backward()
    assert model.log_scale.grad.item() == pytest.approx(100 if sign > 0 else 0, rel=1e-4)
