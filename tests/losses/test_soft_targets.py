"""Soft targets against loops."""

from __future__ import annotations

import math

import pytest
import torch

from mmref.losses import soft_targets


def unit(x):
    return x / x.norm()


@pytest.mark.parametrize("per_object", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_against_loops(per_object, share):
    references = torch.randn(5, per_object, 4, generator=torch.Generator().manual_seed(0))
    references[2] = 0  # never seen
    references[4, 0] = 0  # one of three never seen; with one, the object
    targets = torch.tensor([0, 2, 3, 0])
    found = soft_targets(references, targets, share, 6.0)
    seen = [k for k in range(5) if references[k].abs().max() > 0]
    centres = {k: unit(sum(unit(r) for r in references[k] if r.abs().max() > 0)) for k in seen}
    for i, target in enumerate(targets.tolist()):
        expected = [0.0] * 5
        if target in seen:
            scores = {k: math.exp(6.0 * float(centres[target] @ centres[k])) for k in seen}
            for k in seen:
                expected[k] = share * scores[k] / sum(scores.values())
            expected[target] += 1 - share
        else:
            expected[target] = 1.0
        torch.testing.assert_close(found[i], torch.tensor(expected), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.sum(1), torch.ones(4))


def test_no_gradient_goes_through_a_target():
    references = torch.randn(4, 1, 3, requires_grad=True)
    assert not soft_targets(references, torch.tensor([1, 2]), 0.5, 5.0).requires_grad
