"""Masked words read out of their object's reference (MMRef's local reconstruction), or out of their own image (IRRA)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FeedForward(nn.Module):
    """Pre-norm residual feed-forward layer, 4 x wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(self.norm(x))


class Attention(nn.Module):
    """Pre-norm residual multi-head attention of x to itself, or to a memory."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor, memory: Tensor | None = None, padding: Tensor | None = None) -> Tensor:
        q = self.norm(x)
        kv = q if memory is None else memory
        out, _ = self.attention(q, kv, kv, key_padding_mask=padding, need_weights=False)
        return x + out


class ReconstructionBlock(nn.Module):
    """H = FFN2(MCA(FFN1(MSA(Q)), K, V)), with K and V made from the references (paper)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attention, self.ffn1 = Attention(width, heads), FeedForward(width)
        self.cross_attention, self.ffn2 = Attention(width, heads), FeedForward(width)

    def forward(self, q: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        return self.ffn2(self.cross_attention(self.ffn1(self.self_attention(q, padding=padding)), memory))


class ReconstructionHead(nn.Module):
    """Predicts masked words from masked-token states and the references of the sample's object.

    One key would make every attention weight 1 (the cross-attention reduced to adding a vector), so each reference
    gives `memory_tokens` keys and values. The vocabulary layer sees the masked positions only.
    """

    def __init__(self, embed_dim: int, width: int, vocab_size: int, layers: int, memory_tokens: int) -> None:
        super().__init__()
        heads = heads_of(width)
        self.memory_tokens = memory_tokens
        self.to_memory = nn.Linear(embed_dim, memory_tokens * width)
        self.memory_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(ReconstructionBlock(width, heads) for _ in range(layers))
        self.transform = _transform(width)
        self.vocabulary = nn.Linear(width, vocab_size)

    def forward(self, states: Tensor, mask: Tensor, references: Tensor, at: Tensor) -> Tensor:
        """Logits of the masked words.

        Args:
            states: (B, L, width) text-token states of the masked captions (Q).
            mask: (B, L) 1 on tokens, 0 on padding.
            references: (B, K, d) normalised references of each sample's object.
            at: (M,) places of the masked words in the flattened captions, b L + l.

        Returns:
            (M, vocabulary), in the order of `at`.
        """
        batch, per_object, _ = references.shape
        memory = self.to_memory(references.to(states.dtype)).view(batch, per_object * self.memory_tokens, -1)
        memory = self.memory_norm(memory)  # (B, K k, width)
        hidden, padding = states, mask == 0
        for block in self.blocks:
            hidden = block(hidden, memory, padding)
        return self.vocabulary(self.transform(hidden.flatten(0, 1).index_select(0, at)))


class ImageWordHead(nn.Module):
    """Predicts masked words from masked-token states and the tokens of the caption's own image, both in the shared space.

    IRRA's head: one cross-attention to the image, whose answer alone goes on (no residual: what the masked caption says by
    itself is not enough), then self-attention layers, then the vocabulary, at the masked positions only. Width, heads and
    initial weights are IRRA's too.
    """

    def __init__(self, width: int, vocab_size: int, layers: int) -> None:
        super().__init__()
        heads = heads_of(width, 64)
        self.query_norm, self.memory_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.self_attentions = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.feed_forwards = nn.ModuleList(FeedForward(width) for _ in range(layers))
        self.last_norm = nn.LayerNorm(width)
        self.transform = _transform(width)
        self.vocabulary = nn.Linear(width, vocab_size)
        self._initialise(width, layers)

    def _initialise(self, width: int, layers: int) -> None:
        inner, out, wide = width**-0.5, (2 * max(layers, 1) * width) ** -0.5, (2 * width) ** -0.5
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, std=inner)
                nn.init.normal_(module.out_proj.weight, std=out)
            elif isinstance(module, FeedForward):
                first, last = (m for m in module.net if isinstance(m, nn.Linear))
                nn.init.normal_(first.weight, std=wide)
                nn.init.normal_(last.weight, std=out)
        dense = next(m for m in self.transform if isinstance(m, nn.Linear))
        nn.init.normal_(dense.weight, std=wide)
        nn.init.normal_(self.vocabulary.weight, std=out)

    def forward(self, states: Tensor, mask: Tensor, image_tokens: Tensor, at: Tensor) -> Tensor:
        """Logits (M, vocabulary) of the masked words; arguments as of `ReconstructionHead`, image_tokens (B, N, width)."""
        memory = self.memory_norm(image_tokens)
        hidden, _ = self.cross_attention(self.query_norm(states), memory, memory, need_weights=False)
        padding = mask == 0
        for attend, feed in zip(self.self_attentions, self.feed_forwards, strict=True):
            hidden = feed(attend(hidden, padding=padding))
        return self.vocabulary(self.transform(self.last_norm(hidden.flatten(0, 1).index_select(0, at))))


def heads_of(width: int, numbers: int = 32) -> int:
    """The most heads of at least about so many numbers each that divide the width."""
    return max(h for h in range(1, width // numbers + 2) if width % h == 0)


def _transform(width: int) -> nn.Sequential:
    """What BERT has between its last layer and its vocabulary."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))


def places_of(chosen: Tensor) -> Tensor:
    """Where words are chosen in captions (B, L), True there: (M,) places in the flattened captions. The host waits for a
    GPU that is asked for it."""
    return chosen.flatten().nonzero()[:, 0]


def mask_words(ids: Tensor, special: Tensor, rate: float, mask_id: int, vocab_size: int, draws: Tensor) -> tuple[Tensor, Tensor]:
    """BERT's masking: of the chosen words 80 % become the mask token, 10 % a random word, 10 % stay.

    Args:
        ids: (B, L) token ids.
        special: (B, L) True where a token must not be masked (padding, start, end).
        rate: share of words chosen; a caption in which none is chosen has its first word masked.
        mask_id: id of the mask token.
        vocab_size: random words are drawn below it.
        draws: (B, L, 3) uniform in [0, 1): of each token whether it is chosen, what becomes of it, and a random word.

    Returns:
        masked ids (B, L) and the chosen positions (B, L) bool.
    """
    choice, kind, word = draws.unbind(-1)
    random_words = (word * vocab_size).long()
    chosen = (choice < rate) & ~special
    first = (~special).int().argmax(1)  # (B,) position of the first word
    none = ~chosen.any(1) & (~special).any(1)
    chosen[torch.arange(ids.shape[0], device=ids.device), first] |= none
    masked = torch.where(chosen & (kind < 0.8), torch.full_like(ids, mask_id), ids)
    return torch.where(chosen & (kind >= 0.9), random_words, masked), chosen
