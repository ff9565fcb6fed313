"""Weights of captions by their agreement with the reference, against loops; and weighted alignment."""

from __future__ import annotations

import math

import pytest
import torch

from mmref.losses import agreement, agreement_weights, infonce, sdm


@pytest.mark.parametrize("reduce", ["max", "lme"])
def test_agreement_is_the_share_of_other_objects_that_are_less_alike(reduce):
    g = torch.Generator().manual_seed(0)
    text, references = torch.randn(6, 5, generator=g, requires_grad=True), torch.randn(7, 3, 5, generator=g)
    references[1, 0], references[2] = 0, 0  # one with two references, one never seen
    targets = torch.tensor([0, 1, 2, 3, 6, 1])
    found = agreement(text, references, targets, reduce)
    for i, target in enumerate(targets.tolist()):
        scores = []
        for rows in references:
            cosines = [torch.cosine_similarity(text[i], r, dim=0).item() for r in rows if r.abs().max() > 0]
            mean_exp = sum(map(math.exp, cosines)) / max(len(cosines), 1)
            scores.append(math.nan if not cosines else max(cosines) if reduce == "max" else math.log(mean_exp))
        others = [s for k, s in enumerate(scores) if k != target and s == s]
        expected = math.nan if target == 2 else sum(s < scores[target] for s in others) / len(others)
        assert found[i].item() == pytest.approx(expected, nan_ok=True)
    assert not found.requires_grad


def test_agreement_of_wrong_captions_is_uniform_and_of_right_ones_high():
    g = torch.Generator().manual_seed(0)
    references = torch.randn(200, 2, 32, generator=g)
    right = references[:, 0] + 1.5 * torch.randn(200, 32, generator=g)
    wrong = right.roll(1, 0)
    targets = torch.arange(200)
    assert agreement(right, references, targets).quantile(0.1) > 0.9
    found = agreement(wrong, references, targets)
    assert found.mean().item() == pytest.approx(0.5, abs=0.06)
    assert found.std().item() == pytest.approx(12**-0.5, abs=0.04)


def test_an_object_alone_has_no_agreement():
    assert agreement(torch.randn(2, 4), torch.randn(1, 2, 4), torch.zeros(2, dtype=torch.long)).isnan().all()


def test_weights_grow_with_agreement_and_are_one_on_average():
    a = [0.9, 0.1, float("nan"), 0.5]
    weights = agreement_weights(torch.tensor(a), 3.0)
    mean = (0.9 + 0.1 + 0.5) / 3
    raw = [math.exp(3 * ((mean if x != x else x) - mean)) for x in a]
    assert weights.tolist() == pytest.approx([4 * x / sum(raw) for x in raw])
    assert agreement_weights(torch.tensor(a), 1e4).tolist() == pytest.approx([4, 0, 0, 0]), "sharp weights do not overflow"
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
