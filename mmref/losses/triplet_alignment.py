"""The triplet alignment loss (TAL) of RDE (Qin et al., CVPR 2024, arXiv:2308.09911)."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = -1e4  # in place of a positive's logit among the negatives: its exponential is 0, and the gradient stays finite without any


def triplet_alignment(
    anchors: Tensor,
    others: Tensor,
    anchor_objects: Tensor,
    other_objects: Tensor,
    tau: float,
    margin: float,
    own: Tensor | None = None,
) -> Tensor:
    """How far an anchor's positives fail to be `margin` above a soft maximum over its negatives:
    max(0, margin - sum_p a_p cos_p + tau log sum_n exp(cos_n / tau)), a = softmax over the positives of cos / tau, a constant.

    The soft maximum is above the largest cosine, and near it at a small `tau`: a hard negative counts most, not alone.

    Args:
        anchors: (n, d) L2-normalised features, the rows this loss is about.
        others: (N, d) L2-normalised features of the other modality, the whole global batch.
        anchor_objects, other_objects: (n,) and (N,) object ids. Positives are those of the same object, negatives the rest.
        tau: temperature of both sums.
        own: (n,) row of each anchor's own partner in `others`, to take as its only positive; others of the object then count
            on neither side. By default all are positives.

    Returns:
        (n,) fp32, one for each anchor.
    """
    cosines = anchors.float() @ others.float().T  # (n, N)
    same = anchor_objects[:, None] == other_objects[None, :]
    negative = tau * (cosines / tau).masked_fill(same, FAR).logsumexp(1)
    if own is None:
        share = (cosines.detach() / tau).masked_fill(~same, -torch.inf).softmax(1)
        positive = (share * cosines).sum(1)
    else:
        positive = cosines.gather(1, own[:, None])[:, 0]
    return (margin - positive + negative).clamp(min=0)
