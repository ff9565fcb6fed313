"""The reconstruction head and the masking of words."""

from __future__ import annotations

import pytest
import torch

from mmref.model.word_decoder import ImageWordHead, ReconstructionHead, mask_words, places_of

SPECIAL_IDS = (0, 1, 2)  # padding, start, end
MASK = 3


def head(memory_tokens=3, layers=1):
    torch.manual_seed(0)
    return ReconstructionHead(embed_dim=6, width=32, vocab_size=50, layers=layers, memory_tokens=memory_tokens)


def inputs(per_object=2):
    """Four captions of 7, 5, 3 and 7 tokens; masked positions scattered, none in the third."""
    g = torch.Generator().manual_seed(1)
    states = torch.randn(4, 7, 32, generator=g)
    mask = torch.tensor([[1] * n + [0] * (7 - n) for n in (7, 5, 3, 7)])
    at = torch.zeros(4, 7, dtype=torch.bool)
    for row, column in ((0, 1), (0, 4), (1, 3), (3, 2), (3, 5), (3, 6)):
        at[row, column] = True
    references = torch.nn.functional.normalize(torch.randn(4, per_object, 6, generator=g), dim=-1)
    return states, mask, references, at


@pytest.mark.parametrize("layers", [1, 2])
def test_masked_positions_only_equal_all_positions_then_selected(layers):
    model, (states, mask, references, at) = head(layers=layers), inputs()
    sizes = []
    model.vocabulary.register_forward_hook(lambda _, given, __: sizes.append(given[0].shape[0]))
    logits = model(states, mask, references, places_of(at))
    assert logits.shape == (6, 50) and sizes == [6], "the vocabulary layer sees the masked positions alone"
    everywhere = model(states, mask, references, places_of(torch.ones_like(at))).view(4, 7, 50)
    torch.testing.assert_close(logits, everywhere[at])


def test_no_masked_word_gives_no_rows():
    states, mask, references, at = inputs()
    assert head()(states, mask, references, places_of(torch.zeros_like(at))).shape == (0, 50)


def test_padding_does_not_leak():
    model, (states, mask, references, at) = head(), inputs()
    logits = model(states, mask, references, places_of(at))
    noisy = torch.where(mask[..., None] == 0, torch.randn_like(states) * 9, states)
    torch.testing.assert_close(model(noisy, mask, references, places_of(at)), logits)
    short = model(states[1:2, :5], mask[1:2, :5], references[1:2], places_of(at[1:2, :5]))
    torch.testing.assert_close(short, logits[2:3])


def test_words_read_out_of_the_own_image_alone():
    torch.manual_seed(0)
    model, (states, mask, _, chosen) = ImageWordHead(width=32, vocab_size=50, layers=2), inputs()
    at = places_of(chosen)
    tokens = torch.randn(4, 9, 32, generator=torch.Generator().manual_seed(2))
    logits = model(states, mask, tokens, at)
    assert logits.shape == (6, 50)
    everywhere = model(states, mask, tokens, torch.arange(chosen.numel())).view(4, 7, 50)
    torch.testing.assert_close(logits, everywhere[chosen])
    noisy = torch.where(mask[..., None] == 0, torch.randn_like(states) * 9, states)
    torch.testing.assert_close(model(noisy, mask, tokens, at), logits, msg="padding leaks")
    changed = tokens.clone()
    changed[0] = torch.randn(9, 32)
    other = model(states, mask, changed, at)
    assert not torch.allclose(other[:2], logits[:2]), "the image does not matter"
    torch.testing.assert_close(other[2:], logits[2:])
    model(states, mask, tokens, at).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    # what the caption says reaches the words through its questions to the image alone, as in IRRA
    with torch.no_grad():
        model.cross_attention.out_proj.weight.zero_()
    torch.testing.assert_close(model(torch.randn_like(states), mask, tokens, at), model(states, mask, tokens, at))


@pytest.mark.parametrize("memory_tokens, per_object", [(3, 1), (1, 2), (3, 2)])
def test_logits_depend_on_the_own_reference_alone(memory_tokens, per_object):
    model, (states, mask, references, at) = head(memory_tokens), inputs(per_object)
    logits = model(states, mask, references, places_of(at))
    references = references.clone()
    references[0] = -references[0]
    changed = model(states, mask, references, places_of(at))
    assert (changed[:2] - logits[:2]).abs().max() > 1e-3
    torch.testing.assert_close(changed[2:], logits[2:])


@pytest.mark.parametrize("memory_tokens, per_object, depends", [(1, 1, False), (3, 1, True), (1, 2, True)])
def test_with_several_keys_attention_depends_on_the_query(memory_tokens, per_object, depends):
    """With one key the attention weight is always 1, so what is read does not depend on the word."""
    model, (states, mask, references, at) = head(memory_tokens), inputs(per_object)
    read = []
    attention = model.blocks[0].cross_attention.attention
    attention.register_forward_hook(lambda _, __, out: read.append(out[0]))
    model(states, mask, references, places_of(at))
    model(states.flip(1), torch.ones_like(mask), references, places_of(at))
    across_words = (read[0] - read[0][:, :1]).abs().max()
    assert (across_words > 1e-4) == depends and ((read[1] - read[0]).abs().max() > 1e-4) == depends


def test_gradient_reaches_states_references_and_every_parameter():
    model, (states, mask, references, at) = head(), inputs()
    states.requires_grad_()
    references.requires_grad_()
    model(states, mask, references, places_of(at)).square().mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert (references.grad[[0, 1, 3]].abs().amax((1, 2)) > 0).all() and (references.grad[2] == 0).all()
    assert (states.grad[mask == 0] == 0).all()


def captions(n=400, length=20):
    """Random captions: start, 3 to length - 2 words with ids from 10, end, padding."""
    g = torch.Generator().manual_seed(0)
    words = torch.randint(10, 1000, (n, length), generator=g)
    ends = torch.randint(4, length, (n,), generator=g)
    column = torch.arange(length)[None]
    ids = torch.where(column < ends[:, None], words, torch.zeros_like(words))
    ids[:, 0] = 1
    ids[torch.arange(n), ends] = 2
    return ids, torch.isin(ids, torch.tensor(SPECIAL_IDS))


def masked(ids, special, rate=0.15, seed=0, vocab=1000):
    draws = torch.rand(*ids.shape, 3, generator=torch.Generator().manual_seed(seed))
    return mask_words(ids, special, rate, MASK, vocab, draws)


def test_shares_of_masking():
    ids, special = captions(2000)
    out, chosen = masked(ids, special, 0.3)
    words = (~special).sum().item()
    assert chosen.sum().item() / words == pytest.approx(0.3, abs=0.015)
    became_mask = (out[chosen] == MASK).float().mean().item()
    stayed = (out[chosen] == ids[chosen]).float().mean().item()
    assert became_mask == pytest.approx(0.8, abs=0.02)
    assert stayed == pytest.approx(0.1, abs=0.02)
    other = chosen & (out != MASK) & (out != ids)
    assert out[other].min() < 100 and out[other].max() > 900, "random words come from the whole vocabulary"


def test_only_chosen_words_change_and_specials_never():
    ids, special = captions()
    out, chosen = masked(ids, special, 0.9)
    assert not (chosen & special).any()
    assert torch.equal(out[~chosen], ids[~chosen])


def test_a_caption_without_a_chosen_word_gets_its_first():
    ids, special = captions()
    _, chosen = masked(ids, special, 0.0)
    assert torch.equal(chosen.sum(1), torch.ones(len(ids), dtype=torch.long)) and chosen[:, 1].all()
    _, chosen = masked(ids, special, 0.15)
    assert (chosen.sum(1) >= 1).all()


def test_a_caption_without_words_stays():
    ids = torch.tensor([[1, 2, 0, 0], [1, 50, 2, 0]])
    out, chosen = masked(ids, torch.isin(ids, torch.tensor(SPECIAL_IDS)), 1.0)
    assert torch.equal(out[0], ids[0]) and chosen.tolist() == [[False] * 4, [False, True, False, False]]


def test_the_draws_alone_decide_and_each_caption_s_own():
    ids, special = captions()
    torch.manual_seed(5)
    whole = masked(ids, special, seed=3)
    torch.manual_seed(6)
    draws = torch.rand(*ids.shape, 3, generator=torch.Generator().manual_seed(3))
    half = mask_words(ids[200:], special[200:], 0.15, MASK, 1000, draws[200:])
    assert all(torch.equal(a, b[200:]) for a, b in zip(half, whole, strict=True))
    assert not torch.equal(masked(ids, special, seed=4)[1], whole[1])


def test_the_largest_draw_is_still_a_word():
    ids, special = captions(5)
    for vocab in (1000, 1025, 49_408):
        out, chosen = mask_words(ids, special, 1.0, MASK, vocab, torch.full((*ids.shape, 3), 1 - 2**-24))
        assert torch.equal(chosen, ~special) and (out[chosen] == vocab - 1).all()
