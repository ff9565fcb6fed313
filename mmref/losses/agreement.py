"""Weights of captions by how well they agree with the reference of their object: a wrong caption counts less. Ours."""

from typing import Literal

import torch
from torch import Tensor

from mmref.losses.reference_contrast import reference_scores


def agreement(text: Tensor, references: Tensor, targets: Tensor, reduce: Literal["max", "lme"] = "max") -> Tensor:
    """Share of the other objects whose references a caption resembles less than those of its own object, 0 to 1.

    To a caption of some other object its own is one like any: its share is uniform over 0 to 1, whatever the temperature, the
    spread of the features or the stage of training. A right caption is close to 1, once references tell objects apart.

    Args:
        text: (n, d) features of captions.
        references: (A, K, d) of the objects compared; all zero where never seen.
        targets: (n,) row of each caption's own object in `references`.
        reduce: see `reference_scores`.

    Returns:
        (n,) fp32; NaN where the own object, or every other one, has no reference yet. No gradient goes through it.
    """
    with torch.no_grad():
        scores = reference_scores(text, references, reduce, 1.0)  # (n, A)
        own = scores.gather(1, targets[:, None])  # (n, 1)
        seen = torch.isfinite(scores)
        others = seen.sum(1) - 1  # (n,)
        share = ((scores < own) & seen).sum(1) / others
        return torch.where(torch.isfinite(own[:, 0]) & (others > 0), share, torch.full_like(share, torch.nan))


def agreement_weights(agreements: Tensor, sharpness: float) -> Tensor:
    """exp(sharpness x agreement), scaled to 1 on average over the global batch: (N,) -> (N,).

    A caption without an agreement (NaN) has the mean one. Sharpness 0 weighs all alike.
    """
    known = ~agreements.isnan()
    mean = torch.where(known, agreements, 0.0).sum() / known.sum().clamp(min=1)
    agreements = torch.where(known, agreements, mean)
    weights = torch.exp(sharpness * (agreements - agreements.max()))  # at most 1: a sharp weight must not overflow
    return weights / weights.mean()
