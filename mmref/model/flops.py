"""Counting floating-point operations as they run."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def flop_counter() -> FlopCounterMode:
    """A context that counts FLOPs, `get_total_flops()` afterwards: of matrix products, convolutions and attention.

    PyTorch's own counter takes the gradient of a grouped kernel for that of a full one, which in a ConvNeXt doubles the sum. It
    passes over fused attention on CPUs, and of that on GPUs it counts what the backward pass computes again. Here a model
    has the same count on both.
    """
    of_ours = {
        aten.convolution_backward: _convolution_backward,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
        aten._scaled_dot_product_flash_attention_backward: _attention_backward,
        aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
        aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=of_ours)


def _convolution_backward(grad: Any, x: Any, weight: Any, *rest: Any, **_: Any) -> int:
    """Of shapes: each of the two gradients that are asked for costs what the convolution did."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = rest[:8]
    positions = prod((x if transposed else grad)[2:])
    return 2 * grad[0] * positions * prod(weight) * (wanted[0] + wanted[1])


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of shapes (B, heads, tokens, width): the scores, and the sums of values that they weigh."""
    return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Two gradients for each of its two products."""
    return 2 * _attention(query, key, value)
