"""The moving average of the weights (`train.ema`), kept where the optimizer keeps its moments, and the engine run with it.

An average is one more tensor of Adam's state: DeepSpeed shards it as the moments, and checkpoints hold it by name as them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmref.run.checkpoints import AVERAGE


def decay_at(decay: float, updates: int) -> float:
    """Share of the old average that update number `updates` (from 1) keeps: at first less than `decay`, so that the average
    does not hang on to the first weights."""
    return min(decay, (1 + updates) / (10 + updates))


class FollowWeights:
    """A hook behind the steps of an optimizer: moves the averages of what it has updated towards the new weights."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._updates: dict[int, int] = {}  # by the first of the parameters of a step

    @torch.no_grad()
    def __call__(self, optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            if parameters := group["params"]:  # at stages above 0 the engine steps one group at a time
                states = [optimizer.state[p] for p in parameters]
                share = 1 - decay_at(self.decay, self._count(parameters[0], states))
                torch._foreach_lerp_([state[AVERAGE] for state in states], list(parameters), share)

    def _count(self, parameter: Tensor, states: list[dict[str, Any]]) -> int:
        """Updates so far. They are read from the optimizer once: a fused one counts on the GPU, which the host would wait for."""
        before = self._updates.get(id(parameter))
        now = max(int(state["step"]) for state in states) if before is None else before + 1
        self._updates[id(parameter)] = now
        return now


def keeps_average(optimizer: torch.optim.Optimizer) -> bool:
    return any(AVERAGE in state for state in optimizer.state.values())


@contextmanager
def averaged_weights(engine: Any) -> Iterator[None]:
    """Inside, the engine's weights are their averages, which `train.ema` has it keep (collective).

    Outside again they are, bit by bit, what they were; not after an error, which ends training: one rank alone may have
    raised it, and would wait for the others.
    """
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        _exchange(optimizer)
        yield
        _exchange(optimizer)
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    _fill(engine, lambda p: safe_get_full_optimizer_state(p, AVERAGE))
    yield
    _fill(engine, safe_get_full_fp32_param)


def _exchange(optimizer: torch.optim.Optimizer) -> None:
    """Weights and averages change places, without a copy."""
    for p, state in optimizer.state.items():
        p.data, state[AVERAGE] = state[AVERAGE], p.data


def _fill(engine: Any, full: Callable[[Any], Tensor]) -> None:
    """Give the engine's modules other weights; what its optimizer updates stays as it is."""
    from deepspeed.runtime.zero import GatheredParameters

    for p in engine.module.parameters():
        if p.requires_grad:
            value = full(p)
            with GatheredParameters([p], modifier_rank=0, enabled=hasattr(p, "ds_id")):
                p.data.copy_(value)
