"""The reference bank: rows sharded over ranks by contiguous range, outside the DeepSpeed engine.

ZeRO averages replicated parameters; references are not replicated. A rank owns rows [first, first + count) with their
optimizer state, and only the rows that a step contrasts travel. So with `negatives: batch` or `sampled` a step costs
the same at any number of objects, and memory is rows x bytes / ranks.

Rows may lie in bf16 (`reference.row_dtype`; arithmetic and optimizer state stay fp32) and in host memory
(`reference.rows_on`): then only a step's rows come to the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from mmref.config import ReferenceConfig
from mmref.model.reference_rows import assign_features, initial_rows, moving_average
from mmref.randomness import RandomStream, integers
from mmref.train import collectives


def rows_of(objects: int, world: int, rank: int) -> tuple[int, int]:
    """The first row that a rank owns, and how many."""
    share = -(-objects // world)
    first = min(rank * share, objects)
    return first, min(share, objects - first)


class ReferenceBank:
    """K references of width d for each of m objects, this rank's share of them."""

    def __init__(
        self, objects: int, dim: int, config: ReferenceConfig, seed: int, device: torch.device | str = "cpu",
        object_ids: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """object_ids: ids of all objects by row, by which checkpoints match rows; by default the rows' numbers."""
        self.objects, self.dim, self.config, self.seed = objects, dim, config, seed
        self.device = torch.device(device)
        world, rank = collectives.world_size(), collectives.rank()
        self.share = -(-objects // world)  # rows of one rank; the last may own fewer
        self.first, self.count = rows_of(objects, world, rank)
        last = self.first + self.count
        own_ids = np.arange(self.first, last) if object_ids is None else object_ids[self.first : last]
        self.object_ids: pa.LargeStringArray = pa.array(own_ids).cast(pa.large_string())  # of this rank's share
        self.dtype = torch.bfloat16 if config.row_dtype == "bf16" else torch.float32
        self.home = torch.device("cpu") if config.rows_on == "host" else self.device  # where this rank's share lies
        shape = (self.count, config.per_object, dim)
        if config.update == "gradient":
            if config.init == "random":
                self.rows = initial_rows(self.first, self.count, config.per_object, dim, seed, self.dtype).to(self.home)
            else:
                self.rows = torch.zeros(shape, device=self.home, dtype=self.dtype)
            self.exp_avg = torch.zeros(shape, device=self.home)
            self.exp_avg_sq = torch.zeros(shape[:2], device=self.home)  # one second moment a row
            self.updates = torch.zeros(self.count, dtype=torch.long, device=self.home)
        else:  # a row of zeros has not been seen yet
            self.rows = torch.zeros(shape, device=self.home, dtype=self.dtype)

    def select(self, objects: Tensor, step: int) -> Tensor:
        """Sorted rows (A,) that a step contrasts: the batch's objects and the configured negatives."""
        if self.config.negatives == "all":
            return torch.arange(self.objects, device=self.device)
        active = objects.unique()
        if self.config.negatives == "sampled":
            numbers = np.arange(self.config.sampled_negatives)
            drawn = integers(self.objects, RandomStream.SAMPLED_NEGATIVES, self.seed, step, numbers)
            active = torch.cat([active, torch.from_numpy(drawn).to(self.device)]).unique()
        return active

    def fetch(self, active: Tensor) -> Tensor:
        """fp32 references (A, K, d) of sorted rows, on every rank; a leaf that collects a gradient under `gradient`."""
        if collectives.world_size() == 1:
            rows = self.rows if len(active) == self.objects else self.rows[active.to(self.home)]
            rows = rows.to(self.device).float()
        elif len(active) == self.objects:
            padded = torch.zeros(self.share, *self.rows.shape[1:], device=self.device)
            padded[: self.count] = self.rows
            rows = collectives.gather(padded)[: self.objects]
        else:
            rows = torch.zeros(len(active), *self.rows.shape[1:], device=self.device)
            at, own = self._owned(active)
            rows[at] = self.rows[own].to(self.device).float()
            rows = collectives.sum_over_ranks(rows)
        rows = rows.detach()
        return rows.requires_grad_() if self.config.update == "gradient" else rows

    def _owned(self, active: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in `active` of the rows this rank owns, on the device, and their local row numbers, where the rows lie."""
        mine = (active >= self.first) & (active < self.first + self.count)
        at = mine.nonzero()[:, 0]
        return at, (active[at] - self.first).to(self.home)

    @torch.no_grad()
    def apply_gradient(self, active: Tensor, grad: Tensor | None, lr: float) -> Tensor:
        """Adam on the owner, rows without a gradient left alone. `grad` (A, K, d) is this rank's; the mean over ranks counts.

        Returns the norm of that mean, (), the same on every rank.
        """
        if grad is None:
            return torch.zeros((), device=self.device)
        grad = collectives.sum_over_ranks(grad) / collectives.world_size()
        at, own = self._owned(active)
        g = grad[at].to(self.home)
        touched = g.abs().amax((1, 2)) > 0
        g, own = g[touched], own[touched]
        self.updates[own] += 1
        t = self.updates[own].to(g.dtype)[:, None]
        self.exp_avg[own] = 0.9 * self.exp_avg[own] + 0.1 * g
        self.exp_avg_sq[own] = 0.999 * self.exp_avg_sq[own] + 0.001 * g.square().mean(-1)
        second = (self.exp_avg_sq[own] / (1 - 0.999**t)).sqrt() + 1e-8  # (n, K)
        step = self.exp_avg[own] / (1 - 0.9**t)[..., None] / second[..., None]
        rows = self.rows[own].float() - lr * step
        # Only directions count: unit rows keep the effective step size constant.
        self.rows[own] = torch.nn.functional.normalize(rows, dim=-1).to(self.dtype)
        return grad.norm()

    @torch.no_grad()
    def follow(self, image: Tensor, text: Tensor, objects: Tensor, all_objects: Tensor, momentum: float | None = None) -> None:
        """Move the references of the batch's objects towards their features; those never seen become their mean.

        Args:
            image, text: (n, d) this rank's normalised features.
            objects: (n,) their object rows.
            all_objects: (N,) object rows of the whole global batch.
            momentum: share of a reference kept, by default the config's; 1 sets those never seen, and no other.
        """
        keep = self.config.momentum if momentum is None else momentum
        active = all_objects.unique()
        at = torch.searchsorted(active, objects).repeat(2)  # (2n,)
        features = torch.cat([image, text])
        is_text = torch.arange(len(features), device=features.device) >= len(image)
        rows = self.fetch(active)
        slot = assign_features(features, is_text, rows[at], self.config.assign)
        flat = at * self.config.per_object + slot
        sums = torch.zeros(len(active) * self.config.per_object, self.dim + 1, device=self.device)
        ones = torch.ones(len(features), 1, device=self.device)
        sums.index_add_(0, flat, torch.cat([features, ones], dim=1))
        sums = collectives.sum_over_ranks(sums).view(len(active), self.config.per_object, -1)
        where, own = self._owned(active)
        mine = sums[where].to(self.home)
        rows = moving_average(self.rows[own].float(), mine[..., :-1], mine[..., -1], keep)
        self.rows[own] = rows.to(self.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's rows and optimizer state; global row range: `first`, `first + count`."""
        state = {"rows": self.rows}
        if self.config.update == "gradient":
            state |= {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "updates": self.updates}
        return state

    def find(self, object_ids: pa.LargeStringArray) -> Tensor:
        """(n,) where in this rank's share each object lies, -1 for those that it does not own."""
        at = pc.fill_null(pc.index_in(object_ids, value_set=self.object_ids), -1)
        return torch.from_numpy(at.to_numpy(zero_copy_only=False).astype(np.int64))

    def load_rows(self, at: Tensor, state: dict[str, Tensor], keep_unset: bool = False) -> None:
        """Set the rows `at` (n,) of this rank's share, as `find` gives them, from saved ones; those at -1 are passed over.

        Args:
            keep_unset: references that are saved as zeros, never set, stay what they are here.
        """
        mine = (at >= 0).nonzero()[:, 0]
        own = at[mine].to(self.home)
        for name, saved in state.items():
            target = self.state_dict()[name]
            new = saved[mine].to(target)
            if keep_unset:
                new = torch.where(new.abs().amax(-1, keepdim=True) > 0, new, target[own])
            target[own] = new

    def describe(self) -> dict[str, Any]:
        return {"objects": self.objects, "per_object": self.config.per_object, "dim": self.dim}
