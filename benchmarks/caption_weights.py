"""What can tell a wrong caption from a right one? Of runs trained with swapped captions (`--data.caption_noise 0.5`): the
weight that `loss.caption_weight`'s share of objects, and weights made of the cosine, leave to the wrong captions of train.

python benchmarks/caption_weights.py runs/noisy --out caption_weights.json
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from output import write_figures

from mmref.config import Config
from mmref.data.captions import CaptionNoise
from mmref.data.sample_reader import SampleReader, SplitIndex
from mmref.evaluate.evaluation import open_run, run_features
from mmref.evaluate.features import Queries
from mmref.losses import agreement, agreement_weights
from mmref.losses.reference_contrast import reference_scores
from mmref.run.checkpoints import fetched, load_references

SHARE, COSINES = 20.0, (4.0, 8.0)  # sharpness of the weights: of the share of objects, of the cosine
CHUNK = 4096  # captions scored at a time


def as_trained(config: Config, queries: Queries, index: SplitIndex) -> tuple[np.ndarray, np.ndarray]:
    """Of each caption of train, as training sees it: its row among the distinct texts, and whether it is another object's."""
    noise = CaptionNoise(config.data, config.train.seed, index, SampleReader(index))
    number = np.arange(len(queries.text)) - np.searchsorted(queries.images, queries.images)  # of each among its image's
    row = {text: i for i, text in enumerate(queries.texts)}
    seen = np.array([row[noise(queries.texts[t], int(i), int(n))] for t, i, n in zip(queries.text, queries.images, number)])
    own = set(zip(queries.text.tolist(), queries.objects.tolist()))
    wrong = np.array([(t, o) not in own for t, o in zip(seen.tolist(), queries.objects.tolist())])
    return seen, wrong


def mean_by_object(features: np.ndarray, objects: np.ndarray, count: int) -> torch.Tensor:
    """(count, 1, d) mean feature of each object, zero where there is none."""
    sums = np.zeros((count, features.shape[1]), np.float32)
    np.add.at(sums, objects, features)
    return torch.from_numpy(sums / np.maximum(np.bincount(objects, minlength=count), 1)[:, None])[:, None]


def left_to_wrong(weights: torch.Tensor, wrong: torch.Tensor) -> dict[str, float]:
    """In percent: the weight that wrong captions keep, and how many equally weighed captions vary as much."""
    return {
        "weight of the wrong": 100 * float(weights[wrong].sum() / weights.sum()),
        "effective captions": 100 * float(weights.sum() ** 2 / (weights**2).sum() / len(weights)),
    }


def measure(text: torch.Tensor, references: torch.Tensor, objects: torch.Tensor, wrong: torch.Tensor) -> dict[str, Any]:
    """Figures of captions (n, d) with references (A, K, d)."""
    shares, cosines = [], []
    for part, own in zip(text.split(CHUNK), objects.split(CHUNK)):
        shares.append(agreement(part, references, own))
        cosines.append(reference_scores(part, references, "max", 1.0).gather(1, own[:, None])[:, 0])
    share, cosine = torch.cat(shares), torch.cat(cosines)
    # objects without a reference yet, as `agreement` has them
    cosine = torch.where(cosine.isfinite(), cosine, torch.nan)
    # percent of the other objects that a right caption resembles more
    ahead = 100 * (1 - share[~wrong & ~share.isnan()])
    found: dict[str, Any] = {f"share x {SHARE:g}": left_to_wrong(agreement_weights(share, SHARE), wrong)}
    found |= {f"cosine x {by:g}": left_to_wrong(agreement_weights(cosine, by), wrong) for by in COSINES}
    found["objects ahead of a right caption's own, percent"] = {
        "median": float(ahead.median()), "90 %": float(ahead.quantile(0.9)),
    }  # fmt: skip
    return found


def figures(run_dir: str) -> dict[str, Any]:
    run, config, checkpoint = open_run(run_dir)
    if config.data.caption_noise == 0 or config.data.caption_noise_kind != "swap" or config.data.mix:
        raise SystemExit(f"{run_dir}: give a run of one shard set, trained with `--data.caption_noise` above 0 that swaps.")
    features, space = run_features(run, config, checkpoint, config.data.root, ["train"])
    train = features["train"]
    seen, wrong = as_trained(config, train.queries, train.index)
    objects = train.queries.objects
    count = train.index.n_objects
    text = torch.from_numpy(train.text[seen])
    images = (train.image, train.image_objects)
    both = (np.concatenate([train.image, train.text[seen]]), np.concatenate([train.image_objects, objects]))
    references = {"mean image": mean_by_object(*images, count), "mean image and caption": mean_by_object(*both, count)}
    if space is not None:
        with fetched(run, checkpoint, "references") as folder:
            references["learned"] = load_references(folder, checkpoint.meta)
    arguments = torch.from_numpy(objects), torch.from_numpy(wrong)
    return {
        "step": checkpoint.step,
        "wrong captions": 100 * float(wrong.mean()),
        **{name: measure(text, rows, *arguments) for name, rows in references.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories of `mmref train --data.caption_noise RATE`")
    parser.add_argument("--out", help="also write the figures to this file")
    args = parser.parse_args()
    began = time.perf_counter()
    result: dict[str, Any] = {run: figures(run) for run in args.runs}
    result["wall_s"] = time.perf_counter() - began
    write_figures(result, args.out)


if __name__ == "__main__":
    main()
