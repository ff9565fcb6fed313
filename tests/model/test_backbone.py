"""Towers through transformers: dual encoders and pairs, from configs and directories, at any image size."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_set import BERT, CONVNEXT, VIT
from transformers import AutoConfig, AutoModel

from mmref.config import ModelConfig
from mmref.errors import ModelError
from mmref.model.backbone import DualBackbone, PairBackbone, build_backbone, load_tower, without_weights

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {
    "model_type": "clip", "projection_dim": 12,
    "vision_config": {**SMALL, "image_size": 32, "patch_size": 8},
    "text_config": {**SMALL, "vocab_size": 60, "max_position_embeddings": 12, "eos_token_id": 3, "bos_token_id": 2},
}  # fmt: skip
SIGLIP = {
    "model_type": "siglip",
    "vision_config": {**SMALL, "image_size": 32, "patch_size": 8},
    "text_config": {**SMALL, "vocab_size": 60, "max_position_embeddings": 12, "projection_size": 16},
}
CHINESE = {**CLIP, "model_type": "chinese_clip", "text_config": {**SMALL, "vocab_size": 60, "max_position_embeddings": 12}}
DUALS = {"clip": (CLIP, 12), "siglip": (SIGLIP, 16), "chinese_clip": (CHINESE, 12)}
PAIRS = {"vit": {**VIT, "image_size": 32}, "convnext": CONVNEXT}


def pixels(height=32, width=32):
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))


def captions():
    """Three captions of 5, 8 and 3 tokens: start 2, words, end 3, padding 0."""
    ids = torch.zeros(3, 8, dtype=torch.long)
    for row, length in enumerate((5, 8, 3)):
        ids[row, :length] = torch.tensor([2, *range(10 + row, 8 + row + length), 3])
    return ids, (ids > 0).long()


def build(config: ModelConfig, vocab_size: int = 60):
    torch.manual_seed(0)
    return build_backbone(config, vocab_size).eval()


@pytest.mark.parametrize("kind", DUALS)
def test_dual_from_config_and_from_its_directory(kind, tmp_path):
    config, dim = DUALS[kind]
    backbone = build(ModelConfig(dual_config=config))
    assert isinstance(backbone, DualBackbone) and backbone.embed_dim == dim and backbone.vocab_size == 60
    assert (backbone.image_width, backbone.text_width, backbone.max_positions) == (16, 16, 12)
    ids, mask = captions()
    image, image_tokens = backbone.encode_image(pixels())
    text, text_tokens = backbone.encode_text(ids, mask)
    assert image.shape == text.shape == (3, dim) and text_tokens.shape == (3, 8, 16)
    assert image_tokens.shape == (3, 16 + (kind != "siglip"), 16)

    torch.manual_seed(0)
    whole = AutoModel.from_config(AutoConfig.for_model(**config)).eval()
    whole.save_pretrained(tmp_path / kind)
    loaded = build(ModelConfig(dual=str(tmp_path / kind)))
    torch.testing.assert_close(loaded.encode_image(pixels())[0], image)
    torch.testing.assert_close(loaded.encode_text(ids, mask)[0], text)
    # and what transformers itself calls the features of the model
    own = whole.get_image_features(pixel_values=pixels())
    torch.testing.assert_close(image, getattr(own, "pooler_output", own))
    extra = {} if kind == "siglip" else {"attention_mask": mask}
    own = whole.get_text_features(input_ids=ids, **extra)
    torch.testing.assert_close(text, getattr(own, "pooler_output", own))


VTDE = {
    "model_type": "vision-text-dual-encoder", "projection_dim": 12, "vision_config": VIT,
    "text_config": {**BERT, "max_position_embeddings": 12},
}  # fmt: skip


@pytest.mark.parametrize("config", [*(config for config, _ in DUALS.values()), VTDE], ids=[*DUALS, "vision-text-dual-encoder"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_of_a_config_in_half_precision_are_fp32(config, dtype, tmp_path):
    parts = {name: {**config[name], "dtype": dtype} for name in ("vision_config", "text_config")}
    half = {**config, **parts, "dtype": dtype}
    found, plain = build(ModelConfig(dual_config=half)).state_dict(), build(ModelConfig(dual_config=config)).state_dict()
    assert {x.dtype for x in found.values() if x.is_floating_point()} == {torch.float32}
    assert all(torch.equal(x, plain[name]) for name, x in found.items()), "not rounded on the way either"
    load_tower("", half, "model.dual").to(getattr(torch, dtype)).save_pretrained(tmp_path / "half")
    named = without_weights(ModelConfig(dual=str(tmp_path / "half")))
    assert named.dual_config["dtype"] == dtype
    assert {p.dtype for p in build(named).parameters()} == {torch.float32}


METACLIP = {**CLIP, "model_type": "metaclip_2"}


@pytest.mark.parametrize("config", [CLIP, METACLIP], ids=["clip", "metaclip_2"])
def test_a_causal_text_tower_needs_no_mask(config):
    """Words, and the feature that is read at the end token, are those that transformers gives with one."""
    backbone = build(ModelConfig(dual_config=config))
    ids, mask = captions()
    given = []
    backbone.text_model.register_forward_pre_hook(lambda _, __, kw: given.append(kw["attention_mask"]), with_kwargs=True)
    feature, tokens = backbone.encode_text(ids, mask)
    assert given == [None]
    own = backbone.text_model(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(feature, backbone.text_projection(own.pooler_output))
    words = mask[..., None].bool()
    torch.testing.assert_close(tokens.where(words, 0), own.last_hidden_state.where(words, 0))


@pytest.mark.parametrize("kind", [*DUALS, "pair"])
def test_tokens_in_the_shared_space_are_what_global_features_are_made_of(kind):
    ids, mask = captions()
    pair = ModelConfig(vision_config=PAIRS["convnext"], text_config=BERT, embed_dim=8, pool="mean")
    backbone = build(pair if kind == "pair" else ModelConfig(dual_config=DUALS[kind][0]))
    (image, image_tokens), (text, text_tokens) = backbone.encode_image(pixels()), backbone.encode_text(ids, mask)
    seen, read = backbone.in_shared_space(image_tokens, text_tokens)
    assert seen.shape[::2] == read.shape[::2] == (3, backbone.embed_dim)
    if kind == "pair":
        torch.testing.assert_close(seen.mean(1), image)
        torch.testing.assert_close((read * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), text)
    elif kind == "clip":  # its class token and its end token
        torch.testing.assert_close(seen[:, 0], image)
        torch.testing.assert_close(read[torch.arange(3), mask.sum(1) - 1], text)
    elif kind == "chinese_clip":  # the first token of both
        torch.testing.assert_close(seen[:, 0], image)
        torch.testing.assert_close(read[:, 0], text)
    else:  # SigLIP pools images by attention, and takes the last token of a text
        torch.testing.assert_close(read[:, -1], text)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("pool", ["auto", "mean"])
def test_pair_from_configs_and_from_directories(kind, pool, tmp_path):
    config = ModelConfig(vision_config=PAIRS[kind], text_config=BERT, embed_dim=8, pool=pool)
    backbone = build(config)
    assert isinstance(backbone, PairBackbone) and backbone.embed_dim == 8
    ids, mask = captions()
    image, image_tokens = backbone.encode_image(pixels())
    text, text_tokens = backbone.encode_text(ids, mask)
    assert image.shape == text.shape == (3, 8)
    assert image_tokens.shape == (3, {"vit": 17, "convnext": 16}[kind], backbone.image_width)
    assert text_tokens.shape == (3, 8, 16)
    for name in ("vision_model", "text_model"):
        getattr(backbone, name).save_pretrained(tmp_path / name)
    loaded = build(ModelConfig(vision=str(tmp_path / "vision_model"), text=str(tmp_path / "text_model"), embed_dim=8, pool=pool))
    loaded.visual_projection, loaded.text_projection = backbone.visual_projection, backbone.text_projection
    torch.testing.assert_close(loaded.encode_image(pixels())[0], image)
    torch.testing.assert_close(loaded.encode_text(ids, mask)[0], text)


def test_pools_are_what_they_say():
    ids, mask = captions()
    for pool in ("mean", "first", "auto"):
        backbone = build(ModelConfig(vision_config=PAIRS["vit"], text_config=BERT, embed_dim=8, pool=pool))
        text, tokens = backbone.encode_text(ids, mask)
        if pool == "mean":
            pooled = torch.stack([t[:n].mean(0) for t, n in zip(tokens, mask.sum(1))])
        elif pool == "first":
            pooled = tokens[:, 0]
        else:
            pooled = torch.tanh(backbone.text_model.pooler.dense(tokens[:, 0]))
        torch.testing.assert_close(text, backbone.text_projection(pooled))
        image, tokens = backbone.encode_image(pixels())
        expected = {"mean": tokens.mean(1), "first": tokens[:, 0]}.get(pool)
        if expected is not None:
            torch.testing.assert_close(image, backbone.visual_projection(expected))


@pytest.mark.parametrize("pool", ["auto", "first", "mean"])
def test_every_parameter_of_vit_and_bert_has_a_gradient(pool):
    backbone = build(ModelConfig(vision_config=PAIRS["vit"], text_config=BERT, embed_dim=8, pool=pool))
    ids, mask = captions()
    (backbone.encode_image(pixels())[0].square().sum() + backbone.encode_text(ids, mask)[0].square().sum()).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("config", [ModelConfig(dual_config=CLIP), ModelConfig(dual_config=SIGLIP),
                                    ModelConfig(vision_config=PAIRS["vit"], text_config=BERT, embed_dim=8)])  # fmt: skip
def test_rectangles_by_interpolated_positions(config):
    backbone = build(config)
    image, tokens = backbone.encode_image(pixels(64, 32))
    class_token = not config.dual_config or config.dual_config["model_type"] == "clip"
    assert image.shape == (3, backbone.embed_dim) and tokens.shape[1] == 8 * 4 + class_token
    other, _ = backbone.encode_image(pixels(32, 64))
    assert not torch.allclose(image, other)
    # at the size the weights were made for, positions are used as they are
    native, _ = backbone.encode_image(pixels())
    plain = backbone.vision_model(pixel_values=pixels())
    pooled = plain.pooler_output if config.pool == "auto" else plain.last_hidden_state.mean(1)
    assert torch.equal(native, backbone.visual_projection(pooled))


def test_clip_s_positions_are_interpolated_as_by_hand(tmp_path):
    """384 x 128 in small: a saved CLIP of 32 x 32 pixels reads 48 x 16, its 4 x 4 positions resampled to 6 x 2."""
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(**CLIP)).save_pretrained(tmp_path)
    backbone = build(ModelConfig(dual=str(tmp_path)))
    vision = backbone.vision_model
    x = pixels(48, 16)
    patches = vision.embeddings.patch_embedding(x).flatten(2).transpose(1, 2)  # (3, 12, 16)
    positions = vision.embeddings.position_embedding.weight  # (1 + 16, 16)
    grid = positions[1:].view(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(6, 2), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, 12, -1)
    first = (vision.embeddings.class_embedding + positions[0]).expand(3, 1, -1)
    hidden = vision.pre_layrnorm(torch.cat([first, patches + grid], dim=1))
    hidden = vision.encoder(inputs_embeds=hidden).last_hidden_state
    image, tokens = backbone.encode_image(x)
    torch.testing.assert_close(tokens, hidden)
    torch.testing.assert_close(image, backbone.visual_projection(vision.post_layernorm(hidden[:, 0])))


def test_a_tower_without_positions_takes_any_size():
    backbone = build(ModelConfig(vision_config=CONVNEXT, text_config=BERT, embed_dim=8))
    assert backbone.encode_image(pixels(64, 32))[1].shape == (3, 8 * 4, 16)


def test_padding_does_not_change_a_pair_s_text_feature():
    for pool in ("auto", "first", "mean"):
        backbone = build(ModelConfig(vision_config=PAIRS["vit"], text_config=BERT, embed_dim=8, pool=pool))
        ids, mask = captions()
        text = backbone.encode_text(ids, mask)[0]
        torch.testing.assert_close(backbone.encode_text(ids.masked_fill(mask == 0, 9), mask)[0], text)
        torch.testing.assert_close(backbone.encode_text(ids[2:, :3], mask[2:, :3])[0], text[2:])


@pytest.mark.parametrize("config, old", [
    (ModelConfig(dual_config=CLIP), 60), (ModelConfig(dual_config=SIGLIP), 60),
    (ModelConfig(vision_config=CONVNEXT, text_config=BERT, embed_dim=8), 80),
])  # fmt: skip
def test_word_embedding_grows_for_an_added_mask_token(config, old):
    before, grown = build(config, old), build(config, old + 1)
    assert (before.vocab_size, grown.vocab_size) == (old, old + 1)
    ids, mask = captions()
    torch.testing.assert_close(grown.encode_text(ids, mask)[0], before.encode_text(ids, mask)[0])
    ids[:, 1] = old  # the new id
    changed = grown.encode_text(ids, mask)[1]
    assert torch.isfinite(changed).all() and not torch.allclose(changed, before.encode_text(captions()[0], mask)[1])
    assert build(config, old - 7).vocab_size == old, "a smaller tokenizer leaves the embedding alone"


def test_frozen_and_new_parameters_are_told_apart():
    pair = build(ModelConfig(vision_config=CONVNEXT, text_config=BERT, embed_dim=8))
    new = [n for n, _ in pair.named_parameters() if n.startswith(pair.new_parameter_prefixes())]
    assert new == ["visual_projection.weight", "text_projection.weight"]
    assert build(ModelConfig(dual_config=CLIP)).new_parameter_prefixes() == ()


@pytest.mark.parametrize("config, said", [
    (ModelConfig(dual_config={"model_type": "clipp"}), "clipp"),
    (ModelConfig(dual_config={"projection_dim": 4}), "model_type"),
    (ModelConfig(dual="/no/such/directory"), "/no/such/directory"),
    (ModelConfig(vision="/no/such/tower", text_config=BERT), "/no/such/tower"),
    (ModelConfig(vision_config=VIT, text="no such/name"), "no such/name"),
    (ModelConfig(vision_config={**VIT, "hidden_size": "wide"}, text_config=BERT), "model.vision"),
])  # fmt: skip
def test_what_cannot_be_loaded_is_a_named_error_with_a_fix(config, said):
    with pytest.raises(ModelError, match="save_pretrained") as raised:
        build_backbone(config, 60)
    assert said in str(raised.value)


def test_a_directory_without_a_model_is_a_named_error(tmp_path):
    with pytest.raises(ModelError, match="save_pretrained") as raised:
        load_tower(str(tmp_path), None, "model.dual")
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("kept, found", [("text", "vision_model."), ("", "logit|text_model.|vision_model."), ("all", None)])
def test_weights_that_are_not_there_are_not_made_up(kept, found, tmp_path):
    model = AutoModel.from_config(AutoConfig.for_model(**CLIP))
    weights = model.state_dict()
    model.save_pretrained(tmp_path)
    given = {n: w for n, w in weights.items() if kept and ("vision" not in n or kept == "all")}
    save_file(given or {f"other.{n}": w for n, w in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    if found is None:
        loaded = load_tower(str(tmp_path), None, "model.dual").state_dict()
        assert all(torch.equal(weights[n], loaded[n]) for n in weights)
    else:
        with pytest.raises(ModelError, match=rf"{tmp_path}: its files hold no weights for \d+ .* such as ({found})"):
            load_tower(str(tmp_path), None, "model.dual")


def test_a_pooler_may_start_anew(tmp_path):
    model = AutoModel.from_config(AutoConfig.for_model(**BERT))
    model.save_pretrained(tmp_path)
    weights = {n: w for n, w in model.state_dict().items() if "pooler" not in n}
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load_tower(str(tmp_path), None, "model.text").state_dict()
    assert all(torch.equal(weights[n], loaded[n]) for n in weights)


def test_a_long_list_of_known_models_is_cut():
    with pytest.raises(ModelError) as raised:
        load_tower("", {"model_type": "klip"}, "model.dual")
    assert "klip" in str(raised.value) and len(str(raised.value)) < 1000


def test_single_towers_are_no_dual_encoder():
    with pytest.raises(ModelError, match=r"BertModel.*`model.vision` and `model.text`"):
        build_backbone(ModelConfig(dual_config=BERT), 60)
