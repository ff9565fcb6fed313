"""Transformer layers over the tokens of a tower: what is trained where the tower itself is not."""

from __future__ import annotations

from torch import Tensor, nn

from mmref.model.word_decoder import Attention, FeedForward, heads_of


class Adapter(nn.Module):
    """Tokens (B, N, width) of a tower -> (B, N, dim): a projection, `layers` pre-norm layers, a last norm."""

    def __init__(self, width: int, dim: int, layers: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, dim)
        self.attentions = nn.ModuleList(Attention(dim, heads_of(dim)) for _ in range(layers))
        self.feed_forwards = nn.ModuleList(FeedForward(dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask: (B, N) 1 on tokens, 0 on padding; None where all are tokens."""
        hidden, padding = self.project(tokens), None if mask is None else mask == 0
        for attend, feed in zip(self.attentions, self.feed_forwards, strict=True):
            hidden = feed(attend(hidden, padding=padding))
        return self.norm(hidden)
