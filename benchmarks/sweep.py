"""What it saves that a trial searches its refinement over its val features, against refinement as dimensions of the sweep.

    python benchmarks/sweep.py runs/sweep --out sweep.json

Counts trainings and times, from a sweep that has ended and the best trial's features: every setting of the grid scored at each
evaluation (as a sweep does), against a training for every setting, and against a trial that draws one setting at random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmref.cluster import connect
from mmref.config import Config
from mmref.evaluate.choose import choose_on_val, trained_space
from mmref.evaluate.embed import embed_splits
from mmref.evaluate.evaluate import open_run
from mmref.rundir import RunDir
from mmref.train.checkpoint import fetched, load_references
from tune.space import with_values
from tune.trials import Trial, TrialLog, best_of, folder

CLOSE = 0.1  # points: a setting this near the best is as good


def median_seconds(call: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def searcher(run_dir: str) -> tuple[Config, Callable[[Config], list[dict[str, Any]]]]:
    """A trial's config, and its search of a config's grid over its val features, which gives a row for each setting."""
    run, config, checkpoint = open_run(run_dir)
    with connect(config.eval.workers):
        val = embed_splits(config, run, checkpoint, config.data.root, ["val"])["val"]
    with fetched(run, checkpoint, "references") as files:
        space = trained_space(config, load_references(files, checkpoint.meta).numpy())
    return config, lambda c: choose_on_val(c, space, val.text, val.queries, val.image, val.image_objects)[1]


def compare(trials: list[Trial], leader: Trial, sweep_dir: str, rounds: int) -> dict[str, Any]:
    config, search = searcher(f"{sweep_dir}/{folder(leader.number)}")
    grid = search(config)[1:]
    fields = ("kinds", "weights", "top_rs", "taus")
    one = with_values(config, {f"eval.refine_{name}": getattr(config.eval, f"refine_{name}")[:1] for name in fields})
    all_s, one_s = (median_seconds(lambda c=c: search(c), rounds) for c in (config, one))
    evaluations, seconds = sum(len(t.results) for t in trials), sum(t.seconds for t in trials)
    alone = seconds - evaluations * (all_s - one_s)  # the same trials with a single setting
    scores = [row["objective"] for row in grid]
    return {
        "settings": len(grid),
        "inside a trial": {
            "trainings": len(trials),
            "seconds": seconds,
            "seconds a search": all_s,
            "share of the time": evaluations * all_s / seconds,
        },
        "as dimensions, every setting": {"trainings": len(trials) * len(grid), "seconds": len(grid) * alone},
        "times the cost": len(grid) * alone / seconds,
        "as dimensions, one setting a trial": {
            "trainings": len(trials),
            "seconds": alone,
            "points lost by the best config": max(scores) - statistics.mean(scores),
            f"chance of a setting within {CLOSE} of the best": statistics.mean(
                s >= max(scores) - CLOSE for s in scores
            ),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="DIR", help="run directory of a sweep")
    parser.add_argument("--rounds", type=int, default=5, help="searches timed (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="JSON file")
    args = parser.parse_args()
    run = RunDir(args.sweep)
    trials = list(TrialLog(run).trials.values())
    leader = best_of(trials)
    if leader is None:
        parser.error(f"no trial of {run.path} has a score")
    text = json.dumps(compare(trials, leader, run.path, args.rounds), indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n")


if __name__ == "__main__":
    main()
