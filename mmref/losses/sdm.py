"""Similarity distribution matching."""

import torch
from torch import Tensor


def sdm(
    anchors: Tensor,
    others: Tensor,
    anchor_objects: Tensor,
    other_objects: Tensor,
    scale: Tensor | float,
    weights: Tensor | None = None,
    epsilon: float = 1e-8,
) -> Tensor:
    """KL(p || q) between the softmax p of similarities and the normalised match distribution q (IRRA, Jiang & Ye 2023).

    Args, shapes and return as `infonce`; `epsilon` keeps log q finite where q is 0 (1e-8 in IRRA).
    """
    logits = scale * (anchors.float() @ others.float().T)  # (n, N)
    match = (anchor_objects[:, None] == other_objects[None, :]).float()
    q = match / match.sum(1, keepdim=True)
    log_p = torch.log_softmax(logits, dim=1)
    per_anchor = (log_p.exp() * (log_p - torch.log(q + epsilon))).sum(1)
    return (per_anchor if weights is None else per_anchor * weights).mean()
