"""The few collectives of training. In a single process, or without a process group, each is the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

# Torch 2.13 has it by a new name, and warns of the old one.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather(x: Tensor, group: Any = None) -> Tensor:
    """Rows of every rank, in rank order, without gradient: (n, ...) -> (world n, ...). `group`: of all ranks, too."""
    if world_size() == 1:
        return x
    everyone = x.new_empty(world_size() * x.shape[0], *x.shape[1:])
    _gather_into(everyone, x.contiguous(), group=group)
    return everyone


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return gather(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every rank's loss depends on this rank's features: their gradients add up here. The mean over ranks that the
        # engine takes afterwards is the one division by the world size.
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_gradient(x: Tensor) -> Tensor:
    """As `gather`; the backward sums the gradients that all ranks have for this rank's rows."""
    return x if world_size() == 1 else _GatherWithGradient.apply(x)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum over ranks, without gradient; the input is not changed."""
    if world_size() == 1:
        return x
    x = x.clone().contiguous()
    dist.all_reduce(x)
    return x


def gather_objects(value: Any) -> list[Any]:
    """A small picklable value of every rank, in rank order. Not for every step: it goes through pickle."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


class HostGroup:
    """The ranks' host memory: gathering in it waits for no device, and for none of the collectives that other threads run."""

    def __init__(self) -> None:
        """Collective where there are several ranks."""
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def gather(self, x: NDArray[Any]) -> NDArray[Any]:
        """An array of every rank, in rank order: (...) -> (world, ...). All have the same shape (collective)."""
        return gather(torch.from_numpy(x)[None], self._group).numpy()
