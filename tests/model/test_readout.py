"""Words read out of references: by a head that was set by hand, and by one that was trained on a few captions."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.pretrained import TEXTS, bert_tokenizer, clip_tokenizer, sentencepiece_tokenizer, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from mmref.data.tokens import Tokens, load_tokens
from mmref.model import readout
from mmref.model.mmref import Masked, build_model
from mmref.model.readout import read_captions, telling_words, whole_words
from mmref.model.word_decoder import places_of


@pytest.fixture(scope="module")
def trained(request, tiny_set):
    """A model that has learned to say which of two references stands behind a caption, its tokens, and the two."""
    from support.tiny_set import tiny_config

    overrides = {"loss.w_rec": 1.0, "reference.per_object": 2, "model.text_config.hidden_size": 16}
    config = tiny_config(tiny_set, overrides)
    tokens = load_tokens(config)
    model = build_model(config, tokens.vocab_size)
    captions = ["red circle", "grey square"]
    ids, mask = (torch.from_numpy(a).long() for a in tokens(captions))
    references = torch.zeros(2, 2, 8)
    references[0, :, 0], references[1, :, 1] = 1.0, 1.0
    special = torch.isin(ids, torch.as_tensor(tokens.special_ids))
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        at = (torch.rand(ids.shape, generator=generator) < 0.7) & ~special
        at |= (~special) & (at.sum(1, keepdim=True) == 0)
        masked = Masked(ids.masked_fill(at, tokens.mask_id), places_of(at), ids[at], references)
        loss = model(None, None, mask, masked).rec_sum / at.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), tokens, references, int((~special)[0].sum())


def test_the_caption_of_each_reference_is_read(trained):
    model, tokens, references, length = trained
    assert read_captions(model, tokens, references, length) == ["red circle", "grey square"]
    assert read_captions(model, tokens, references.flip(0), length) == ["grey square", "red circle"]


def test_a_reference_s_length_does_not_matter(trained):
    model, tokens, references, length = trained
    assert read_captions(model, tokens, 5 * references, length) == read_captions(model, tokens, references, length)


def test_no_word_stands_beside_itself_or_three_times(trained):
    model, tokens, references, _ = trained
    for text in read_captions(model, tokens, references, 7):
        ids = [i for i in tokens([text])[0][0].tolist() if i not in tokens.special_ids]
        assert all(a != b for a, b in itertools.pairwise(ids)) and max(map(ids.count, ids)) <= 2, text


def test_telling_words_are_those_of_the_reference_and_not_of_others(trained):
    model, tokens, references, length = trained
    red, grey = telling_words(model, tokens, references, references, length, 2)
    assert {w for w, _ in red} <= {"red", "circle"} and red and all(ratio > 1 for _, ratio in red)
    assert {w for w, _ in grey} <= {"grey", "square"} and grey
    assert telling_words(model, tokens, references[:1], references[:1], length, 2) == [[]], "nothing tells it from itself"


def byte_level_tokenizer():
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<pad>"])
    raw.train_from_iterator(["the caf\u00e9 with wings", "swings at night"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")


def clip_words():
    pieces = ["b", "i", "r", "d</w>", "bi", "rd</w>", "bird</w>", "bird", "<|startoftext|>", "<|endoftext|>"]
    merges = [("b", "i"), ("r", "d</w>"), ("bi", "rd</w>")]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges)


@pytest.mark.parametrize(("tokenizer", "words", "pieces"), [
    (sentencepiece_tokenizer, {"bird", "night", "boat", "snow", "wings"}, set()),
    (byte_level_tokenizer, {"caf\u00e9", "wings", "swings", "night"}, {"ings", "wing", "fe"}),
    (clip_words, {"bird"}, set()),
    (clip_tokenizer, set(), set()),
    (bert_tokenizer, {"small", "yellow", "bird"}, {"MASK", "[MASK]"}),
    (lambda: word_tokenizer(pad_token="</s>"), {"small", "yellow", "bird"}, set()),
], ids=["sentencepiece", "byte-level", "clip", "letters", "bert", "words"])  # fmt: skip
def test_words_are_whole_by_the_tokenizer_s_own_marks(tokenizer, words, pieces):
    tokens = Tokens(tokenizer(), 12)
    found = list(whole_words(tokens).values())
    assert words <= set(found) and not pieces & set(found) and len(found) == len(set(found))
    assert all(word.isalpha() and len(word) > 2 for word in found)
    if tokenizer is sentencepiece_tokenizer:
        assert set(found) <= set(" ".join(TEXTS).split()), "no pieces"


def test_pieces_of_words_are_ruled_out_though_they_tell(trained, monkeypatch):
    """Where fewer words tell than were asked for, the list is shorter."""
    model, tokens, references, length = trained
    kept = {i: word for i, word in whole_words(tokens).items() if word == "red"}
    monkeypatch.setattr(readout, "whole_words", lambda _: kept)
    red, grey = telling_words(model, tokens, references, references, length, 5)
    assert [word for word, _ in red] == ["red"] and grey == []
    monkeypatch.setattr(readout, "whole_words", lambda _: {})
    assert telling_words(model, tokens, references, references, length, 5) == [[], []]
