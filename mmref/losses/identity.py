"""Identity classification of both features, a part of IRRA's objective (Jiang and Ye, CVPR 2023, arXiv:2303.12501)."""

import torch
from torch import Tensor


def identity_loss(image_logits: Tensor, text_logits: Tensor, objects: Tensor) -> Tensor:
    """Sum over samples of the cross-entropies of both modalities; the caller divides by twice the global batch.

    A sum, not a mean, for the same reason as `reconstruction_loss`.

    Args:
        image_logits, text_logits: (n, m) scores of the m training objects by one shared classifier.
        objects: (n,) object row of each sample.

    Returns:
        Scalar fp32.
    """
    both = torch.cat([image_logits, text_logits]).float()
    return torch.nn.functional.cross_entropy(both, objects.repeat(2), reduction="sum")
