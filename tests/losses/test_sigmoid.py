"""The pairwise sigmoid loss against loops, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch

from mmref.losses import sigmoid


def literal(images, texts, image_objects, text_objects, scale, bias, weights=None):
    """The definition, one pair at a time, as in the pseudocode of the paper."""
    total = 0.0
    for i in range(len(images)):
        for j in range(len(texts)):
            z = 1.0 if image_objects[i] == text_objects[j] else -1.0
            logit = scale * (images[i] * texts[j]).sum() + bias
            total = total - torch.log(1 / (1 + torch.exp(-z * logit))) * (1.0 if weights is None else weights[j])
    return total / len(images)


def features(n, seed):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1).requires_grad_()


@pytest.mark.parametrize("objects", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [7, 3, 7, 7, 3, 9]])
@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 1.8, 0.5, 1.5, 1.0]])
def test_value_and_gradients_equal_the_loops(objects, weights):
    y, weights = torch.tensor(objects), None if weights is None else torch.tensor(weights, dtype=torch.float64)
    numbers = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (9.0, -3.0)]
    twin = [features(4, 1), features(6, 2), *numbers]
    expected = literal(*twin[:2], y[:4], y, *numbers, weights)
    expected.sum().backward()
    own = [x.detach().float().requires_grad_() for x in twin]
    loss = sigmoid(*own[:2], y[:4], y, *own[2:], weights)
    loss.backward()
    assert loss.shape == () and loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for a, b in zip(own, twin):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-4)


def test_no_direction_is_another_loss():
    a, b, y = features(6, 1), features(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])
    assert sigmoid(a, b, y, y, 9.0, -3.0).item() == pytest.approx(sigmoid(b, a, y, y, 9.0, -3.0).item(), rel=1e-6)


def test_far_off_logits_stay_finite_and_the_mean_over_shares_is_the_whole():
    a, b, y = features(6, 1), features(6, 2), torch.tensor([0, 0, 1, 1, 2, 2])
    assert math.isfinite(sigmoid(a, b, y, y, 1e4, -1e4).item())
    whole = sigmoid(a, b, y, y, 9.0, -3.0)
    parts = [sigmoid(a[i : i + 2], b, y[i : i + 2], y, 9.0, -3.0) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_separated_objects_cost_nothing():
    x, y = torch.eye(4), torch.arange(4)
    assert sigmoid(x, x, y, y, 200.0, -100.0).item() == pytest.approx(0.0, abs=1e-6)
