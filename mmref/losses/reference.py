"""Global fusion and reference-guided learning: one cross-entropy on cos(R, E)."""

import math
from typing import Literal

import torch
from torch import Tensor


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Identity whose gradient is multiplied by `factor` (0: stop-gradient).

    Fusion is w_fuse CE(cos(R, sg E)) and guidance w_guide CE(cos(sg R, E)): the same value with two gradient paths.
    Scaling each path by its weight gives both from one matrix of logits.
    """
    return x.detach() if factor == 0.0 else _ScaleGradient.apply(x, factor)


def reference_scores(features: Tensor, references: Tensor, reduce: Literal["max", "lme"], scale: float) -> Tensor:
    """Scaled cosine of each feature with each object: best or log-mean-exp over the object's K references.

    Args:
        features: (n, d), normalised here.
        references: (A, K, d), normalised here; rows that are all zero (never seen) score -inf.
        reduce: how the K references of an object make one score.
        scale: inverse temperature.

    Returns:
        (n, A) fp32 logits.
    """
    unseen = references.detach().abs().amax(-1) == 0  # (A, K)
    r = torch.nn.functional.normalize(references.float(), dim=-1)
    f = torch.nn.functional.normalize(features.float(), dim=-1)
    logits = scale * torch.einsum("nd,akd->nak", f, r)
    logits = logits.masked_fill(unseen[None], -math.inf)
    if references.shape[1] == 1:
        return logits[:, :, 0]
    if reduce == "max":
        return logits.amax(-1)
    seen = (~unseen).sum(-1).clamp(min=1).log()  # (A,) log of how many references the mean is over
    # logsumexp over a row of -inf only has a NaN gradient: give unseen objects a finite stand-in and mask them after
    none_seen = unseen.all(-1)
    safe = logits.masked_fill(none_seen[None, :, None], 0.0)
    return (safe.logsumexp(-1) - seen).masked_fill(none_seen[None], -math.inf)


def reference_loss(
    features: Tensor,
    references: Tensor,
    targets: Tensor,
    scale: float,
    reduce: Literal["max", "lme"] = "max",
) -> Tensor:
    """Cross-entropy of each feature's own object among the given references (MMRef, global fusion and its mirror).

    Args:
        features: (n, d) image or text features.
        references: (A, K, d) references of the objects contrasted.
        targets: (n,) row of each feature's own object in `references`.
        scale: inverse temperature.
        reduce: see `reference_scores`.

    Returns:
        Scalar fp32, mean over n features; a feature whose object has no reference yet contributes 0.
    """
    logits = reference_scores(features, references, reduce, scale)  # (n, A)
    known = torch.isfinite(logits.gather(1, targets[:, None]))[:, 0]
    logits = torch.where(known[:, None], logits, torch.zeros_like(logits))
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return (loss * known).mean()
