"""The pairwise sigmoid loss of SigLIP (Zhai et al., ICCV 2023, arXiv:2303.15343), every pair of one object a positive."""

import torch
from torch import Tensor


def sigmoid(
    images: Tensor,
    texts: Tensor,
    image_objects: Tensor,
    text_objects: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    text_weights: Tensor | None = None,
) -> Tensor:
    """Each pair by itself is right or wrong: -log sigmoid(z (scale * cos + bias)), z = 1 for the same object and -1 otherwise.

    A pair stands alone, so one direction is all of the loss: a sum over texts, and the mean over images, as in SigLIP.

    Args:
        images: (n, d) L2-normalised features, the rows this loss is about.
        texts: (N, d) L2-normalised features of the whole global batch.
        image_objects, text_objects: (n,) and (N,) object ids.
        scale: inverse temperature.
        bias: added to each logit; at the start it outweighs the many negatives.
        text_weights: (N,) of the texts, 1 on average: a pair counts as its text weighs.

    Returns:
        Scalar fp32.
    """
    logits = scale * (images.float() @ texts.float().T) + bias  # (n, N)
    same = image_objects[:, None] == text_objects[None, :]
    pairs = torch.nn.functional.softplus(torch.where(same, -logits, logits))
    return (pairs if text_weights is None else pairs * text_weights).sum(1).mean()
