"""Two Gaussians fitted to losses: known mixtures, and losses that are no mixture at all."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mmref.losses.mixture import LEAST, clean_ones, low_component


def drawn(share, means, spreads, n=20_000, seed=0):
    """Losses (n,) of a known mixture, and which are of the second Gaussian."""
    rng = np.random.default_rng(seed)
    second = rng.random(n) < share
    return np.where(second, rng.normal(means[1], spreads[1], n), rng.normal(means[0], spreads[0], n)), second


@pytest.mark.parametrize("share, means, spreads", [
    (0.5, (0.0, 4.0), (1.0, 1.0)), (0.2, (-3.0, 2.0), (0.8, 1.5)), (0.8, (10.0, 17.0), (2.0, 1.0)),
])  # fmt: skip
def test_posteriors_are_those_of_the_mixture_that_was_drawn_from(share, means, spreads):
    losses, second = drawn(share, means, spreads)

    def density(x, i):
        return np.exp(-0.5 * ((x - means[i]) / spreads[i]) ** 2) / (spreads[i] * math.sqrt(2 * math.pi))

    low = (1 - share) * density(losses, 0)
    expected = low / (low + share * density(losses, 1))
    found = low_component(losses)
    assert np.abs(found - expected).mean() < 0.02
    best = ((expected > 0.5) != second).mean()  # who knows the mixture is right as often as can be
    assert ((found > 0.5) != second).mean() < 1.05 * best + 0.001


def test_scale_and_order_of_losses_do_not_matter():
    losses, _ = drawn(0.3, (0.0, 3.0), (1.0, 0.5), n=500)
    found = low_component(losses)
    np.testing.assert_allclose(low_component(7 * losses - 4), found, atol=1e-6)
    np.testing.assert_allclose(low_component(losses[::-1])[::-1], found, atol=1e-6)


def test_many_equal_losses_are_a_narrow_gaussian():
    """As those of a hinge are: 0 for what is learned."""
    losses = np.concatenate([np.zeros(400), np.random.default_rng(0).normal(1.0, 0.2, 100)])
    assert clean_ones(losses).tolist() == [True] * 400 + [False] * 100


@pytest.mark.parametrize("losses", [np.zeros(0), np.arange(LEAST - 1.0), np.full(50, 3.0)])
def test_what_cannot_be_divided_is_one_component(losses):
    assert low_component(losses).tolist() == [1.0] * len(losses)


def test_a_hundredth_is_doubted_where_nothing_looks_wrong():
    assert np.flatnonzero(~clean_ones(np.full(500, 2.0))).tolist() == [0, 1, 2, 3, 4]
    assert clean_ones(np.full(LEAST - 1, 2.0)).all()
