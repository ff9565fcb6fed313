import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from support.tiny_set import BERT, VIT
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel

from mmref.config import from_dict
from mmref.config.packages import trust
from mmref.model.mmref import build_model
from mmref.model.text_groups import GROUPS, group_texts

CLIP = {
    "model_type": "clip", "projection_dim": 32,
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "vocab_size": 60, "max_position_embeddings": 24, "eos_token_id": 59},
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                      "image_size": 32, "patch_size": 8},
}  # fmt: skip
SIGLIP = {**CLIP, "model_type": "siglip", "projection_dim": None}


class Bert(BertModel):
    """A user's own tower, though of a known family."""

    def __init__(self) -> None:
        values = {key: value for key, value in BERT.items() if key != "model_type"}
        super().__init__(BertConfig(**{**values, "max_position_embeddings": 24}))


class Clip(CLIPModel):
    """A user's own dual encoder."""

    def __init__(self) -> None:
        super().__init__(CLIPConfig(**{key: value for key, value in CLIP.items() if key != "model_type"}))


LENGTHS = [3, 24, 7, 7, 12, 5, 3, 9, 20, 4, 6]


def captions(tokens=24, end=59):
    """Ids and mask of captions of LENGTHS, padded with the end token as CLIP's are."""
    at = torch.arange(tokens)[None]
    length = torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(5, end, (len(LENGTHS), tokens), generator=torch.Generator().manual_seed(0))
    return torch.where(at >= length - 1, end, ids), (at < length).long()


def test_groups_hold_every_caption_once_and_are_cut_to_their_longest():
    mask = captions()[1].numpy()
    groups = group_texts(mask)
    assert sorted(torch.cat([g.rows for g in groups]).tolist()) == list(range(len(LENGTHS)))
    assert len(groups) == GROUPS and [g.tokens for g in groups] == [4, 7, 12, 24]
    for g in groups:
        assert mask[g.rows].sum(1).max() == g.tokens


def test_few_captions_are_as_many_groups():
    assert [g.tokens for g in group_texts(np.array([[1, 1, 0], [1, 0, 0]]))] == [1, 2]


def model_of(values, **train):
    model = (
        values
        if "dual_config" in values
        else {"vision_config": VIT, "text_config": {**BERT, "max_position_embeddings": 24}, **values}
    )
    return build_model(from_dict({"model": model, "data": {"max_tokens": 24}, "loss": {"w_rec": 0.2}, "train": train}), 60)


@pytest.mark.parametrize("values", [
    {}, {"pool": "mean"}, {"pool": "first"}, {"adapter_layers": 1, "embed_dim": 32}, {"dual_config": CLIP},
    {"dual_config": SIGLIP},
])  # fmt: skip
def test_features_and_gradients_are_those_of_padded_captions(values):
    model = model_of(values)
    ids, mask = captions()
    seen = []
    for groups in (None, group_texts(mask.numpy()), group_texts(mask.numpy(), "meta")):
        model.zero_grad()
        features, tokens = model._encode_text(ids, mask, groups)
        torch.nn.functional.normalize(features, dim=-1)[:, 0].sum().backward()
        kept = tokens * mask[..., None]
        seen.append([features, kept, *(p.grad for p in model.parameters() if p.grad is not None)])
    for found, expected in [pair for grouped in seen[1:] for pair in zip(grouped, seen[0], strict=True)]:
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("values", [
    {"dual_config": SIGLIP}, {"text_config": {**BERT, "model_type": "convbert", "max_position_embeddings": 24}},
    {"text_config": {"import": "towers_of_tests:Bert"}}, {"dual_config": {"import": "towers_of_tests:Clip"}},
], ids=["siglip", "convbert", "imported text", "imported dual"])  # fmt: skip
def test_a_tower_that_may_read_its_padding_sees_all_of_it(values, monkeypatch):
    module = ModuleType("towers_of_tests")
    module.Bert, module.Clip = Bert, Clip
    monkeypatch.setitem(sys.modules, module.__name__, module)
    trust([module.__name__])
    model = model_of(values)
    lengths = []
    model.backbone.text_model.register_forward_pre_hook(lambda _, __, given: lengths.append(given["input_ids"].shape[1]),
                                                        with_kwargs=True)  # fmt: skip
    ids, mask = captions()
    model(None, ids, mask, groups=group_texts(mask.numpy()))
    assert lengths == [24]
    assert not model.backbone.trims_texts


def test_on_a_gpu_a_batch_is_one_group():
    (group,) = group_texts(captions()[1].numpy(), torch.device("meta"))
    assert group.tokens == 24 and group.rows is None, "in their order: no index is copied"


def test_the_tower_runs_on_words_alone():
    model = model_of({})
    tokens = []
    model.backbone.text_model.register_forward_pre_hook(lambda _, __, given: tokens.append(given["input_ids"].numel()),
                                                        with_kwargs=True)  # fmt: skip
    ids, mask = captions()
    model(None, ids, mask, groups=group_texts(mask.numpy()))
    assert len(tokens) == GROUPS and sum(tokens) < 0.55 * ids.numel()
