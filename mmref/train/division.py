"""RDE's division of training pairs into clean and wrong ones (Qin et al., CVPR 2024, arXiv:2308.09911), for `loss.align: rde`.

Of each pair of an image and one of its captions the losses of its last visit are kept, one for each direction. At
`loss.rde_from`, and once in an epoch from then on, two Gaussians are fitted to the losses of all pairs, for each direction by
itself. A pair is clean where both directions say so, wrong where neither does, and where they differ a coin is thrown.

The paper runs over the whole train set before each epoch. Here it would be a multiple of the epoch's own work, in which an
object shows two of its images: losses are those that training meets anyway. So that a pair that was visited long ago does not
look bad for that, they are kept in standard deviations of their step's. And where the paper asks two features of a sample, of
the whole and of selected tokens, here two directions of one feature are asked: towers need not have attention to select by.

The table is the same on every rank: losses are gathered as features are. It is a function of the steps alone.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmref.config import Config
from mmref.data.epochs import steps_per_epoch
from mmref.data.plan import build_plan
from mmref.data.sample_reader import SplitIndex
from mmref.errors import TooFewPairsError
from mmref.losses.mixture import LEAST, clean_ones
from mmref.randomness import RandomStream, uniform

Ints = NDArray[np.int64]
DIRECTIONS = 2  # image to text, text to image


class Division:
    """Losses and labels of all pairs of a run, on every rank."""

    def __init__(self, n_captions: NDArray[np.int32], start: int, every: int, seed: int, device: torch.device | str) -> None:
        """
        Args:
            n_captions: (images,) of the training index.
            start: the step before which pairs are divided for the first time.
            every: steps between two divisions.

        Raises:
            TooFewPairsError: two Gaussians cannot be fitted to so few.
        """
        self.first_pair: Ints = np.concatenate([[0], np.cumsum(np.maximum(n_captions, 1), dtype=np.int64)])
        self.start, self.every, self.seed = start, every, seed
        if (pairs := int(self.first_pair[-1])) < LEAST:
            raise TooFewPairsError(
                f"`loss.align: rde` divides training pairs by their losses and needs at least {LEAST}, found {pairs}. Train on "
                "more pairs, or with `loss.align: infonce`."
            )
        self.losses = torch.full((pairs, DIRECTIONS), torch.nan, device=device)  # NaN: not seen yet
        self.labels = torch.ones(pairs, dtype=torch.uint8, device=device)  # 1: clean, as all are before the first division

    @classmethod
    def of(cls, config: Config, index: SplitIndex, device: torch.device | str = "cpu") -> Division | None:
        """That of a run; None where its alignment asks for none. Raises TooFewPairsError."""
        if config.loss.align != "rde":
            return None
        start = math.ceil(config.loss.rde_from * config.train.max_steps)
        every = math.ceil(steps_per_epoch(build_plan(config, index)))
        return cls(index.n_captions, start, every, config.train.seed, device)

    def pairs(self, images: Ints, captions: Ints) -> Ints:
        """Numbers (n,) of pairs of images of the index and captions of theirs."""
        return np.minimum(self.first_pair[images] + captions, self.first_pair[images + 1] - 1)

    def begin(self, step: int) -> bool:
        """Before each step: divides where it is time to; whether pairs are divided by now."""
        if step < self.start:
            return False
        if (step - self.start) % self.every == 0:
            self._divide(step)
        return True

    def label(self, pairs: Tensor) -> Tensor:
        """(n,) fp32 labels of pairs (n,): 1 or 0."""
        return self.labels[pairs].float()

    @torch.no_grad()
    def note(self, pairs: Tensor, last: Tensor, losses: Tensor) -> None:
        """After each step: the losses (N, DIRECTIONS) of its global batch.

        Args:
            pairs: (u,) the pairs of the global batch, each once.
            last: (u,) where each stands in it for the last time.
        """
        spread = losses.std(0, correction=0).clamp(min=1e-6)
        self.losses[pairs] = ((losses - losses.mean(0)) / spread)[last]

    @property
    def clean_share(self) -> float:
        """Share of the pairs seen so far that are taken for clean."""
        seen = ~self.losses[:, 0].isnan()
        return float(self.labels[seen].float().mean()) if bool(seen.any()) else 1.0

    def _divide(self, step: int) -> None:
        losses = self.losses.cpu().numpy().astype(np.float64)
        seen = np.flatnonzero(~np.isnan(losses[:, 0]))
        votes = np.stack([clean_ones(losses[seen, way]) for way in range(DIRECTIONS)]).sum(0)
        coins = uniform(RandomStream.DOUBTED_PAIRS, self.seed, step, seen) < 0.5
        labels = np.ones(len(losses), np.uint8)
        labels[seen] = np.where(votes == 1, coins, votes == DIRECTIONS)
        self.labels.copy_(torch.from_numpy(labels))

    def state_dict(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "labels": self.labels}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.losses.copy_(state["losses"])
        self.labels.copy_(state["labels"])
