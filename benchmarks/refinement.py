"""Which metric should choose the refinement? Of trained runs: half of the val objects, drawn again and again, choose it by each
metric; the gain is that of the other half, against no refinement, and the same for one setting that nobody chooses.

python benchmarks/refinement.py runs/demo runs/other --halves 50 --out refinement.json
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np
from output import write_figures

from mmref.evaluate.choose import config_grid
from mmref.evaluate.evaluation import open_run, run_features
from mmref.evaluate.metrics import METRIC_NAMES
from mmref.evaluate.refinement import RefinementSettings, score_refinements

CHOSEN_BY = ("mAP", "R@1", "R@1+mAP")
SHOWN = ("R@1", "mAP")


def per_query(run_dir: str) -> tuple[list[RefinementSettings], np.ndarray, np.ndarray]:
    """Settings; values (settings, queries, metrics) in percent on val, no refinement first; object of each query."""
    run, config, checkpoint = open_run(run_dir)
    features, space = run_features(run, config, checkpoint, config.data.root, ["val"])
    val = features["val"]
    if space is None:
        raise SystemExit(f"{run_dir}: trained without references, there is nothing to refine by.")
    queries, objects = val.text[val.queries.text], val.queries.objects
    grid = config_grid(config)
    scored = score_refinements(space, queries, val.image, objects, val.image_objects, grid)
    return list(scored), np.stack([found.values() for found in scored.values()]), objects


def gains(run_dir: str, halves: int, fixed: RefinementSettings) -> dict[str, dict[str, float]]:
    settings, values, objects = per_query(run_dir)
    columns = {name: METRIC_NAMES.index(name) for name in SHOWN}
    found: dict[str, list[np.ndarray]] = {name: [] for name in (*CHOSEN_BY, "fixed")}
    rng, names = np.random.default_rng(0), np.unique(objects)
    same = [i for i, one in enumerate(settings) if replace(one, top_p=None) == fixed]
    for _ in range(halves):
        first = np.isin(objects, rng.permutation(names)[: len(names) // 2])
        for chosen_on in (first, ~first):
            here, there = values[:, chosen_on].mean(1), values[:, ~chosen_on].mean(1)
            best = {by: int(np.argmax(sum(here[:, columns[m]] for m in by.split("+")))) for by in CHOSEN_BY}
            for by, at in {**best, **({"fixed": same[-1]} if same else {})}.items():
                found[by].append(there[at] - there[0])
    return {
        by: {**{m: float(np.mean([g[c] for g in rows])) for m, c in columns.items()},
             "worst R@1": float(min(g[columns["R@1"]] for g in rows))}
        for by, rows in found.items() if rows
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run directories of `mmref train`")
    parser.add_argument("--halves", type=int, default=50, help="times that val is cut in two")
    parser.add_argument("--out", help="also write the figures to this file")
    args = parser.parse_args()
    began = time.perf_counter()
    fixed = RefinementSettings(weight=0.2, top_r=64, tau=0.05)
    result: dict[str, object] = {run: gains(run, args.halves, fixed) for run in args.runs}
    result["wall_s"] = time.perf_counter() - began
    write_figures(result, args.out)


if __name__ == "__main__":
    main()
