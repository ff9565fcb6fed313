"""RDE's triplet alignment loss against loops, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch

from mmref.losses import triplet_alignment


def features(n=7, d=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)


def slow(a, b, ya, yb, tau, margin, own=None):
    found = []
    for i in range(len(a)):
        cosines = [float(a[i] @ b[j]) for j in range(len(b))]
        positives = [j for j in range(len(b)) if yb[j] == ya[i]]
        negatives = [j for j in range(len(b)) if yb[j] != ya[i]]
        total = sum(math.exp(cosines[j] / tau) for j in positives)
        positive = sum(math.exp(cosines[j] / tau) / total * cosines[j] for j in positives)
        if own is not None:
            positive = cosines[own[i]]
        hardest = tau * math.log(sum(math.exp(cosines[j] / tau) for j in negatives))
        found.append(max(0.0, margin - positive + hardest))
    return torch.tensor(found)


@pytest.mark.parametrize("tau", [0.03, 0.5])
@pytest.mark.parametrize("own", [None, torch.tensor([2, 3, 4, 5])])
def test_values_are_those_of_loops(tau, own):
    a, b, y = features(), features(seed=1), torch.tensor([1, 1, 2, 3, 3, 3, 4])
    found = triplet_alignment(a[2:6], b, y[2:6], y, tau, 0.2, own)
    expected = slow(a[2:6], b, y[2:6], y, tau, 0.2, own)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected > 0).any() and found.shape == (4,)


def test_gradients_take_the_shares_of_positives_as_constants():
    a, b, y, tau = features(), features(seed=1), torch.tensor([1, 1, 2, 3, 3, 3, 4]), 0.3
    a.requires_grad_()
    triplet_alignment(a, b, y, y, tau, 2.0).sum().backward()
    for i in range(len(y)):
        cosines, same = a[i].detach() @ b.T / tau, y == y[i]
        up, down = cosines.masked_fill(same, -torch.inf).softmax(0), cosines.masked_fill(~same, -torch.inf).softmax(0)
        torch.testing.assert_close(a.grad[i], (up - down) @ b, atol=1e-5, rtol=1e-5)


def test_a_positive_beyond_the_margin_is_learned():
    x, y = torch.eye(3), torch.arange(3)
    easy = x.clone().requires_grad_()
    loss = triplet_alignment(easy, x, y, y, 0.015, 0.9).sum()
    loss.backward()
    assert loss == 0 and (easy.grad == 0).all()
    assert triplet_alignment(x, x, y, y, 0.015, 1.1).min() > 0.1


def test_a_batch_of_one_object_has_nothing_to_learn():
    a = features().float().requires_grad_()
    loss = triplet_alignment(a, features(seed=1), torch.zeros(7), torch.zeros(7), 0.015, 0.1).sum()
    loss.backward()
    assert loss == 0 and torch.isfinite(a.grad).all()
