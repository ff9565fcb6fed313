"""Arithmetic of the reference bank on the rows that one rank owns. Which rank owns which rows: mmref/train/bank.py."""

from __future__ import annotations

import torch
from torch import Tensor


def initial_rows(
    first: int, count: int, per_object: int, dim: int, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Random unit references of objects first .. first + count - 1, the same whoever owns them: (count, K, d).

    Each object has its own generator seed, so a row does not depend on how rows are shared out.
    """
    rows = torch.empty(count, per_object, dim, dtype=dtype)
    chunk = 4096  # one generator per chunk of objects, at fixed boundaries
    for start in range(first - first % chunk, first + count, chunk):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + start) % (1 << 62))
        block = torch.randn(chunk, per_object, dim, generator=generator)
        lo, hi = max(start, first), min(start + chunk, first + count)
        rows[lo - first : hi - first] = torch.nn.functional.normalize(block[lo - start : hi - start], dim=-1)
    return rows


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
    # of several unseen ones the first is taken; within one batch features of an object then share it
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
