"""Weights of captions by how well they agree with the reference of their object: a wrong caption counts less."""

import torch
from torch import Tensor


def agreement(text: Tensor, own: Tensor) -> Tensor:
    """Cosine of each caption with the nearest of its object's references: (n, d), (n, K, d) -> (n,) fp32.

    NaN where the object has no reference yet. No gradient goes through it.
    """
    with torch.no_grad():
        unit = torch.nn.functional.normalize(own.float(), dim=-1)
        cosine = torch.einsum("nd,nkd->nk", torch.nn.functional.normalize(text.float(), dim=-1), unit)
        seen = own.abs().amax(-1) > 0  # (n, K)
        best = cosine.masked_fill(~seen, -torch.inf).amax(1)
        return torch.where(seen.any(1), best, torch.full_like(best, torch.nan))


def agreement_weights(agreements: Tensor, sharpness: float) -> Tensor:
    """exp(sharpness x agreement), scaled to 1 on average over the global batch: (N,) -> (N,).

    A caption whose object has no reference yet (NaN) has the mean agreement. Sharpness 0 weighs all alike.
    """
    known = ~agreements.isnan()
    mean = torch.where(known, agreements, 0.0).sum() / known.sum().clamp(min=1)
    weights = torch.exp(sharpness * (torch.where(known, agreements, mean) - mean))
    return weights / weights.mean()
