"""Global fusion and reference-guided learning of MMRef (Ma et al., arXiv:2504.07718): one cross-entropy on cos(R, E)."""

import math
from typing import Literal

import torch
from torch import Tensor


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
    objects, per_object, _ = references.shape
    unseen = (references.detach().abs().amax(-1) == 0).T  # (K, A)
    r = torch.nn.functional.normalize(references.float(), dim=-1).transpose(0, 1)
    f = scale * torch.nn.functional.normalize(features.float(), dim=-1)
    # The cosines are most of what a step keeps in memory: one pass computes, scales and masks them, and an object's K lie so
    # that the objects, and not its few references, are the innermost dimension of what follows.
    absent = torch.zeros_like(unseen, dtype=f.dtype).masked_fill(unseen, -math.inf).flatten()
    logits = torch.addmm(absent, f, r.reshape(per_object * objects, -1).T).view(-1, per_object, objects)
    if per_object == 1:
        return logits[:, 0]
    if reduce == "max":
        return logits.amax(1)
    seen = (~unseen).sum(0).clamp(min=1).log()  # (A,) log of how many references the mean is over
    # The gradient of logsumexp over a row of -inf alone is NaN, so unseen objects get a finite stand-in and are masked
    # afterwards.
    none_seen = unseen.all(0)
    safe = logits.masked_fill(none_seen, 0.0)
    return (safe.logsumexp(1) - seen).masked_fill(none_seen, -math.inf)


def reference_loss(
    features: Tensor,
    references: Tensor,
    targets: Tensor,
    scale: float,
    reduce: Literal["max", "lme"] = "max",
    soft: Tensor | None = None,
    weights: Tensor | None = None,
    margin: float = 0.0,
) -> Tensor:
    """Cross-entropy of each feature's own object among the given references (MMRef, global fusion and its mirror).

    Args:
        features: (n, d) image or text features.
        references: (A, K, d) references of the objects contrasted.
        targets: (n,) row of each feature's own object in `references`.
        scale: inverse temperature.
        reduce: see `reference_scores`.
        soft: (n, A) distributions to match in place of the own object alone, as from `soft_targets`.
        weights: (n,) of the features, 1 on average.
        margin: taken off the cosines with the own object's references, as in CosFace (Wang et al., CVPR 2018, arXiv:1801.09414).

    Returns:
        Scalar fp32, mean over n features; a feature whose object has no reference yet contributes 0.
    """
    logits = reference_scores(features, references, reduce, scale)  # (n, A)
    known = torch.isfinite(logits.gather(1, targets[:, None]))[:, 0]
    logits = torch.where(known[:, None], logits, torch.zeros_like(logits))
    if margin > 0:
        # Off each of an object's K cosines it is off their maximum and their log-mean-exp as well.
        own = torch.full_like(logits[:, :1], -scale * margin)
        logits = logits.scatter_add(1, targets[:, None], own)
    if soft is None:
        loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    else:
        log_p = torch.log_softmax(logits, dim=1)  # -inf where an object has no reference, and there soft is 0
        loss = -torch.where(soft > 0, soft * log_p, torch.zeros_like(log_p)).sum(1)
    if weights is not None:
        loss = loss * weights
    return (loss * known).mean()
