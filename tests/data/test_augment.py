"""Augmentation: the same whatever the partition of the batch, and each operation against a per-image loop."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmref.config import DataConfig, from_dict
from mmref.config.inputs import settled
from mmref.data.augment import augment, augmentation_draws, normalize

TOTAL = 8
PLAIN = {"flip": 0.0, "crop_padding": 0, "erase": 0.0, "colour_jitter": 0.0}
PAIR = {"vision_config": {"model_type": "vit"}, "text_config": {"model_type": "bert"}}
PLAIN_CONFIG = settled(from_dict({"model": PAIR})).data


def batch(n=TOTAL, height=10, width=14):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8))


def run(images, first=0, seed=1, step=5, **fields):
    positions = np.arange(first, first + len(images))
    return augment(images, augmentation_draws(seed, step, positions), replace(PLAIN_CONFIG, **{**PLAIN, **fields}))


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_slices_put_together_are_the_whole_batch(parts):
    fields = {"flip": 0.5, "crop_padding": 3, "erase": 0.5, "colour_jitter": 0.4}
    images, size = batch(), TOTAL // parts
    whole = run(images, **fields)
    sliced = [run(images[i : i + size], first=i, **fields) for i in range(0, TOTAL, size)]
    torch.testing.assert_close(torch.cat(sliced), whole, atol=0, rtol=0)


def test_seed_and_step_decide():
    fields = {"flip": 0.5, "crop_padding": 3, "erase": 0.5, "colour_jitter": 0.4}
    whole = run(batch(), **fields)
    torch.manual_seed(99)
    assert torch.equal(run(batch(), **fields), whole)
    assert not torch.equal(run(batch(), step=6, **fields), whole)
    assert not torch.equal(run(batch(), seed=2, **fields), whole)


def test_normalize_subtracts_mean_and_divides_by_deviation():
    config = DataConfig(image_mean=[0.5, 0.25, 0.0], image_std=[0.5, 1.0, 0.1])
    images = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    images[0, 0, 1] = torch.tensor([255, 51, 102])
    out = normalize(images, config)
    assert out.shape == (1, 3, 2, 2) and out.dtype == torch.float32
    assert out[0, :, 0, 1].tolist() == pytest.approx([1.0, -0.05, 4.0])
    assert out[0, :, 1, 0].tolist() == pytest.approx([-1.0, -0.25, 0.0])


def test_nothing_asked_is_plain_normalisation():
    assert torch.equal(run(batch()), normalize(batch(), PLAIN_CONFIG))


def test_certain_flip_turns_every_image_and_half_of_them_at_one_half():
    x = normalize(batch(), PLAIN_CONFIG)
    assert torch.equal(run(batch(), flip=1.0), x.flip(3))
    many = run(batch(400, 4, 4), flip=0.5)
    x = normalize(batch(400, 4, 4), PLAIN_CONFIG)
    flipped = sum(torch.equal(a, b.flip(2)) for a, b in zip(many, x))
    straight = sum(torch.equal(a, b) for a, b in zip(many, x))
    assert flipped + straight == 400 and 150 < flipped < 250


def shifted(image, dy, dx):
    """Pixel (r, c) shows pixel (r + dy, c + dx) of the image, its border repeated outside."""
    _, height, width = image.shape
    out = torch.empty_like(image)
    for r in range(height):
        for c in range(width):
            out[:, r, c] = image[:, min(max(r + dy, 0), height - 1), min(max(c + dx, 0), width - 1)]
    return out


def test_shift_moves_each_image_by_its_own_offset_within_the_padding():
    pad, x = 2, normalize(batch(), PLAIN_CONFIG)
    offsets = []
    for image, out in zip(x, run(batch(), crop_padding=pad)):
        places = [(dy, dx) for dy in range(-pad, pad + 1) for dx in range(-pad, pad + 1)]
        found = [place for place in places if torch.equal(shifted(image, *place), out)]
        assert len(found) == 1
        offsets += found
    assert len(set(offsets)) > 3
    many = run(batch(600, 6, 6), crop_padding=1)
    x = normalize(batch(600, 6, 6), PLAIN_CONFIG)
    extremes = {(dy, dx): 0 for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    for image, out in zip(x, many):
        for place in extremes:
            extremes[place] += torch.equal(shifted(image, *place), out)
    assert min(extremes.values()) > 30, "all nine offsets occur, about 67 times each"


def test_erasing_sets_one_rectangle_to_the_mean_colour():
    n, height, width = 300, 20, 30
    x = normalize(batch(n, height, width), PLAIN_CONFIG)
    areas = []
    for image, out in zip(x, run(batch(n, height, width), erase=1.0)):
        gone = (out == 0).all(0)
        rows, cols = gone.any(1).nonzero()[:, 0], gone.any(0).nonzero()[:, 0]
        box = torch.zeros_like(gone)
        box[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1] = True
        assert torch.equal(box, gone) and torch.equal(out[:, ~box], image[:, ~box])
        areas.append(gone.float().mean().item())
    assert 0.0 < min(areas) < 0.06 and 0.33 < max(areas) < 0.45
    assert sum(areas) / n == pytest.approx(0.21, abs=0.02)


def test_erasing_hits_its_share_of_images_independent_of_colour():
    n = 600
    x = normalize(batch(n, 8, 8), PLAIN_CONFIG)
    erased = torch.stack([(a != b).any() for a, b in zip(run(batch(n, 8, 8), erase=0.3), x)])
    assert erased.float().mean().item() == pytest.approx(0.3, abs=0.06)
    jittered = run(batch(n, 8, 8), colour_jitter=0.5)
    saturation = (jittered - jittered.mean(1, keepdim=True)).abs().mean((1, 2, 3))
    assert saturation[erased].mean().item() == pytest.approx(saturation[~erased].mean().item(), rel=0.1)


def literal_jitter(image, contrast, brightness, saturation):
    """Contrast about the image's mean, a brightness offset, then colours away from or to their grey."""
    mean = image.mean().item()
    out = torch.empty_like(image)
    for r in range(image.shape[1]):
        for c in range(image.shape[2]):
            v = [(p - mean) * (1 + contrast) + mean + brightness for p in image[:, r, c].tolist()]
            grey = sum(v) / 3
            out[:, r, c] = torch.tensor([(p - grey) * (1 + saturation) + grey for p in v])
    return out


def test_jitter_equals_the_loop_within_its_strength():
    x, strength = normalize(batch(), PLAIN_CONFIG), 0.3
    changes = []
    for image, out in zip(x, run(batch(), colour_jitter=strength)):
        brightness = (out.mean() - image.mean()).item()
        spread = image.mean(0) - image.mean()
        contrast = ((out.mean(0) - out.mean()) * spread).sum().item() / spread.square().sum().item() - 1
        colour = image - image.mean(0)
        both = ((out - out.mean(0)) * colour).sum().item() / colour.square().sum().item()
        saturation = both / (1 + contrast) - 1
        changes.append((contrast, brightness, saturation))
        torch.testing.assert_close(literal_jitter(image, *changes[-1]), out, atol=1e-4, rtol=1e-4)
    changes = torch.tensor(changes)
    assert changes.abs().max() <= strength + 1e-4 and (changes.amax(0) - changes.amin(0) > strength / 2).all()
