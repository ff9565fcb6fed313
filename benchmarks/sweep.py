"""What a sweep saves. Three parts, all from a sweep that has ended:

refinement  counts trainings and times: every setting of the grid scored on the best trial's val features at each evaluation, as
            a sweep does, against a training for every setting, and against a trial that draws one setting at random
asha        of a sweep with `--scheduler none`: where ASHA would have stopped each trial, judging them one after the other,
            the steps that leaves, and the winner then; the same on average over random orders, since the first trials
            have nobody to be compared with; trial 0, where it is the config itself, comes first and is never stopped
unstopped   of a sweep with ASHA: copies of the trials that it stopped go on to their ends, and the steps it ran and the winner it
            named stand beside those of all trials run to the end

python benchmarks/sweep.py refinement runs/sweep --out refinement.json
python benchmarks/sweep.py asha runs/full --grace-steps 60 --out asha.json
python benchmarks/sweep.py unstopped runs/sweep --copies runs/unstopped --out unstopped.json
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from output import write_figures

from mmref.config import Config
from mmref.evaluate.choose import choose_on_val
from mmref.evaluate.evaluation import open_run, run_features
from mmref.run.directory import RunDir
from mmref.tuning.asha import Asha, grace_steps
from mmref.tuning.options import Options
from mmref.tuning.space import parse_space, with_values
from mmref.tuning.sweep import of_a_trial
from mmref.tuning.trial_log import Trial, TrialLog, best_of, folder
from mmref.tuning.trial_run import evaluations

GO_ON = """
import sys
from mmref.config import load_config
from mmref.train.trainer import train

train(load_config(sys.argv[1:]), final_evaluation=False)
"""
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
    features, space = run_features(run, config, checkpoint, config.data.root, ["val"])
    val = features["val"]
    return config, lambda c: choose_on_val(c, space, val.text, val.queries, val.image, val.image_objects)[1]


def refinement(trials: list[Trial], leader: Trial, run: RunDir, args: argparse.Namespace) -> dict[str, Any]:
    config, search = searcher(run.join(folder(leader.number)))
    grid = search(config)[1:]
    fields = ("kinds", "weights", "top_rs", "taus")
    one = with_values(config, {f"eval.refine_{name}": getattr(config.eval, f"refine_{name}")[:1] for name in fields})
    all_s, one_s = (median_seconds(lambda c=c: search(c), args.rounds) for c in (config, one))
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
            f"chance of a setting within {CLOSE} of the best": statistics.mean(s >= max(scores) - CLOSE for s in scores),
        },
    }


def let_make(scheduler: Any, trial: Trial) -> list[dict[str, Any]]:
    """The evaluations of a trial up to the one at which the scheduler stops it."""
    from ray.tune.schedulers import TrialScheduler

    known = SimpleNamespace(config={"number": trial.number})
    scheduler.on_trial_add(None, known)
    for place, result in enumerate(trial.results):
        if scheduler.on_trial_result(None, known, result) == TrialScheduler.STOP:
            return trial.results[: place + 1]
    return trial.results


def swept(run: RunDir) -> Config:
    """A sweep's config at the length of a trial."""
    return of_a_trial(run.read_config(), Options(**json.loads(run.read_text("sweep.json"))))


def asha(trials: list[Trial], leader: Trial, run: RunDir, args: argparse.Namespace) -> dict[str, Any]:
    config = swept(run)
    grace = grace_steps(args.grace_steps, config)
    own = parse_space(run.read_text("space.yaml"), "space.yaml").default_point(config)
    first = trials[: 1 if own == trials[0].values else 0]
    others = trials[len(first) :]

    def judged(order: list[Trial]) -> tuple[list[Trial], Trial]:
        scheduler = Asha(config.train.max_steps, grace, args.reduction, spared=0 if first else None)
        stopped = [replace(t, results=let_make(scheduler, t)) for t in order]
        winner = best_of(stopped)
        assert winner is not None  # the leader's first evaluation is never left out
        return stopped, winner

    def lost_among_others(stopped: list[Trial]) -> float:
        best, found = best_of(others), best_of([t for t in stopped if t not in first])
        assert best is not None and found is not None and best.score is not None and found.score is not None
        return best.score - found.score

    stopped, winner = judged(trials)
    done, every = sum(t.steps for t in stopped), sum(t.steps for t in trials)
    rng = random.Random(0)
    shuffled = [judged([*first, *rng.sample(others, len(others))]) for _ in range(args.orders)]
    return {
        "steps": {"all to the end": every, "ASHA": done, "share": done / every},
        "steps of each trial": [t.steps for t in stopped],
        "winner": {"all to the end": leader.number, "ASHA": winner.number},
        "score": {"all to the end": leader.score, "ASHA": winner.score},
        "random orders": {
            "orders": args.orders,
            "share of the steps": statistics.mean(sum(t.steps for t in some) / every for some, _ in shuffled),
            "same winner": statistics.mean(best.number == leader.number for _, best in shuffled),
            "points lost": statistics.mean(leader.score - best.score for _, best in shuffled),
            "among those that may be stopped": {
                "same winner": statistics.mean(lost_among_others(some) == 0 for some, _ in shuffled),
                "points lost": statistics.mean(lost_among_others(some) for some, _ in shuffled),
            },
        },
    }  # fmt: skip


def unstopped(trials: list[Trial], leader: Trial, run: RunDir, args: argparse.Namespace) -> dict[str, Any]:
    every = len(trials) * swept(run).train.max_steps
    with ThreadPoolExecutor(args.at_once) as pool:
        ended = list(pool.map(lambda t: to_the_end(t, run, Path(args.copies).absolute()), trials))
    best = best_of(ended)
    assert best is not None  # the leader has a score
    done = sum(t.steps for t in trials)
    return {
        "steps": {"all to the end": every, "ASHA": done, "share": done / every},
        "winner": {"all to the end": best.number, "ASHA": leader.number},
        "score": {"all to the end": best.score, "ASHA": leader.score},
        "score of each trial": {t.number: t.score for t in ended},
    }


def to_the_end(trial: Trial, run: RunDir, copies: Path) -> Trial:
    """The trial with the evaluations that it lacks. Its copy, in `copies`, goes on where an earlier call was stopped."""
    if trial.status != "stopped-early":
        return trial
    place = copies / f"{trial.number:03d}"
    if not place.exists():
        shutil.copytree(Path(run.path) / folder(trial.number), place)
    with open(copies / f"{trial.number:03d}.log", "w") as log:
        subprocess.run(
            [sys.executable, "-c", GO_ON, "--config", f"{place}/config.yaml", "--run_dir", str(place)],
            stdout=log, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    copy = RunDir(str(place))
    ended = replace(trial, results=evaluations(copy.read_config(), copy))
    print(f"trial {trial.number}: {trial.score:.2f} at step {trial.steps}, {ended.score:.2f} in the end", file=sys.stderr)
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for part in (refinement, asha, unstopped):
        command = parts.add_parser(part.__name__)
        command.add_argument("sweep", metavar="DIR", help="run directory of a sweep")
        command.add_argument("--out", metavar="FILE", help="JSON file")
        command.set_defaults(part=part)
    parts.choices["refinement"].add_argument("--rounds", type=int, default=5, help="searches timed (default: %(default)s)")
    parts.choices["asha"].add_argument("--grace-steps", type=int, help="default: as in mmref tune")
    parts.choices["asha"].add_argument("--reduction", type=float, default=3.0, help="default: %(default)s")
    parts.choices["asha"].add_argument("--orders", type=int, default=200, help="random orders of the trials (default: 200)")
    parts.choices["unstopped"].add_argument("--copies", metavar="DIR", required=True, help="folder for the copies")
    parts.choices["unstopped"].add_argument("--at-once", type=int, default=2, help="trainings at a time (default: %(default)s)")
    args = parser.parse_args()
    run = RunDir(args.sweep)
    trials = sorted(TrialLog(run).trials.values(), key=lambda t: t.number)
    leader = best_of(trials)
    if leader is None:
        parser.error(f"no trial of {run.path} has a score")
    write_figures(args.part(trials, leader, run, args), args.out)


if __name__ == "__main__":
    main()
