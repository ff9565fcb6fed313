"""Trains the small WordPiece tokenizer that travels with a shard set, so that the default run needs no download."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from mmref.data.sample_reader import SampleReader, sound
from mmref.data.shard_set import load_index
from mmref.errors import SourceError

SPECIAL = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip
CONTINUES = "##"  # marks a piece that does not start a word


def train_captions(root: str, manifest: dict[str, Any]) -> Iterator[str]:
    """Captions of the train split in the order of its index. The manifest may not be on disk yet."""
    reader = SampleReader(load_index(root, "train", manifest["splits"]["train"]["shards"]))
    for record in reader.read_metas(range(len(reader.index))):
        yield from sound(record)["captions"]


def characters(word: str) -> list[str]:
    """The pieces of a word that every vocabulary has."""
    return [word[0], *(CONTINUES + c for c in word[1:])]


def _steps() -> tuple[Any, Any]:
    """What makes words of a text: lower-casing, and cutting at spaces and punctuation."""
    from tokenizers import normalizers, pre_tokenizers

    return normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()


def count_words(captions: Iterable[str]) -> Counter[str]:
    """Words of captions, lower-cased, with their counts."""
    normalizer, pre_tokenizer = _steps()
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(caption)))
    return words


def check_vocab(captions: Iterable[str], size: int) -> None:
    """Raises SourceError where not even the characters of the captions fit."""
    pieces = {piece for word in count_words(captions) for piece in characters(word)}
    if (least := len(SPECIAL) + len(pieces)) > size:
        raise SourceError(
            f"--tokenizer-vocab {size} is too small: the captions of train need {least}, {len(SPECIAL)} special tokens and "
            "each character at the beginning of a word and inside one. Words that are whole need more: a few thousand."
        )


def wordpiece_vocab(words: Counter[str], size: int) -> list[str]:
    """At most `size` pieces for counted words: all characters, then merges by frequency; ties go to the smaller pair.

    The trainers of the tokenizers library break ties by the order of a randomly seeded hash map, so two runs on the
    same text give different vocabularies; a committed tokenizer must be reproducible.
    """
    split = {word: characters(word) for word in words}
    vocab = dict.fromkeys(sorted({piece for pieces in split.values() for piece in pieces}))
    pairs: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[str]] = {}
    for word, pieces in split.items():
        for pair in pairwise(pieces):
            pairs[pair] += words[word]
            where.setdefault(pair, set()).add(word)
    while len(vocab) < size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merged = best[0] + best[1].removeprefix(CONTINUES)
        vocab[merged] = None
        for word in where.pop(best):
            old = split[word]
            split[word] = new = _merge(old, best, merged)
            for pair in pairwise(old):
                pairs[pair] -= words[word]
            for pair in pairwise(new):
                pairs[pair] += words[word]
                where.setdefault(pair, set()).add(word)
        pairs += Counter()  # drops the pairs that are gone
    return list(vocab)


def _merge(pieces: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(pieces):
        hit = tuple(pieces[i : i + 2]) == pair
        out.append(merged if hit else pieces[i])
        i += 2 if hit else 1
    return out


def train_tokenizer(captions: Iterable[str], out: str, vocab_size: int) -> None:
    """Lower-casing WordPiece with `[CLS] x [SEP]`, saved in `out` for AutoTokenizer. Same captions, same files."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    words = count_words(captions)
    pieces = [*SPECIAL.values(), *wordpiece_vocab(words, vocab_size - len(SPECIAL))]  # special tokens are ids 0..4
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = _steps()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[CLS]", eos_token="[SEP]", **SPECIAL)
    fast.save_pretrained(out)
