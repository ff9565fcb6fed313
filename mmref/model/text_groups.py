"""Captions of a batch encoded in groups of like length, each cut to its longest: padding costs what words cost.

Of emoji's captions the mean has 10 of 24 tokens, and nearly every batch has one of 24.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

# Families of text towers whose features do not see padding. Others do, as SigLIP's, which reads the last place, and ConvBERT's,
# whose convolutions reach beyond a caption; or nobody has looked.
BLIND_TO_PADDING = {
    "albert", "bert", "camembert", "chinese_clip_text_model", "clip", "clip_text_model", "deberta", "deberta-v2", "distilbert",
    "electra", "metaclip_2", "metaclip_2_text_model", "modernbert", "mpnet", "roberta", "xlm-roberta",
}  # fmt: skip
GROUPS = 4
"""Groups of a batch, as many on all workers, which ZeRO-3 needs. On emoji they leave 13 of 24 tokens, twice as many would leave
12."""


class TextGroup(NamedTuple):
    """Some captions of a batch."""

    rows: Tensor | None  # (g,) their places in the batch; None for all captions, in their order
    tokens: int  # of the longest


def group_texts(mask: NDArray[Any], device: torch.device | str = "cpu") -> list[TextGroup]:
    """Captions in groups by length; `mask` (B, L) is 1 on the tokens of each caption, which come before its padding."""
    lengths = mask.sum(1)
    if torch.device(device).type != "cpu":  # what several groups cost a GPU in launches is not measured yet
        return [TextGroup(None, max(1, int(lengths.max())))]
    parts = np.array_split(np.argsort(lengths, kind="stable"), min(GROUPS, len(lengths)))
    return [TextGroup(torch.from_numpy(rows), max(1, int(lengths[rows].max()))) for rows in parts]


def encode_groups(
    encode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ids: Tensor, mask: Tensor, groups: list[TextGroup]
) -> tuple[Tensor, Tensor]:
    """What `encode` gives for captions (B, L) and their mask: features (B, d) and tokens (B, L, w), zero where a group ends."""
    features, tokens, places = [], [], []
    for rows, longest in groups:
        of_group, its_tokens = encode(*((x if rows is None else x[rows])[:, :longest] for x in (ids, mask)))
        features.append(of_group)
        tokens.append(F.pad(its_tokens, (0, 0, 0, ids.shape[1] - longest)))
        if rows is not None:
            places.append(rows)
    if not places:
        return features[0], tokens[0]
    back = torch.cat(places).argsort()
    return torch.cat(features)[back], torch.cat(tokens)[back]
