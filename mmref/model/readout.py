"""What the reconstruction head reads out of references: a caption by iterative unmasking, and words that tell them apart."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from mmref.data.tokens import Tokens
from mmref.model.mmref import MMRef
from mmref.model.word_decoder import places_of

WORD_STARTS = "\N{LOWER ONE EIGHTH BLOCK}", "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # of SentencePiece and byte-level BPE
WORD_END = "</w>"  # of CLIP's
MARKED = 0.02  # of a vocabulary has a mark that its tokenizer uses: a word or two of another begin with these letters by chance
LETTERS = 3  # of the shortest word that tells something
TWICE = 2  # a word may stand in a reference's text this often
EPS = 1e-9


@torch.no_grad()
def read_captions(model: MMRef, tokens: Tokens, references: Tensor, length: int) -> list[str]:
    """A caption for each object's references (n, K, d), made of `length` masks.

    At each step the head predicts every mask of a caption from its words so far and the references, and the most certain
    word takes its place. Special tokens, neighbours alike and a third use of a word are ruled out.
    """
    assert model.reconstruct is not None
    ids, mask = _masks(tokens, length, len(references), references.device)
    special = torch.as_tensor(tokens.special_ids, device=ids.device)
    for _ in range(int((ids[0] == tokens.mask_id).sum())):
        at = ids == tokens.mask_id
        logits = _logits(model, ids, mask, at, references)  # (n, masks left, vocabulary)
        logits[..., special] = -math.inf
        logits[..., tokens.vocab_size :] = -math.inf
        for row, (words, places) in enumerate(zip(ids, at)):
            position = places.nonzero()[:, 0]
            used = words[~places].bincount(minlength=logits.shape[-1])
            logits[row, :, used >= TWICE] = -math.inf
            for shift in (-1, 1):  # positions are inside the caption: a start and an end token surround them
                near = words[(position + shift).clamp(0, len(words) - 1)]
                logits[row, torch.arange(len(position)), near] = -math.inf
            certainty, word = logits[row].softmax(-1).max(-1)
            best = int(certainty.argmax())
            ids[row, position[best]] = word[best]
    return [tokens.tokenizer.decode(row[m.bool()].tolist(), skip_special_tokens=True) for row, m in zip(ids, mask)]


@torch.no_grad()
def telling_words(
    model: MMRef, tokens: Tokens, references: Tensor, others: Tensor, length: int, count: int
) -> list[list[tuple[str, float]]]:
    """For each object's references (n, K, d) the words which the head expects more of them than of others (m, K, d).

    Words by p log(p / p_others), p being a word's probability on average over the positions of a caption of masks; with
    each the ratio p / p_others. Pieces of words are left out, as far as the tokenizer marks them.
    """
    own, usual = _expected(model, tokens, references, length), _expected(model, tokens, others, length).mean(0)
    ratio = (own + EPS) / (usual + EPS)
    words = whole_words(tokens)
    whole = torch.zeros(own.shape[1], dtype=torch.bool)
    whole[list(words)] = True
    value = (own * ratio.log()).cpu().masked_fill(~whole, -math.inf)
    best = [of_object.topk(min(count, len(words))).indices.tolist() for of_object in value]
    return [[(words[i], float(ratio[row, i])) for i in found if value[row, i] > 0] for row, found in enumerate(best)]


@functools.lru_cache(maxsize=1)
def whole_words(tokens: Tokens) -> dict[int, str]:
    """Words of at least three letters by their ids, spelled as in a caption: without the tokenizer's marks.

    SentencePiece and byte-level BPE mark the tokens that begin a word, CLIP's BPE those that end one, and WordPiece those
    that go on in one, by a sign that is no letter.
    """
    tokenizer = tokens.tokenizer
    pieces = [piece or "" for piece in tokenizer.convert_ids_to_tokens(list(range(tokens.vocab_size)))]
    bare = dict(enumerate(pieces))
    for mark in (WORD_END, *WORD_STARTS):
        marked = {i: piece for i, piece in enumerate(pieces) if piece != mark and _without(mark, piece) != piece}
        if len(marked) >= MARKED * len(pieces):
            bare = {i: _without(mark, piece) for i, piece in marked.items()}
            break
    special = set(tokens.special_ids.tolist())
    spelled = {i: tokenizer.convert_tokens_to_string([piece]) for i, piece in bare.items() if i not in special}
    return {i: word for i, word in spelled.items() if word.isalpha() and len(word) >= LETTERS}


def _without(mark: str, piece: str) -> str:
    return piece.removesuffix(mark) if mark == WORD_END else piece.removeprefix(mark)


def _expected(model: MMRef, tokens: Tokens, references: Tensor, length: int) -> Tensor:
    """(n, words of the tokenizer) probability of each word on average over a caption of masks."""
    ids, mask = _masks(tokens, length, len(references), references.device)
    logits = _logits(model, ids, mask, ids == tokens.mask_id, references)
    return logits.softmax(-1).mean(1)[:, : tokens.vocab_size]


def _masks(tokens: Tokens, length: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(count, L) ids and mask of captions of masks, with what the tokenizer puts around a caption."""
    ids, mask = tokens([" ".join([tokens.tokenizer.mask_token] * length)])
    return tuple(torch.from_numpy(a).long().repeat(count, 1).to(device) for a in (ids, mask))  # type: ignore[return-value]


def _logits(model: MMRef, ids: Tensor, mask: Tensor, at: Tensor, references: Tensor) -> Tensor:
    """(n, masks, vocabulary); every caption has as many masks."""
    assert model.reconstruct is not None
    unit = torch.nn.functional.normalize(references.float(), dim=-1)
    with model.keeping_nothing():
        states = model.backbone.encode_text(ids, mask)[1]
    return model.reconstruct(states, mask, unit, places_of(at)).float().view(len(ids), -1, model.backbone.vocab_size)
