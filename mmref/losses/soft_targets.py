"""Soft targets of guidance: objects whose references are alike share what an ambiguous caption says. Ours."""

import torch
from torch import Tensor


def soft_targets(references: Tensor, targets: Tensor, share: float, scale: float) -> Tensor:
    """Distributions over objects: 1 - share on the own one, share by how alike its reference is to each.

    Objects are compared by the mean of their unit references. No gradient goes through a target.

    Args:
        references: (A, K, d), rows that are all zero (never seen) take no part.
        targets: (n,) row of each feature's own object in `references`.
        share: of the distribution that is spread, 0 to 1.
        scale: inverse temperature of the softmax over objects.

    Returns:
        (n, A) fp32, rows sum to 1; all on the own object where that has no reference yet.
    """
    with torch.no_grad():
        unit = torch.nn.functional.normalize(references.float(), dim=-1)
        centre = torch.nn.functional.normalize(unit.sum(1), dim=-1)  # (A, d)
        seen = references.abs().amax((1, 2)) > 0  # (A,)
        logits = (scale * centre[targets] @ centre.T).masked_fill(~seen[None], -torch.inf)  # (n, A)
        known = seen[targets][:, None]
        alike = torch.where(known, torch.where(known, logits, torch.zeros_like(logits)).softmax(1), 0.0)
        own = torch.nn.functional.one_hot(targets, len(references)).float()
        return torch.where(known, (1 - share) * own + share * alike, own)
