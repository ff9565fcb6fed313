"""Arithmetic of the reference bank on the rows that one rank owns. Which rank owns which rows: mmref/train/bank.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mmref.randomness import RandomStream, normal_tensor


def initial_rows(first: int, count: int, per_object: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random unit references of objects first .. first + count - 1, the same whoever owns them: (count, K, d).

    A row does not depend on how rows are shared out.
    """
    rows = torch.empty(count, per_object, dim, dtype=dtype)
    chunk = 256  # objects at a time, to stay small; at fixed boundaries, or rounding could depend on the share
    for start in range(first - first % chunk, first + count, chunk):
        objects = np.arange(start, start + chunk)[:, None, None]
        of_object = np.arange(per_object)[:, None], np.arange(dim)
        block = normal_tensor(RandomStream.INITIAL_REFERENCES, seed, 0, objects, *of_object)  # (chunk, K, d)
        lo, hi = max(start, first), min(start + chunk, first + count)
        rows[lo - first : hi - first] = torch.nn.functional.normalize(block[lo - start : hi - start], dim=-1)
    return rows


def unit_rows(references: Tensor) -> Tensor:
    """References (..., d) at length 1. Those never seen stay zero and get no gradient: a zero has no direction, and the
    derivative of one would be without bounds."""
    unseen = references.detach().abs().amax(-1, keepdim=True) == 0
    return torch.nn.functional.normalize(references.masked_fill(unseen, 1.0), dim=-1).masked_fill(unseen, 0.0)


def assign_features(features: Tensor, is_text: Tensor, references: Tensor, assign: str) -> Tensor:
    """Which of its object's K references each feature updates: (n,) int64.

    Args:
        features: (n, d).
        is_text: (n,) bool.
        references: (n, K, d) references of each feature's object; rows never seen are zero.
        assign: "nearest" (by cosine; an unseen reference first, so that all K come into use) or
            "modality" (images the even, texts the odd references, nearest among them).
    """
    per_object = references.shape[1]
    if per_object == 1:
        return torch.zeros(len(features), dtype=torch.long, device=features.device)
    unit = torch.nn.functional.normalize(references, dim=-1)
    cosine = torch.einsum("nd,nkd->nk", torch.nn.functional.normalize(features, dim=-1), unit)
    unseen = references.abs().amax(-1) == 0
    slot = torch.arange(per_object, device=features.device)
    # Of several unseen ones the first is taken; within one batch features of an object then share it.
    cosine = torch.where(unseen, 2.0 - slot.to(cosine.dtype)[None] / per_object, cosine)
    if assign == "modality":
        wrong = (slot[None] % 2).bool() != is_text[:, None]
        cosine = cosine.masked_fill(wrong, -2.0)
    return cosine.argmax(1)


def moving_average(rows: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> Tensor:
    """New rows r <- momentum r + (1 - momentum) mean; a row never seen becomes the mean, one not visited stays.

    Args:
        rows: (n, K, d) references.
        sums: (n, K, d) sums of the normalised features assigned to each.
        counts: (n, K) how many.
        momentum: share of the old reference kept.
    """
    mean = sums / counts.clamp(min=1)[..., None]
    unseen = rows.abs().amax(-1, keepdim=True) == 0
    updated = torch.where(unseen, mean, momentum * rows + (1 - momentum) * mean)
    return torch.where((counts > 0)[..., None], updated, rows)


def warm_rows(image: Tensor, text: Tensor, per_object: int, assign: str) -> Tensor:
    """References (K, d) of an object that training has not seen, from its features (i, d) and (t, d), L2-normalised.

    Images and texts weigh alike, as in training, however many there are of each. With K > 1 the features are grouped
    around K centres (by modality: images around the even, texts around the odd ones); a reference without features is zero.
    """
    weights = [torch.full((len(x),), 1 / max(len(x), 1)) for x in (image, text)]
    if assign == "nearest" or per_object == 1:
        return group_means(torch.cat([image, text]), torch.cat(weights), per_object)
    halves = [group_means(x, w, per_object // 2) for x, w in zip((image, text), weights)]
    return torch.stack(halves, dim=1).flatten(0, 1)


def group_means(features: Tensor, weights: Tensor, groups: int, rounds: int = 10) -> Tensor:
    """Weighted means (groups, d) of features (n, d) grouped by cosine: spherical k-means from centres that lie far apart."""
    means = torch.zeros(groups, features.shape[1])
    if len(features) == 0:
        return means
    centres = torch.nn.functional.normalize((weights[:, None] * features).sum(0, keepdim=True), dim=-1)
    if groups > 1:
        centres = features[(features @ centres.T).argmax()][None]
        while len(centres) < groups:
            nearest = (features @ centres.T).amax(1)
            if nearest.min() > 1 - 1e-6:
                break  # every feature is a centre already
            centres = torch.cat([centres, features[nearest.argmin()][None]])
    for _ in range(rounds):
        group = (features @ centres.T).argmax(1)
        total = torch.zeros(len(centres)).index_add_(0, group, weights)
        sums = torch.zeros_like(centres).index_add_(0, group, weights[:, None] * features)
        centres = torch.where(total[:, None] > 0, torch.nn.functional.normalize(sums, dim=-1), centres)
    means[: len(centres)] = sums / total.clamp(min=1e-12)[:, None]
    return means
