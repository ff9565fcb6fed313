"""What the ledger of a run gathers, writes and costs a step, at any number of ranks, of which one is real.

    python benchmarks/ledger.py --ranks 8 512 --batch 64 --steps 24000 --out ledger.json

A checkpoint is due after `--steps` steps of `--batch` samples on each rank; `--broken` of the samples were replaced. The
collectives are simulated: they count the bytes of what a rank receives, and give it its own rows in the place of everybody's.
Beside it stands what a ledger of every sample, three numbers of 8 bytes, would gather (computed).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import numpy as np
import torch
from output import write_figures

from mmref.run.directory import RunDir
from mmref.train import collectives
from mmref.train.ledger import Ledger


class Simulated:
    """The collectives of a rank among many that have what it has."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.bytes = ranks, 0
        collectives.gather, collectives.sum_over_ranks = self.gather, self.sum_over_ranks

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.bytes += self.ranks * x.nbytes
        return torch.cat([x] * self.ranks)

    def sum_over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        self.bytes += x.nbytes
        return self.ranks * x


def measure(ranks: int, batch: int, steps: int, broken: float) -> dict[str, Any]:
    rng, positions = np.random.default_rng(0), np.arange(batch)
    with tempfile.TemporaryDirectory() as folder:
        ledger, seconds = Ledger(RunDir(folder), 0, range(batch)), 0.0
        for step in range(steps):
            bad = np.where(rng.random(batch) < broken, "broken", "").astype(object)
            images = rng.integers(0, 10_000_000, batch)
            samples = {"step": np.full(batch, step), "position": positions, "image_index": images, "bad": bad}
            began = time.process_time()
            ledger.add(step, samples)
            seconds += time.process_time() - began
        simulated, began = Simulated(ranks), time.process_time()
        ledger.write(steps)
        wrote = time.process_time() - began
        written = sum(RunDir(folder).sizes("ledger").values())
    return {
        "ranks": ranks,
        "steps": steps,
        "gathered_mb": simulated.bytes / 1e6,
        "every_sample_mb": 24 * ranks * batch * steps / 1e6,
        "written_mb": written / 1e6,
        "write_seconds": wrote,
        "microseconds_a_step": 1e6 * seconds / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 512])
    parser.add_argument("--batch", type=int, default=64, help="samples of a rank in a step")
    parser.add_argument("--steps", type=int, default=24_000)
    parser.add_argument("--broken", type=float, default=1e-4, help="share of the samples that were replaced")
    parser.add_argument("--out", help="write the figures here as JSON")
    args = parser.parse_args()
    write_figures({"rows": [measure(ranks, args.batch, args.steps, args.broken) for ranks in args.ranks]}, args.out)


if __name__ == "__main__":
    main()
