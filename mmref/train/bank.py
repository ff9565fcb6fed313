"""The reference bank: rows sharded over ranks by contiguous range, outside the DeepSpeed engine.

ZeRO averages replicated parameters; references are not replicated. A rank owns rows [first, first + count) with their
optimizer state, and only the rows that a step contrasts travel. So with `negatives: batch` or `sampled` a step costs
the same at any number of objects, and memory is rows x bytes / ranks.

Rows may lie in bf16 (`reference.row_dtype`; arithmetic and optimizer state stay fp32) and in host memory
(`reference.rows_on`): then only a step's rows come to the device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmref.config import ReferenceConfig
from mmref.model.reference_rows import assign_features, initial_rows, moving_average
from mmref.randomness import RandomStream, integers
from mmref.train import collectives


def owned_rows(objects: int, world: int, rank: int) -> tuple[int, int]:
    """The first row that a rank owns, and how many."""
    share = -(-objects // world)
    first = min(rank * share, objects)
    return first, min(share, objects - first)


class Rows(NamedTuple):
    """Some rows of a bank, in ascending order, as this rank sees them: of `ReferenceBank.rows_of`.

    Which of them a rank owns is worked out in host memory, before the step: on a GPU it would have to wait for the answer.
    """

    numbers: NDArray[np.int64]  # (A,) rows of all objects
    at: slice  # of those that this rank owns, which lie side by side
    own: Tensor | slice  # their places in this rank's share, where it lies

    def targets(self, objects: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places (n,) in these rows of objects (n,), all of which are among them."""
        return np.searchsorted(self.numbers, objects)


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
        self.first, self.count = owned_rows(objects, world, rank)
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

    def select(self, objects: NDArray[np.int64], step: int) -> Rows:
        """What a step contrasts: its batch's `objects` (N,) and the configured negatives."""
        if self.config.negatives == "all":
            return self.everyone
        if self.config.negatives == "sampled":
            numbers = np.arange(self.config.sampled_negatives)
            drawn = integers(self.objects, RandomStream.SAMPLED_NEGATIVES, self.seed, step, numbers)
            objects = np.concatenate([objects, drawn])
        return self.rows_of(objects)

    @functools.cached_property
    def everyone(self) -> Rows:
        """The rows of all objects."""
        return Rows(np.arange(self.objects), slice(self.first, self.first + self.count), slice(0, self.count))

    def rows_of(self, objects: NDArray[np.int64]) -> Rows:
        """The rows of some objects (n,), each once."""
        numbers = np.unique(objects)
        low, high = np.searchsorted(numbers, (self.first, self.first + self.count))
        own = torch.from_numpy(numbers[low:high] - self.first)
        return Rows(numbers, slice(int(low), int(high)), own)

    def fetch(self, rows: Rows) -> Tensor:
        """fp32 references (A, K, d) of some rows, on every rank; a leaf that collects a gradient under `gradient`."""
        if collectives.world_size() == 1:
            found = self.rows[rows.own].to(self.device).float()
        elif len(rows.numbers) == self.objects:
            padded = torch.zeros(self.share, *self.rows.shape[1:], device=self.device)
            padded[: self.count] = self.rows
            found = collectives.gather(padded)[: self.objects]
        else:
            found = torch.zeros(len(rows.numbers), *self.rows.shape[1:], device=self.device)
            found[rows.at] = self.rows[rows.own].to(self.device).float()
            found = collectives.sum_over_ranks(found)
        found = found.detach()
        return found.requires_grad_() if self.config.update == "gradient" else found

    @torch.no_grad()
    def apply_gradient(self, rows: Rows, grad: Tensor | None, lr: float) -> Tensor:
        """Adam on the owner, rows without a gradient left alone. `grad` (A, K, d) is this rank's; the mean over ranks counts.

        Returns the norm of that mean, (), the same on every rank.
        """
        if grad is None:
            return torch.zeros((), device=self.device)
        grad = collectives.sum_over_ranks(grad) / collectives.world_size()
        own, g = rows.own, grad[rows.at].to(self.home)
        touched = g.abs().amax((1, 2)) > 0  # (n,) the others are computed too, and stay: a mask as index would wait for a GPU
        updates = self.updates[own] + touched
        t = updates.to(g.dtype).clamp(min=1)[:, None]
        exp_avg = 0.9 * self.exp_avg[own] + 0.1 * g
        exp_avg_sq = 0.999 * self.exp_avg_sq[own] + 0.001 * g.square().mean(-1)
        second = (exp_avg_sq / (1 - 0.999**t)).sqrt() + 1e-8  # (n, K)
        step = exp_avg / (1 - 0.9**t)[..., None] / second[..., None]
        # Only directions count: unit rows keep the effective step size constant.
        moved = torch.nn.functional.normalize(self.rows[own].float() - lr * step, dim=-1).to(self.dtype)
        self.updates[own] = updates
        self.exp_avg[own] = torch.where(touched[:, None, None], exp_avg, self.exp_avg[own])
        self.exp_avg_sq[own] = torch.where(touched[:, None], exp_avg_sq, self.exp_avg_sq[own])
        self.rows[own] = torch.where(touched[:, None, None], moved, self.rows[own])
        return grad.norm()

    @torch.no_grad()
    def follow(self, image: Tensor, text: Tensor, rows: Rows, targets: Tensor, momentum: float | None = None) -> None:
        """Move the references of the batch's objects towards their features; those never seen become their mean.

        Args:
            image, text: (n, d) this rank's normalised features.
            rows: of the objects of the whole global batch.
            targets: (n,) where in these the object of each of this rank's samples is.
            momentum: share of a reference kept, by default the config's; 1 sets those never seen, and no other.
        """
        keep, active = self.config.momentum if momentum is None else momentum, len(rows.numbers)
        at = targets.repeat(2)  # (2n,)
        features = torch.cat([image, text])
        is_text = torch.arange(len(features), device=features.device) >= len(image)
        slot = assign_features(features, is_text, self.fetch(rows)[at], self.config.assign)
        flat = at * self.config.per_object + slot
        sums = torch.zeros(active * self.config.per_object, self.dim + 1, device=self.device)
        ones = torch.ones(len(features), 1, device=self.device)
        sums.index_add_(0, flat, torch.cat([features, ones], dim=1))
        sums = collectives.sum_over_ranks(sums).view(active, self.config.per_object, -1)
        mine = sums[rows.at].to(self.home)
        moved = moving_average(self.rows[rows.own].float(), mine[..., :-1], mine[..., -1], keep)
        self.rows[rows.own] = moved.to(self.dtype)

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
