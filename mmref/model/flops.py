"""Counting floating-point operations as they run."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """A context that counts FLOPs, `get_total_flops()` afterwards: of matrix products, convolutions and attention.

    PyTorch's own counter takes the gradient of a grouped kernel for that of a full one, which in a ConvNeXt doubles the sum.
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Of shapes: each of the two gradients that are asked for costs what the convolution did."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = rest[:8]
    positions = prod((x if transposed else grad)[2:])
    return 2 * grad[0] * positions * prod(weight) * (wanted[0] + wanted[1])
