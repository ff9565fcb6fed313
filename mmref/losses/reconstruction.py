"""Local reconstruction of MMRef (Ma et al., arXiv:2504.07718): cross-entropy on masked words.

IRRA's masked words, predicted from the image, have the same loss.
"""

import torch
from torch import Tensor


def reconstruction_loss(logits: Tensor, words: Tensor) -> Tensor:
    """Sum of cross-entropies of the masked words; the caller divides by the count over the whole global batch.

    A sum, not a mean: ranks and micro-batches hold different numbers of masked words, and only one division by the
    global count makes the loss independent of how the batch was cut.

    Args:
        logits: (M, vocabulary) predictions at the masked positions.
        words: (M,) the words that were masked.

    Returns:
        Scalar fp32, 0 when M is 0.
    """
    if words.numel() == 0:
        return logits.float().sum()  # keeps the graph: every rank takes part in the backward of every parameter
    return torch.nn.functional.cross_entropy(logits.float(), words, reduction="sum")
