"""Scores and losses of references against loops."""

from __future__ import annotations

import math

import pytest
import torch

from mmref.losses import reference_loss
from mmref.losses.reference_contrast import reference_scores


def unit(x):
    return x / x.norm()


def literal_scores(features, references, reduce, scale):
    """(n, A) scores one at a time; references that are all zero take no part."""
    rows = []
    for f in features:
        row = []
        for per_object in references:
            cosines = [scale * (unit(f) * unit(r)).sum() for r in per_object if r.abs().max() > 0]
            if not cosines:
                row.append(torch.tensor(-math.inf, dtype=torch.float64))
            elif reduce == "max":
                row.append(max(cosines, key=lambda c: c.item()))
            else:
                row.append(torch.log(sum(torch.exp(c) for c in cosines) / len(cosines)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def literal_loss(features, references, targets, scale, reduce):
    scores = literal_scores(features, references, reduce, scale)
    total = torch.zeros((), dtype=torch.float64)
    for i, target in enumerate(targets.tolist()):
        if references[target].abs().max() > 0:
            total = total - torch.log(torch.exp(scores[i, target]) / torch.exp(scores[i]).sum())
    return total / len(features)


def problem(per_object, unseen, seed=0):
    """5 features, 6 objects with K references in float64, some of them never seen (zero)."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(5, 4, generator=g, dtype=torch.float64)
    references = torch.randn(6, per_object, 4, generator=g, dtype=torch.float64)
    for row, slot in unseen:
        references[row, slot] = 0
    return features.requires_grad_(), references.requires_grad_(), torch.tensor([0, 3, 3, 5, 1])


def literal_margin(features, references, targets, scale, reduce, margin):
    """CosFace: -log( e^(s (own - m)) / (e^(s (own - m)) + sum over others of e^(s cos)) )."""
    scores = literal_scores(features, references, reduce, scale)
    total = torch.zeros((), dtype=torch.float64)
    for i, target in enumerate(targets.tolist()):
        if references[target].abs().max() > 0:
            own = torch.exp(scores[i, target] - scale * margin)
            others = sum(torch.exp(score) for k, score in enumerate(scores[i]) if k != target)
            total = total - torch.log(own / (own + others))
    return total / len(features)


UNSEEN = {1: [(2, 0), (3, 0)], 3: [(0, 1), (2, 0), (2, 1), (2, 2), (5, 0), (5, 2)]}


@pytest.mark.parametrize("reduce", ["max", "lme"])
@pytest.mark.parametrize("per_object", [1, 3])
@pytest.mark.parametrize("some_unseen", [False, True])
def test_scores_loss_and_gradients_equal_the_loops(reduce, per_object, some_unseen):
    unseen = UNSEEN[per_object] if some_unseen else []
    f, r, y = problem(per_object, unseen)
    expected_scores = literal_scores(f, r, reduce, 8.0)
    expected = literal_loss(f, r, y, 8.0, reduce)
    expected.backward()
    own_f, own_r = f.detach().float().requires_grad_(), r.detach().float().requires_grad_()
    torch.testing.assert_close(reference_scores(own_f, own_r, reduce, 8.0), expected_scores.float())
    loss = reference_loss(own_f, own_r, y, 8.0, reduce)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(own_f.grad.double(), f.grad, atol=1e-5, rtol=1e-4)
    seen = r.detach().abs().amax(-1) > 0
    torch.testing.assert_close(own_r.grad.double()[seen], r.grad[seen], atol=1e-5, rtol=1e-4)
    assert (own_r.grad[~seen] == 0).all(), "a reference never seen gets no gradient"


@pytest.mark.parametrize("reduce", ["max", "lme"])
@pytest.mark.parametrize("per_object", [1, 3])
@pytest.mark.parametrize("some_unseen", [False, True])
def test_a_margin_is_that_of_cosface(reduce, per_object, some_unseen):
    f, r, y = problem(per_object, UNSEEN[per_object] if some_unseen else [])
    expected = literal_margin(f, r, y, 8.0, reduce, 0.25)
    expected.backward()
    own_f, own_r = f.detach().float().requires_grad_(), r.detach().float().requires_grad_()
    loss = reference_loss(own_f, own_r, y, 8.0, reduce, margin=0.25)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(own_f.grad.double(), f.grad, atol=1e-5, rtol=1e-4)
    seen = r.detach().abs().amax(-1) > 0
    torch.testing.assert_close(own_r.grad.double()[seen], r.grad[seen], atol=1e-5, rtol=1e-4)
    assert loss > reference_loss(own_f, own_r, y, 8.0, reduce), "it is harder with a margin"


@pytest.mark.parametrize("reduce", ["max", "lme"])
@pytest.mark.parametrize("per_object", [1, 3])
def test_before_anything_is_seen_the_loss_is_zero_without_nan(reduce, per_object):
    f = torch.randn(4, 8, requires_grad=True)
    r = torch.zeros(5, per_object, 8, requires_grad=True)
    loss = reference_loss(f, r, torch.tensor([0, 1, 2, 4]), 14.0, reduce)
    loss.backward()
    assert loss.item() == 0.0
    assert (f.grad == 0).all() and (r.grad == 0).all()


def test_equal_references_score_as_one_under_both_reductions():
    f, r, y = problem(1, [])
    one = reference_loss(f, r, y, 8.0, "max").item()
    for reduce in ("max", "lme"):
        assert reference_loss(f, r.expand(-1, 3, -1), y, 8.0, reduce).item() == pytest.approx(one, rel=1e-5)


def test_length_of_features_and_references_does_not_matter():
    f, r, y = problem(3, [])
    loss = reference_loss(f, r, y, 8.0, "lme").item()
    assert reference_loss(f * 7, r * 0.3, y, 8.0, "lme").item() == pytest.approx(loss, rel=1e-5)


def test_soft_targets_and_weights_equal_the_loops():
    f, r, y = problem(3, UNSEEN[3])
    g = torch.Generator().manual_seed(1)
    soft = torch.rand(5, 6, generator=g, dtype=torch.float64)
    soft[:, 2] = 0  # never seen
    soft = soft / soft.sum(1, keepdim=True)
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0, 1.5], dtype=torch.float64)
    scores = literal_scores(f, r, "lme", 8.0)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        seen = [k for k in range(6) if k != 2]
        log_sum = torch.log(sum(torch.exp(scores[i, k]) for k in seen))
        total = total + weights[i] * sum(soft[i, k] * (log_sum - scores[i, k]) for k in seen) / 5
    total.backward()
    own = f.detach().float().requires_grad_()
    loss = reference_loss(own, r.detach().float(), y, 8.0, "lme", soft.float(), weights.float())
    loss.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    torch.testing.assert_close(own.grad.double(), f.grad, atol=1e-5, rtol=1e-4)


def test_hard_targets_as_soft_ones_and_equal_weights_are_the_plain_loss():
    f, r, y = problem(3, UNSEEN[3])
    hard = torch.nn.functional.one_hot(y, 6).float()
    plain = reference_loss(f, r, y, 8.0, "max")
    assert reference_loss(f, r, y, 8.0, "max", hard, torch.ones(5)).item() == pytest.approx(plain.item(), rel=1e-6)
