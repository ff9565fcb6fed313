"""Captions to ids of fixed length, special ids for masking, and where the tokenizer comes from."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmref.data.tokens import MASK_TOKEN, Tokens, load_tokens, tokenizer_path
from mmref.errors import ModelError


def clip_like(pad: str | None = "<end>"):
    """No mask token; the end token is also the unknown and (by default) the padding one, as in CLIP."""
    vocab = {"!": 0, "a": 1, "red": 2, "circle": 3, "<start>": 4, "<end>": 5}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 4), ("<end>", 5)]
    )
    names = {"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<end>"} | ({"pad_token": pad} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def test_bundled_style_tokenizer(make_config):
    tokens = load_tokens(make_config())
    vocabulary = tokens.tokenizer.get_vocab()
    special = {vocabulary[t] for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")}
    assert tokens.mask_id == vocabulary["[MASK]"] and tokens.vocab_size == len(vocabulary)
    assert set(tokens.special_ids.tolist()) == special, "an unknown word is a word: it may be masked"


def test_padding_comes_last(make_config):
    tokenizer = load_tokens(make_config()).tokenizer
    tokenizer.padding_side = "left"  # as language models have it
    ids, mask = Tokens(tokenizer, 7)(["red circle", "grey"])
    assert (np.diff(mask) <= 0).all() and (ids[:, 0] == ids[0, 0]).all() and mask[:, 0].all()


def test_ids_are_cut_and_padded_to_a_fixed_length(make_config):
    tokens = load_tokens(make_config({"data.max_tokens": 7}))
    ids, mask = tokens(["red circle", "red circle " * 30, "grey"])
    assert ids.shape == mask.shape == (3, 7) and ids.dtype == mask.dtype == np.int32
    cls, sep, pad = (tokens.tokenizer.get_vocab()[t] for t in ("[CLS]", "[SEP]", "[PAD]"))
    assert (ids[:, 0] == cls).all() and ids[1, -1] == sep and mask[1].all(), "the end token survives the cut"
    for row, length in zip(ids, mask.sum(1)):
        assert row[length - 1] == sep and (row[length:] == pad).all() and pad not in row[:length]
    whole = tokens.tokenizer("red circle")["input_ids"]
    assert ids[0, : len(whole)].tolist() == whole and ids[1, 1:3].tolist() == whole[1:3]


@pytest.mark.parametrize("pad, specials", [("<end>", {4, 5, 6}), ("!", {0, 4, 5, 6}), (None, {4, 5, 6})])
def test_clip_s_tokenizer_gets_a_mask_token_and_keeps_its_end_token_special(pad, specials):
    tokens = Tokens(clip_like(pad), 6)
    assert tokens.mask_id == 6 and tokens.vocab_size == 7
    assert tokens.tokenizer.convert_ids_to_tokens(6) == MASK_TOKEN
    assert set(tokens.special_ids.tolist()) == specials
    ids, mask = tokens(["a red circle"])
    assert ids[0].tolist() == [4, 1, 2, 3, 5, 0 if pad == "!" else 5] and mask[0].tolist() == [1, 1, 1, 1, 1, 0]


def test_the_path_is_the_first_that_is_set(make_config):
    config = make_config()
    assert tokenizer_path(config) == f"{config.data.root}/tokenizer"
    config.model.text = "text-tower"
    assert tokenizer_path(config) == "text-tower"
    config.model.dual = "clip"
    assert tokenizer_path(config) == "clip"
    config.data.tokenizer = "own"
    assert tokenizer_path(config) == "own"


def test_a_missing_tokenizer_is_named(make_config, tmp_path):
    with pytest.raises(ModelError, match=rf"no tokenizer at {tmp_path}/nothing.*`data.tokenizer`"):
        load_tokens(make_config({"data.tokenizer": str(tmp_path / "nothing")}))


@pytest.mark.parametrize("room, works", [(1, False), (2, False), (3, True)])
def test_a_caption_without_room_for_a_word_is_named(make_config, room, works):
    config = make_config({"data.max_tokens": room})
    if works:
        ids, _ = load_tokens(config)(["red circle", "grey star"])
        assert (ids[0] != ids[1]).any()
    else:
        with pytest.raises(ModelError, match=rf"max_tokens {room} leaves no word.*2 special tokens.*at least 3"):
            load_tokens(config)
