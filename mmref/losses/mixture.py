"""Two Gaussians fitted to losses: which samples are learned as the right ones are, and which as the wrong ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEAST = 16  # samples that two means, two variances and a share can be fitted to
VARIANCE = 1e-6  # added to that of each Gaussian, of losses that are scaled to 0 .. 1 (RDE has the same)
ROUNDS, GAIN = 100, 1e-4  # of EM: at most so many, and no further one where the mean log-likelihood grows by less
DOUBTED = 100  # where no sample looks wrong, one in so many is taken for it, those of the largest losses (as in RDE)


def low_component(losses: Floats) -> Floats:
    """Posterior probability that each loss is of the Gaussian with the smaller mean.

    Two Gaussians are fitted by EM to the losses, scaled to 0 .. 1. It starts from the two groups of 2-means, which begins at the
    smallest and the largest loss: nothing is drawn, so the same losses always give the same answer.

    Args:
        losses: (n,) finite.

    Returns:
        (n,) between 0 and 1; all 1 where the losses are equal, or fewer than LEAST.
    """
    low, high = (losses.min(), losses.max()) if len(losses) else (0.0, 0.0)
    if len(losses) < LEAST or not high > low:
        return np.ones(len(losses))
    x = (losses - low) / (high - low)
    of_low = (x <= _between(x)).astype(np.float64)  # responsibility of the Gaussian with the smaller mean
    before = -np.inf
    for _ in range(ROUNDS):
        shares = np.stack([of_low, 1 - of_low])  # (2, n)
        counts = shares.sum(1) + 1e-12
        means = (shares @ x) / counts
        variances = (shares * (x - means[:, None]) ** 2).sum(1) / counts + VARIANCE
        logs = -0.5 * ((x - means[:, None]) ** 2 / variances[:, None] + np.log(2 * np.pi * variances)[:, None])
        logs += np.log(counts / len(x))[:, None]
        total = np.logaddexp(*logs)
        of_low = np.exp(logs[0] - total)
        if total.mean() - before < GAIN:
            break
        before = total.mean()
    return of_low if means[0] <= means[1] else 1 - of_low


def _between(x: Floats) -> float:
    """The value between two groups of 2-means that begin at 0 and 1."""
    cut, last = 0.5, np.nan
    while cut != last:
        last = cut
        cut = float((x[x <= cut].mean() + x[x > cut].mean()) / 2)
    return cut


def clean_ones(losses: Floats) -> NDArray[np.bool_]:
    """Which samples (n,) are clean: more probably of the lower Gaussian than of the other."""
    probability = low_component(losses)
    clean = probability > 0.5
    if clean.all() and len(losses) >= LEAST:
        worst = np.argsort(-losses, kind="stable")[: len(losses) // DOUBTED]
        clean[worst] = False
    return clean
