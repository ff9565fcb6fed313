"""Similarity distribution matching against loops."""

from __future__ import annotations

import math

import pytest
import torch

from mmref.losses import sdm


def literal(anchors, others, anchor_objects, other_objects, scale, epsilon):
    """KL between the softmax of similarities and the match distribution, as in IRRA, one number at a time."""
    total = 0.0
    for i in range(len(anchors)):
        logits = [scale * (anchors[i] * others[j]).sum() for j in range(len(others))]
        weights = [torch.exp(x) for x in logits]
        matches = [float(other_objects[j] == anchor_objects[i]) for j in range(len(others))]
        for j in range(len(others)):
            p, q = weights[j] / sum(weights), matches[j] / sum(matches)
            total = total + p * (torch.log(p) - math.log(q + epsilon))
    return total / len(anchors)


def features(n, seed):
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1).requires_grad_()


@pytest.mark.parametrize("objects", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [7, 3, 7, 7, 3, 9]])
@pytest.mark.parametrize("epsilon", [1e-8, 1e-3])
def test_value_and_gradients_equal_the_loops(objects, epsilon):
    y = torch.tensor(objects)
    twin = [features(4, 1), features(6, 2)]
    expected = literal(*twin, y[:4], y, 9.0, epsilon)
    expected.backward()
    own = [x.detach().float().requires_grad_() for x in twin]
    loss = sdm(*own, y[:4], y, 9.0, epsilon=epsilon)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for a, b in zip(own, twin):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-4)


def test_zero_when_the_similarities_match_the_objects():
    x, y = torch.eye(4), torch.arange(4)
    assert sdm(x, x, y, y, 1000.0).item() == pytest.approx(0.0, abs=1e-6)
    assert sdm(x, x.roll(1, 0), y, y, 1000.0).item() == pytest.approx(-math.log(1e-8), rel=1e-5)


def test_the_default_epsilon_is_that_of_irra():
    a, b, y = features(4, 1), features(4, 2), torch.tensor([0, 0, 1, 1])
    assert sdm(a, b, y, y, 5.0).item() == pytest.approx(literal(a, b, y, y, 5.0, 1e-8).item(), rel=1e-5)
