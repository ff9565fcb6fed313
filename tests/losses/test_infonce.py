"""Multi-positive InfoNCE against loops, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmref.losses import infonce


def literal(anchors, others, anchor_objects, other_objects, scale):
    """The definition, one number at a time."""
    total = 0.0
    for i in range(len(anchors)):
        logits = [scale * sum(anchors[i][k] * others[j][k] for k in range(len(anchors[i]))) for j in range(len(others))]
        log_sum = torch.log(sum(torch.exp(x) for x in logits))
        positives = [j for j in range(len(others)) if other_objects[j] == anchor_objects[i]]
        total = total + sum(log_sum - logits[j] for j in positives) / len(positives)
    return total / len(anchors)


def features(n, d=5, seed=0, dtype=torch.float64):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_()


@pytest.mark.parametrize("objects", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 2], [7, 3, 7, 7, 3, 9]])
@pytest.mark.parametrize("scale", [1.0, 14.3])
def test_value_and_gradients_equal_the_loops(objects, scale):
    y = torch.tensor(objects)
    twin = [features(4, seed=1), features(6, seed=2)]
    expected = literal(*twin, y[:4], y, scale)
    expected.backward()
    own = [x.detach().float().requires_grad_() for x in twin]
    loss = infonce(*own, y[:4], y, scale)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)
    for a, b in zip(own, twin):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=2e-6, rtol=1e-5)


def test_one_positive_each_is_plain_cross_entropy():
    a, b, y = features(6, seed=1), features(6, seed=2), torch.arange(6)
    expected = torch.nn.functional.cross_entropy(10 * a.float() @ b.float().T, y)
    assert infonce(a, b, y, y, 10.0).item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_of_a_learned_scale():
    a, b, y = features(4, seed=1), features(4, seed=2), torch.tensor([0, 1, 1, 2])
    scale = torch.tensor([5.0], requires_grad=True)
    infonce(a, b, y, y, scale).backward()
    h = 1e-3
    numeric = (literal(a, b, y, y, 5 + h) - literal(a, b, y, y, 5 - h)) / (2 * h)
    assert scale.grad.item() == pytest.approx(numeric.item(), abs=1e-4)


def test_half_precision_features_are_summed_in_fp32():
    a, b, y = features(8, seed=1), features(8, seed=2), torch.arange(8) // 2
    half = infonce(a.bfloat16(), b.bfloat16(), y, y, 50.0)
    exact = infonce(a.bfloat16().double(), b.bfloat16().double(), y, y, 50.0)
    assert half.dtype == torch.float32 and half.item() == pytest.approx(exact.item(), rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=9), st.integers(0, 1000))
def test_order_and_names_of_objects_do_not_matter(objects, seed):
    y, n = torch.tensor(objects), len(objects)
    a, b = features(n, seed=seed), features(n, seed=seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    loss = infonce(a, b, y, y, 7.0)
    assert infonce(a, b[order], y, y[order], 7.0).item() == pytest.approx(loss.item(), abs=1e-5)
    assert infonce(a, b, 100 - y, 100 - y, 7.0).item() == pytest.approx(loss.item(), abs=1e-6)
    # the mean over anchors is the mean over any parts of them
    halves = [infonce(a[i : i + 1], b, y[i : i + 1], y, 7.0) for i in range(n)]
    assert torch.stack(halves).mean().item() == pytest.approx(loss.item(), abs=1e-5)


def test_lower_bound_is_the_entropy_of_the_positives():
    """Two objects with two positives each, perfectly separated: log 2 remains."""
    x, y = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]), torch.tensor([0, 0, 1, 1])
    assert infonce(x, x, y, y, 100.0).item() == pytest.approx(math.log(2), abs=1e-5)
