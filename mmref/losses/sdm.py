"""Similarity distribution matching, the alignment of IRRA (Jiang and Ye, CVPR 2023, arXiv:2303.12501)."""

import torch
from torch import Tensor


def sdm(
    anchors: Tensor,
    others: Tensor,
    anchor_objects: Tensor,
    other_objects: Tensor,
    scale: Tensor | float,
    weights: Tensor | None = None,
    other_weights: Tensor | None = None,
    epsilon: float = 1e-8,
) -> Tensor:
    """KL(p || q) between the softmax p of similarities and the normalised match distribution q (IRRA, Jiang & Ye 2023).

    Args, shapes and return as `infonce`: with `other_weights` q is in proportion to them, and an anchor counts as its positives
    weigh on average. `epsilon` keeps log q finite where q is 0 (1e-8 in IRRA).
    """
    logits = scale * (anchors.float() @ others.float().T)  # (n, N)
    match = (anchor_objects[:, None] == other_objects[None, :]).float()
    share = match if other_weights is None else match * other_weights
    q = share / share.sum(1, keepdim=True).clamp(min=epsilon)
    log_p = torch.log_softmax(logits, dim=1)
    per_anchor = (log_p.exp() * (log_p - torch.log(q + epsilon))).sum(1)
    if other_weights is not None:
        per_anchor = per_anchor * share.sum(1) / match.sum(1)
    return (per_anchor if weights is None else per_anchor * weights).mean()
