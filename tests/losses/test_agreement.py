"""Weights of captions by their agreement with the reference, against loops; and weighted alignment."""

from __future__ import annotations

import math

import pytest
import torch

from mmref.losses import agreement, agreement_weights, infonce, sdm


def unit(x):
    return x / x.norm()


def test_agreement_is_the_best_cosine_with_the_own_references():
    g = torch.Generator().manual_seed(0)
    text, own = torch.randn(4, 5, generator=g, requires_grad=True), torch.randn(4, 3, 5, generator=g)
    own[1, 0], own[2] = 0, 0
    found = agreement(text, own)
    for i in (0, 1, 3):
        best = max(float(unit(text[i].detach()) @ unit(r)) for r in own[i] if r.abs().max() > 0)
        assert found[i].item() == pytest.approx(best, abs=1e-6)
    assert found[2].isnan() and not found.requires_grad


def test_weights_grow_with_agreement_and_are_one_on_average():
    a = [0.9, 0.1, float("nan"), 0.5]
    weights = agreement_weights(torch.tensor(a), 3.0)
    mean = (0.9 + 0.1 + 0.5) / 3
    raw = [math.exp(3 * ((mean if x != x else x) - mean)) for x in a]
    assert weights.tolist() == pytest.approx([4 * x / sum(raw) for x in raw])
    assert agreement_weights(torch.tensor(a), 0.0).tolist() == [1.0] * 4
    assert agreement_weights(torch.full((3,), float("nan")), 3.0).tolist() == [1.0] * 3


@pytest.mark.parametrize("loss", [infonce, sdm])
def test_a_weighted_alignment_is_the_weighted_mean_over_anchors(loss):
    g = torch.Generator().manual_seed(0)
    a, b = (torch.nn.functional.normalize(torch.randn(4, 5, generator=g), dim=1) for _ in range(2))
    a.requires_grad_()
    y, weights = torch.tensor([0, 1, 1, 2]), torch.tensor([2.0, 0.0, 0.5, 1.5])
    each = torch.stack([loss(a[i : i + 1], b, y[i : i + 1], y, 10.0) for i in range(4)])
    (each * weights).mean().backward()
    expected, a.grad = a.grad, None
    found = loss(a, b, y, y, 10.0, weights)
    found.backward()
    assert found.item() == pytest.approx((each * weights).mean().item(), rel=1e-5)
    torch.testing.assert_close(a.grad, expected)
    assert (a.grad[1] == 0).all(), "a caption that weighs nothing moves nothing"


def test_a_pair_weighs_as_its_caption_seen_from_the_image():
    g = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(4, 5, generator=g), dim=1) for _ in range(2))
    y, w = torch.tensor([0, 1, 1, 2]), torch.tensor([1.4, 0.0, 0.6, 2.0])
    log_p = torch.log_softmax(10 * images @ texts.T, dim=1)
    expected_infonce, expected_sdm = 0.0, 0.0
    for i in range(4):
        positives = [j for j in range(4) if y[j] == y[i]]
        expected_infonce -= sum(w[j] * log_p[i, j] for j in positives) / len(positives) / 4
        total = sum(w[j] for j in positives)
        q = [w[j] / total if j in positives else torch.tensor(0.0) for j in range(4)]
        kl = sum(log_p[i, j].exp() * (log_p[i, j] - (q[j] + 1e-8).log()) for j in range(4))
        expected_sdm += kl * total / len(positives) / 4
    for loss, expected in ((infonce, expected_infonce), (sdm, expected_sdm)):
        assert loss(images, texts, y, y, 10.0, other_weights=w).item() == pytest.approx(float(expected), rel=1e-5)
        alike = loss(images, texts, y, y, 10.0, other_weights=torch.ones(4))
        assert alike.item() == pytest.approx(loss(images, texts, y, y, 10.0).item(), rel=1e-6)
        none = loss(images, texts, y, y, 10.0, other_weights=torch.tensor([2.0, 0.0, 0.0, 2.0]))
        assert none.isfinite(), "an object all of whose captions weigh nothing"


def test_an_image_is_not_pulled_to_a_caption_that_weighs_nothing():
    g = torch.Generator().manual_seed(0)
    images, texts = (torch.nn.functional.normalize(torch.randn(4, 5, generator=g), dim=1) for _ in range(2))
    texts.requires_grad_()
    y, w = torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    infonce(images, texts, y, y, 10.0, other_weights=w).backward()
    p = torch.softmax(10 * images @ texts.T, dim=1)
    pushed = sum(10 * p[i, 1] * (0.5 if y[i] == 1 else 1.0) * images[i] for i in range(4)) / 4  # as a negative alone
    torch.testing.assert_close(texts.grad[1], pushed.detach())
