"""Augmentation of a batch on its device.

Every random number is a function of the seed, the step and the sample's place in the global batch. So a sample is
augmented alike on any number of workers, and a worker draws for its own samples alone. They are drawn in host memory. No
operation on the device needs the host to wait for it.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmref.config import DataConfig
from mmref.randomness import RandomStream, uniform_tensor

DRAWS = 11  # random numbers of a sample


def normalize(images: Tensor, config: DataConfig) -> Tensor:
    """(n, H, W, 3) uint8 -> (n, 3, H, W) fp32, mean subtracted and divided by the standard deviation.

    The channels of a pixel stay side by side in memory (channels_last), which convolutions are fastest on.
    """
    mean, std = (_channels(tuple(values), images.device) for values in (config.image_mean, config.image_std))
    return images.permute(0, 3, 1, 2).float().sub_(mean).div_(std)


@functools.lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A number for each channel, in units of a byte: (3, 1, 1). Kept, since copying three numbers to a GPU waits for it."""
    return torch.tensor(values, device=device)[:, None, None] * 255


def augmentation_draws(seed: int, step: int, positions: NDArray[np.int64]) -> Tensor:
    """The random numbers of samples at places (n,) of the global batch of a step: (n, DRAWS), in host memory."""
    return uniform_tensor(RandomStream.AUGMENTATION, seed, step, positions[:, None], np.arange(DRAWS))


def augment(images: Tensor, draws: Tensor, config: DataConfig) -> Tensor:
    """Shifted crop, flip, colour, erasing, and normalisation.

    Args:
        images: (n, H, W, 3) uint8.
        draws: (n, DRAWS) their `augmentation_draws`, on the same device.
        config: probabilities and strengths.

    Returns:
        (n, 3, H, W) fp32, normalised.
    """
    if config.crop_padding > 0:  # what moves pixels does so while they are bytes
        images = _shift(images, draws[:, 0], draws[:, 1], config.crop_padding)
    if config.flip > 0:
        flipped = draws[:, 2, None, None, None] < config.flip
        images = torch.where(flipped, images.flip(2), images)
    x = normalize(images, config)
    if config.colour_jitter > 0:
        x = _jitter(x, draws[:, 3:6], config.colour_jitter)
    if config.erase > 0:
        x = _erase(x, draws[:, 6:10], draws[:, 10] < config.erase)
    return x


def _shift(images: Tensor, dy: Tensor, dx: Tensor, pad: int) -> Tensor:
    """Cut each image (n, H, W, 3) out at its own offset within `pad`; beyond the border its edge pixels go on."""
    n, height, width, _ = images.shape
    down = (dy * (2 * pad + 1)).long().clamp(max=2 * pad)[:, None] - pad  # (n, 1)
    right = (dx * (2 * pad + 1)).long().clamp(max=2 * pad)[:, None] - pad
    rows = (down + torch.arange(height, device=images.device)).clamp(0, height - 1)  # (n, H)
    cols = (right + torch.arange(width, device=images.device)).clamp(0, width - 1)  # (n, W)
    each = torch.arange(n, device=images.device)[:, None, None]
    return images[each, rows[:, :, None], cols[:, None, :]]


def _jitter(x: Tensor, draws: Tensor, strength: float) -> Tensor:
    """Contrast, brightness and saturation, each by a factor or offset within the strength."""
    shift = (draws * 2 - 1) * strength  # (n, 3)
    contrast, brightness, saturation = (shift[:, i, None, None, None] for i in range(3))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (1 + contrast) + mean + brightness
    grey = x.mean(1, keepdim=True)
    return (x - grey) * (1 + saturation) + grey


def _erase(x: Tensor, draws: Tensor, erased: Tensor) -> Tensor:
    """Set a rectangle (2 to 40 % of the area, aspect 0.3 to 3.3) of the chosen images to the mean colour.

    Random erasing (Zhong et al. 2020). `draws` (n, 4) give area, aspect and position, `erased` (n,) which images.
    """
    _, _, height, width = x.shape
    area = (0.02 + 0.38 * draws[:, 0]) * height * width
    aspect = torch.exp((draws[:, 1] * 2 - 1) * math.log(3.3))
    h = (area * aspect).sqrt().clamp(max=height - 1)
    w = (area / aspect).sqrt().clamp(max=width - 1)
    top, left = draws[:, 2] * (height - h), draws[:, 3] * (width - w)
    rows = torch.arange(height, device=x.device)[None, :]
    cols = torch.arange(width, device=x.device)[None, :]
    in_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None])  # (n, H)
    in_cols = (cols >= left[:, None]) & (cols < (left + w)[:, None])  # (n, W)
    box = in_rows[:, :, None] & in_cols[:, None, :] & erased[:, None, None]
    return x.masked_fill(box[:, None], 0.0)
