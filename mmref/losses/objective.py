"""The objective of MMRef: features and references in, named losses out.

It knows no ranks. Whoever calls it has gathered what a sample is contrasted with, and adds the losses up by their weights.
A new loss without a head of its own is a file beside this one, a line of LOSSES, its place in `objective` and `loss_weights`, and
a field of the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mmref.config import LossConfig, ReferenceConfig
from mmref.losses.infonce import infonce
from mmref.losses.reference_contrast import reference_loss
from mmref.losses.sdm import sdm
from mmref.losses.sigmoid import sigmoid
from mmref.losses.soft_targets import soft_targets
from mmref.losses.triplet_alignment import triplet_alignment

TOTAL = "loss"


class Curve(NamedTuple):
    """How a loss is called and drawn."""

    label: str
    color: str  # of the report's palette, see mmref/evaluate/plotting.py
    style: str | tuple[int, tuple[int, ...]]  # of the line, as matplotlib has it


LOSSES = {  # key of metrics.jsonl: how it is shown; the total first
    TOTAL: Curve("total", "#010101", "-"),
    "loss_align": Curve("alignment", "#010000", "-"),
    "loss_fuse": Curve("fusion", "#020000", "--"),
    "loss_rec": Curve("reconstruction", "#030000", "-."),
    "loss_guide": Curve("guidance", "#040000", ":"),
    "loss_id": Curve("identity", "#050000", "-"),
    "loss_mlm": Curve("words from images", "#030000", (0, (1, 3))),
}


class Share(NamedTuple):
    """Samples whose rows of the losses are computed, and the global batch that they are contrasted with."""

    image: Tensor  # (n, d) L2-normalised, fp32
    text: Tensor  # (n, d)
    objects: Tensor  # (n,) object rows
    all_image: Tensor  # (N, d) of the global batch
    all_text: Tensor  # (N, d)
    all_objects: Tensor  # (N,)
    scale: Tensor  # (1,) inverse temperature of the alignment
    weights: Tensor | None = None  # (n,) of the captions, 1 on average over the global batch; None: alike
    all_weights: Tensor | None = None  # (N,) of the global batch's captions
    bias: Tensor | None = None  # (1,) of the logits of `align: sigmoid`
    labels: Tensor | None = None  # (n,) of `align: rde`, 1: clean, 0: wrong; None: pairs are not divided yet


class References(NamedTuple):
    """The references that a step contrasts."""

    rows: Tensor  # (A, K, d)
    targets: Tensor  # (n,) row of each sample's own object


def objective(
    share: Share, references: References | None, loss: LossConfig, reference: ReferenceConfig, ramped: float
) -> dict[str, Tensor]:
    """The losses that features and references alone give, each as a mean over the share's samples, unweighted.

    Args:
        references: None for a run that has none.
        ramped: of `ramp`. Guidance of weight 0 is computed for the log, without a gradient.

    Returns:
        By key of LOSSES, fp32 scalars. Fusion is absent where references do not learn by gradient.
    """
    losses = {"loss_align": _alignment(share, loss)}
    if references is None:
        return losses
    if loss.w_guide > 0:
        with torch.set_grad_enabled(loss.w_guide * ramped > 0):
            losses["loss_guide"] = _guidance(share, references, loss, reference)
    if references.rows.requires_grad:
        losses["loss_fuse"] = reference_loss(
            torch.cat([share.image, share.text]).detach(),
            references.rows,
            references.targets.repeat(2),
            1 / reference.tau,
            reference.score,
            weights=None if share.weights is None else torch.cat([torch.ones_like(share.weights), share.weights]),
            margin=reference.margin,
        )
    return losses


def loss_weights(loss: LossConfig, ramped: float) -> dict[str, float]:
    """What each loss counts in the total at a step whose ramp is `ramped`."""
    return {
        "loss_align": 1.0,
        "loss_guide": loss.w_guide * ramped,
        "loss_fuse": loss.w_fuse,
        "loss_rec": loss.w_rec,
        "loss_mlm": loss.w_mlm,
        "loss_id": loss.w_id,
    }


def pack(losses: Mapping[str, Tensor]) -> Tensor:
    """Named losses as one vector (len(LOSSES),), detached, those that are off as 0: a step's losses stay on the device."""
    zero = torch.zeros_like(next(iter(losses.values())))
    return torch.stack([losses.get(name, zero) for name in LOSSES]).detach()


def unpack(vector: Tensor) -> dict[str, float]:
    """The inverse of `pack`."""
    return dict(zip(LOSSES, vector.tolist()))


def ramp(step: int, max_steps: int, start: float, full: float) -> float:
    """Weight in [0, 1] of a loss that ramps in linearly between two shares of training."""
    done = step / max(max_steps, 1)
    if done >= full:
        return 1.0
    return 0.0 if done < start else (done - start) / (full - start)


def _alignment(share: Share, loss: LossConfig) -> Tensor:
    """Images against all captions and captions against all images."""
    if loss.align == "sigmoid":
        assert share.bias is not None
        pairs = share.image, share.all_text, share.objects, share.all_objects
        return sigmoid(*pairs, share.scale, share.bias, share.all_weights)
    if loss.align == "rde" and share.labels is not None:
        image, text = pair_losses(share, loss)
        weights = share.labels if share.weights is None else share.labels * share.weights
        return (weights * (image + text)).mean()
    align = sdm if loss.align == "sdm" else infonce  # which RDE begins with
    anchors = share.objects, share.all_objects, share.scale
    both = align(share.image, share.all_text, *anchors, other_weights=share.all_weights) + align(
        share.text, share.all_image, *anchors, share.weights
    )
    return both if loss.align == "sdm" else 0.5 * both  # IRRA adds the two directions


def pair_losses(share: Share, loss: LossConfig, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RDE's losses of the share's images and of their captions, (n,) each; `own` (n,) as of `triplet_alignment`."""
    about = share.objects, share.all_objects, loss.rde_tau, loss.rde_margin, own
    return triplet_alignment(share.image, share.all_text, *about), triplet_alignment(share.text, share.all_image, *about)


def _guidance(share: Share, references: References, loss: LossConfig, reference: ReferenceConfig) -> Tensor:
    """Cross-entropy of the guided features' objects among the references, which get no gradient."""
    rows, targets, weights = references.rows.detach(), references.targets, share.weights
    soft = soft_targets(rows, targets, loss.guide_soft, 1 / reference.tau) if loss.guide_soft > 0 else None
    one = torch.ones_like(targets, dtype=torch.float32)
    parts = [(share.image, one)] if loss.guide_on != "text" else []
    parts += [(share.text, one if weights is None else weights)] if loss.guide_on != "image" else []
    return reference_loss(
        torch.cat([features for features, _ in parts]),
        rows,
        targets.repeat(len(parts)),
        1 / (loss.guide_tau or reference.tau),
        reference.score,
        None if soft is None else soft.repeat(len(parts), 1),
        None if weights is None else torch.cat([weight for _, weight in parts]),
        reference.margin,
    )
