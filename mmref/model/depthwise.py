"""Depthwise convolutions whose training is not slow on CPUs.

PyTorch's gradient of a depthwise kernel takes 10 to 100 times as long as the convolution itself on a CPU. With one thread that is
a third of a small ConvNeXt's time in training, for a twentieth of its arithmetic. Here the gradient is a matrix product instead.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

MOST_CELLS = 196
"""Cells of a feature map up to which the product pays: it grows with their square."""


class DepthwiseConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` for one kernel a channel, stride 1 and maps that keep their size.

    Values and gradients are those of `Conv2d` up to rounding. On a GPU, without gradients and on large maps it is `Conv2d`.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        if input.device.type != "cpu" or not torch.is_grad_enabled() or input.shape[2] * input.shape[3] > MOST_CELLS:
            return super().forward(input)
        return _Depthwise.apply(input, self.weight, self.bias)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # under autocast, as convolutions are
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding="same", groups=x.shape[1])

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:  # each output went to the cells around it: the same convolution, turned by 180 degrees
            of_x = F.conv2d(grad, weight.flip(2, 3), padding="same", groups=x.shape[1])
        if ctx.needs_input_grad[1]:
            of_weight = _kernel_gradient(x, grad, weight.shape)
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum((0, 2, 3))
        return of_x, of_weight, of_bias


def _kernel_gradient(x: Tensor, grad: Tensor, shape: torch.Size) -> Tensor:
    """(C, 1, k, k'): of each channel, the products of input cells and output gradients, summed by how far they lie apart.

    All pairs of cells are multiplied, near or far: that is more arithmetic than it takes, and one product that a CPU is good at.
    """
    batch, channels, height, width = x.shape
    cells, taps = height * width, shape[2] * shape[3]
    inputs = x.permute(1, 2, 3, 0).reshape(channels, cells, batch)
    outputs = grad.permute(1, 0, 2, 3).reshape(channels, batch, cells)
    pairs = torch.bmm(inputs, outputs).view(channels, cells * cells)
    pairs = pairs.to(torch.promote_types(pairs.dtype, torch.float32))  # bf16 would lose the small ones of a long sum
    tap = torch.from_numpy(_taps(height, width, shape[2], shape[3]))
    return pairs.new_zeros(channels, taps + 1).index_add_(1, tap, pairs)[:, :taps].view(shape).to(x.dtype)


@lru_cache(maxsize=64)
def _taps(height: int, width: int, rows: int, columns: int) -> NDArray[np.int64]:
    """(cells * cells,) which value of a kernel joins an input cell (first) to an output cell; rows * columns where none does.

    An array: a tensor that was made while shapes alone are followed (`mmref sizing`) must not be kept.
    """
    cell = np.arange(height * width)
    y, x = cell // width, cell % width
    down = y[:, None] - y[None] + rows // 2
    right = x[:, None] - x[None] + columns // 2
    joined = (down >= 0) & (down < rows) & (right >= 0) & (right < columns)
    return np.where(joined, down * columns + right, rows * columns).flatten()


def use_depthwise(tower: nn.Module) -> None:
    """Put `DepthwiseConv2d` in place of a tower's depthwise convolutions, with the same parameters under the same names."""
    for module in tower.modules():
        if type(module) is nn.Conv2d and _fits(module):
            module.__class__ = DepthwiseConv2d  # it has nothing that Conv2d has not


def _fits(conv: nn.Conv2d) -> bool:
    """Whether a convolution has one kernel a channel, of odd sizes, and keeps the size of its maps."""
    keeps = conv.padding in ("same", tuple(size // 2 for size in conv.kernel_size))
    plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    odd = all(size % 2 for size in conv.kernel_size)
    return conv.groups == conv.in_channels == conv.out_channels > 1 and keeps and plain and odd
