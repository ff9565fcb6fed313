"""Pretrained models as they are: every family against transformers' own processors and features, and what is refused."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.pretrained import FAMILIES, PHOTOGRAPHS, TEXTS, own_features, photograph, save_pretrained
from transformers import AutoConfig, AutoModel

import mmref
from mmref.config import config_hash, dump_yaml, from_dict, from_saved
from mmref.config.inputs import differing, inputs_of, settled
from mmref.data.fit import Fit
from mmref.errors import ModelError
from mmref.export.write import export_pretrained, write_transformers
from mmref.run.models import load_pretrained

CLOSE = 1e-4


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_pretrained("clip", tmp_path_factory.mktemp("hub") / "clip")


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_those_of_transformers(family, tmp_path):
    folder = save_pretrained(family, tmp_path / "model")
    image, text = own_features(folder, PHOTOGRAPHS, TEXTS)
    model = mmref.load(folder)
    assert np.abs(model.encode_images(PHOTOGRAPHS) - image).max() < CLOSE
    assert np.abs(model.encode_text(TEXTS) - text).max() < CLOSE
    # and the comparison can fail: features of other inputs are further apart than that
    assert min(np.abs(image[0] - image[1]).max(), np.abs(text[0] - text[1]).max()) > 10 * CLOSE


def test_another_filter_or_another_cut_would_be_seen(clip):
    """What an image is made fit by is felt in features: each of the rules gives others than the model's own."""
    image, _ = own_features(clip, PHOTOGRAPHS, TEXTS)
    model = mmref.load(clip)
    for field, value in (("resample", "bilinear"), ("resize", "stretch"), ("resize", "area"), ("resize_edge", 36)):
        own = getattr(model.config.data, field)
        setattr(model.config.data, field, value)
        assert np.abs(model.encode_images(PHOTOGRAPHS) - image).max() > CLOSE, (field, value)
        setattr(model.config.data, field, own)


@pytest.mark.parametrize("mode, kind", [("CMYK", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("L", "WEBP")])
def test_pictures_of_every_mode(mode, kind, clip):
    """Opaque ones are what Pillow's own conversion makes of them."""
    data = photograph(3, 70, 51, "RGBA" if mode == "LA" else mode, kind)
    if mode == "LA":
        out = io.BytesIO()
        Image.open(io.BytesIO(data)).convert("LA").save(out, kind)
        data = out.getvalue()
    image, _ = own_features(clip, [data], TEXTS)
    assert np.abs(mmref.load(clip).encode_images([data]) - image).max() < CLOSE


@pytest.mark.parametrize("family", ["clip", "siglip2", "chinese_clip", "vision-text-dual-encoder"])
def test_an_export_of_a_pretrained_model_is_the_model(family, tmp_path):
    folder = save_pretrained(family, tmp_path / "model")
    exported = export_pretrained(str(folder), str(tmp_path / "exported"))
    shutil.rmtree(folder)
    before, model = json.loads((exported / "config.json").read_text()), mmref.load(exported)
    assert before["pretrained"] == str(folder) and model.references is None
    again = save_pretrained(family, folder)
    for mine, own in zip((model.encode_images(PHOTOGRAPHS), model.encode_text(TEXTS)), own_features(again, PHOTOGRAPHS, TEXTS)):
        assert np.abs(mine - own).max() < CLOSE


def test_the_copy_of_a_model_in_half_precision_is_fp32(tmp_path):
    folder = save_pretrained("clip", tmp_path / "clip")
    AutoModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    parts = load_pretrained(str(folder))
    write_transformers(tmp_path / "copy", parts.config, parts.module, parts.tokens)
    stored = load_file(tmp_path / "copy" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()} == {torch.float32}


def test_images_in_every_form_are_the_same(clip, tmp_path):
    model, data = mmref.load(clip), photograph(0, 97, 143)
    (tmp_path / "a.jpg").write_bytes(data)
    opened = Image.open(io.BytesIO(data))
    found = model.pixels([data, tmp_path / "a.jpg", opened, np.asarray(opened)])
    assert found.shape == (4, 32, 32, 3) and (found == found[0]).all()


def test_a_long_text_tower_reads_no_more_than_the_longest_caption(tmp_path):
    model = mmref.load(save_pretrained("vision-text-dual-encoder", tmp_path))
    lengths = []
    tower = model.module.backbone.text_model
    tower.register_forward_pre_hook(lambda *given: lengths.append(given[2]["input_ids"].shape[1]), with_kwargs=True)
    model.encode_text(TEXTS)
    longest = max(len(model._encoder.tokens.tokenizer(text)["input_ids"]) for text in TEXTS)
    assert model.config.data.max_tokens == 160 and lengths == [longest]


def test_naflex_is_refused_with_the_reason(tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("siglip2", vision_config={**small, "num_patches": 16, "patch_size": 8},
                                  text_config={**small, "vocab_size": 60, "projection_size": 16})  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"NaFlex reads patches.*fixed resolution"):
        mmref.load(tmp_path)


@pytest.mark.parametrize("change, said", [
    ({"do_resize": False}, "leaves images in their own sizes"),
    ({"do_center_crop": False}, "cuts nothing off"),
    ({"rescale_factor": 1 / 127.5}, "not by 1/255"),
    ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "resizes to"),
])  # fmt: skip
def test_what_an_image_processor_does_and_nothing_here_is_named(change, said, clip, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip, folder)
    rules = json.loads((folder / "preprocessor_config.json").read_text()) | change
    (folder / "preprocessor_config.json").write_text(json.dumps(rules))
    with pytest.raises(ModelError, match=said):
        mmref.load(folder)


def test_a_folder_without_an_image_processor_or_of_nothing_is_named(clip, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(clip, folder)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="preprocessor_config"):
        mmref.load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is none of these: a run directory"):
        mmref.load(tmp_path / "empty")
    with pytest.raises(ModelError, match="is not there"):
        mmref.load(tmp_path / "nothing")


# -- auto, in a config ---------------------------------------------------------------------------------------------------


PAIR = {"vision_config": {"model_type": "vit"}, "text_config": {"model_type": "bert"}}


def test_without_a_pretrained_dual_encoder_auto_is_what_it_was():
    data = settled(from_dict({"model": PAIR})).data
    assert (data.image_height, data.image_width, data.max_tokens, data.resize, data.padding) == (64, 64, 24, "area", "right")
    assert (data.image_mean, data.image_std) == ([0.481, 0.458, 0.408], [0.269, 0.261, 0.276])
    # and a run has the identity that it had before there were such fields
    assert config_hash(from_dict({"model": PAIR})) == "3a49caf799b3"
    given = {"image_height": 64, "resize": "area", "resample": "lanczos", "resize_edge": 7, "padding": "right"}
    assert config_hash(from_dict({"model": PAIR, "data": given})) == "3a49caf799b3"
    assert config_hash(from_dict({"model": PAIR, "data": {"resize": "crop"}})) != "3a49caf799b3"


def test_auto_is_the_model_s_own_and_what_differs_is_said(clip):
    config = from_dict({"model": {"dual": str(clip)}})
    assert config.data.image_height == "auto", "no look at the model before it is wanted"
    data = settled(config).data
    assert {name: getattr(data, name) for name in inputs_of(str(clip)).fields()} == inputs_of(str(clip)).fields()
    assert (data.image_height, data.max_tokens, data.resize, data.resize_edge) == (32, 77, "crop", 32)
    assert differing(settled(config)) == []
    other = settled(from_dict({"model": {"dual": str(clip)}, "data": {"image_height": 48, "max_tokens": 20}}))
    assert (other.data.resize, other.data.image_width) == ("area", 32), "a crop is for the size it was made for"
    lines = [line.split(",")[0] for line in differing(other)]
    assert lines == ["data.image_height is 48", "data.resize is area", "data.max_tokens is 20"]
    assert "made for 77" in differing(other)[-1]


def test_a_saved_config_of_before_means_what_it_meant(clip):
    """A run trained at explicit sizes by an older version goes on to be resized as it was."""
    before = {"model": {"dual": str(clip)}, "data": {"image_height": 32, "image_width": 32, "max_tokens": 77,
              "image_mean": [0.5] * 3, "image_std": [0.5] * 3}}  # fmt: skip
    data = from_saved(before, "config.yaml").data
    assert (data.resize, data.padding) == ("area", "right")
    now = settled(from_dict(before))
    assert (now.data.resize, from_saved(yaml.safe_load(dump_yaml(now)), "c").data) == ("crop", now.data)


@pytest.mark.parametrize("height, width", [(40, 60), (61, 40), (41, 41), (20, 90), (32, 32), (10, 11)])
@pytest.mark.parametrize("rule", ["crop", "stretch"])
def test_fit_gives_the_very_pixels_of_transformers(rule, height, width):
    from transformers import CLIPImageProcessorPil

    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    size = {"shortest_edge": 28} if rule == "crop" else {"height": 24, "width": 36}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 24, "width": 36}, do_rescale=False, do_normalize=False,
                                      do_center_crop=rule == "crop", resample=1)  # fmt: skip
    expected = np.moveaxis(np.asarray(processor(Image.fromarray(rgb))["pixel_values"][0]), 0, -1)
    assert np.array_equal(Fit(24, 36, rule, "lanczos", 28)(rgb), expected)
