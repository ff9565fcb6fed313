"""Which captions does RDE's division take for wrong? Of runs of `loss.align: rde` trained with swapped captions
(`--data.caption_noise 0.5`): its labels in the newest checkpoint against what was swapped.

python benchmarks/division.py runs/rde --out division.json
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from caption_weights import as_trained
from output import write_figures

from mmref.data.shard_set import train_index
from mmref.evaluate.features import read_queries
from mmref.run.checkpoints import PAIRS, TensorFolder, fetched, latest_checkpoint
from mmref.run.directory import RunDir
from mmref.train.division import Division


def figures(run_dir: str) -> dict[str, Any]:
    """Shares in percent, of the pairs that were seen since the run began."""
    run = RunDir(run_dir)
    config, checkpoint = run.read_config(), latest_checkpoint(run)
    swaps = config.data.caption_noise > 0 and config.data.caption_noise_kind == "swap" and not config.data.mix
    index = train_index(config)
    division = Division.of(config, index)
    if checkpoint is None or division is None or not swaps:
        raise SystemExit(f"{run_dir}: give a run of `loss.align: rde` with a checkpoint, trained with swapped captions.")
    with fetched(run, checkpoint, "optimizer") as folder:
        tensors = TensorFolder(folder, "optimizer")
        division.load_state_dict({name: tensors.get(f"{PAIRS}/{name}") for name in division.state_dict()})
    queries = read_queries(index)
    _, wrong = as_trained(config, queries, index)
    number = np.arange(len(queries.text)) - np.searchsorted(queries.images, queries.images)
    pairs = division.pairs(queries.images, number)
    seen = ~np.isnan(division.losses.numpy()[pairs, 0])
    wrong, left_out = wrong[seen], division.labels.numpy()[pairs][seen] == 0
    return {
        "step": checkpoint.step,
        "pairs seen": 100 * float(seen.mean()),
        "wrong": 100 * float(wrong.mean()),
        "left out": 100 * float(left_out.mean()),
        "precision": 100 * float(wrong[left_out].mean()) if left_out.any() else None,
        "recall": 100 * float(left_out[wrong].mean()),
        "wrong among those kept": 100 * float(wrong[~left_out].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories of `mmref train --loss.align rde --data.caption_noise RATE`")
    parser.add_argument("--out", help="also write the figures to this file")
    args = parser.parse_args()
    write_figures({run: figures(run) for run in args.runs}, args.out)


if __name__ == "__main__":
    main()
