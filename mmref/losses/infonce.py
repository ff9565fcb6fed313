"""Identity-aware (multi-positive) InfoNCE: every pair of one object is a positive.

InfoNCE is of van den Oord et al. 2018 (arXiv:1807.03748), several positives as in Khosla et al. 2020 (arXiv:2004.11362). MMRef
aligns images and texts with it (Ma et al., arXiv:2504.07718).
"""

import torch
from torch import Tensor


def infonce(
    anchors: Tensor,
    others: Tensor,
    anchor_objects: Tensor,
    other_objects: Tensor,
    scale: Tensor | float,
    weights: Tensor | None = None,
    other_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy between softmax(scale * cos) and the uniform distribution over the anchor's positives.

    Every `other` of the same object is a positive, so an image is pulled to all captions of its object (supervised
    contrastive learning, Khosla et al. 2020, the mean outside the logarithm; with one positive it is plain InfoNCE).

    Args:
        anchors: (n, d) L2-normalised features, the rows this loss is about.
        others: (N, d) L2-normalised features of the other modality, the whole global batch.
        anchor_objects: (n,) object ids of the anchors.
        other_objects: (N,) object ids of the others; each anchor has at least one equal id.
        scale: inverse temperature.
        weights: (n,) of the anchors, 1 on average over the global batch.
        other_weights: (N,) of the others, 1 on average: a pair of an anchor and its positive counts as that positive weighs.

    Returns:
        Scalar fp32, mean over anchors.
    """
    logits = scale * (anchors.float() @ others.float().T)  # (n, N)
    positive = anchor_objects[:, None] == other_objects[None, :]  # (n, N)
    log_p = torch.log_softmax(logits, dim=1)
    share = positive if other_weights is None else positive * other_weights
    per_anchor = -(log_p * share).sum(1) / positive.sum(1)
    return (per_anchor if weights is None else per_anchor * weights).mean()
