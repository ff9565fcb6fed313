"""Search hyper-parameters: `python tune/sweep.py --space tune/spaces/default.yaml --trials 16 --config configs/x.yaml`.

Every trial is the same training as `mmref train`; ASHA stops the ones that fall behind on val. The run directory gets
best.yaml (what `mmref train --config` takes), trials.csv, space.yaml, config.yaml and a folder for each trial.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmref.cli import run_command
from mmref.cluster import connect, needed_cpus
from mmref.config import Config, dump_yaml, load_config, to_dict
from mmref.data.shards import ShardSet
from mmref.errors import ClusterTooSmallError, ConfigError, RunDirectoryError, ShardSetError, SweepError
from mmref.rundir import RunDir
from mmref.train.trainer import check_inputs
from tune.results import Recorder, best_yaml, format_trials
from tune.space import Space, read_space, with_values
from tune.trial import run_trial

TRIAL_CPUS = 0.1  # of the process that starts a trial's training and waits for it
SPARE_CPUS = 1  # Ray Data's short read tasks, which no worker or reader has reserved
DEFAULT_SPACE = Path(__file__).parent / "spaces" / "default.yaml"


@dataclass(frozen=True)
class Options:
    """What is asked of a sweep, besides its config and space."""

    trials: int
    searcher: str = "optuna"
    scheduler: str = "asha"
    max_concurrent: int | None = None  # None: as many as fit
    trial_steps: int | None = None  # None: as many as the config's
    grace_steps: int | None = None  # None: a quarter of a trial
    reduction: float = 3.0


def build_parser() -> argparse.ArgumentParser:
    """The sweep's own flags; everything else on the command line goes to the config."""
    parser = argparse.ArgumentParser(
        prog="mmref tune", allow_abbrev=False, description="Search hyper-parameters with Ray Tune.",
        epilog="Any config field is a flag too (`--train.max_steps 200`): `mmref train --help` lists them.",
    )  # fmt: skip
    parser.add_argument(
        "--space", default=str(DEFAULT_SPACE), metavar="FILE", help="search space (default: %(default)s)"
    )
    parser.add_argument("--trials", type=_positive, default=16, help="number of trials (default: %(default)s)")
    parser.add_argument("--config", metavar="FILE", help="config that the trials vary")
    parser.add_argument(
        "--run_dir", default="runs/sweep", metavar="DIR", help="directory or URL (default: %(default)s)"
    )
    parser.add_argument("--max-concurrent", type=_concurrency, default=None, metavar="N|auto",
                        help="trials at a time; auto (default): as many as the cluster's CPUs and GPUs hold")  # fmt: skip
    parser.add_argument("--searcher", choices=["optuna", "random"], default="optuna", help="default: optuna (TPE)")
    parser.add_argument("--scheduler", choices=["asha", "none"], default="asha", help="default: asha (early stops)")
    parser.add_argument("--trial-steps", type=_positive, metavar="N",
                        help="length of a trial (default: train.max_steps); best.yaml keeps train.max_steps")  # fmt: skip
    parser.add_argument("--grace-steps", type=_positive, metavar="N",
                        help="steps before ASHA may stop a trial (default: a quarter of a trial)")  # fmt: skip
    parser.add_argument("--reduction", type=float, default=3.0, metavar="R",
                        help="ASHA lets about the best 1/R pass each rung (default: %(default)s)")  # fmt: skip
    return parser


def main(argv: list[str]) -> int:
    """`mmref tune` and tune/sweep.py. Raises the errors of mmref.errors."""
    args, rest = build_parser().parse_known_args(argv)
    base = load_config([*(["--config", args.config] if args.config else []), *rest])
    base.run_dir = args.run_dir
    options = Options(
        args.trials,
        args.searcher,
        args.scheduler,
        args.max_concurrent,
        args.trial_steps,
        args.grace_steps,
        args.reduction,
    )
    sweep(base, read_space(args.space), options)
    return 0


def sweep(base: Config, space: Space, options: Options) -> Config:
    """Run a sweep, write what it found, and return the best config.

    Raises:
        ConfigError, ShardSetError, ...: whatever can be known before Ray starts.
        ClusterTooSmallError: not one trial, or not `max_concurrent` of them, fits.
        SweepError: no trial has a score.
    """
    run = RunDir(base.run_dir)
    config, base = prepare(base, space, options, run)
    local = starts_ray()
    cores = os.cpu_count() or 1
    storage_gb = config.train.storage_gb * max(1, cores // config.train.workers)
    with connect(TRIAL_CPUS + needed_cpus(config) + SPARE_CPUS, storage_gb):
        import ray

        # a local cluster offers more logical CPUs than there are cores: trials beyond the cores would only slow each other
        fit_in = concurrency(ray.cluster_resources(), config, options.max_concurrent, cores if local else None)
        recorder = _search(config, space, options, min(fit_in, options.trials), run)
    recorder.write()
    names = [p.name for p in space.parameters]
    print(format_trials(recorder.ranked(), names, config.train.max_steps))
    return _conclude(recorder, base, run, config.train.max_steps)


def prepare(base: Config, space: Space, options: Options, run: RunDir) -> tuple[Config, Config]:
    """Check everything that needs no Ray. Returns the config that trials vary and the one that best.yaml starts from."""
    base = space.prepare(base)
    check_inputs(base)
    if "val" not in ShardSet.open(base.data.root).splits:
        raise ShardSetError(f"{base.data.root} has no val split: trials are compared on it. Build the set with one.")
    if options.reduction <= 1:
        raise ConfigError(f"`--reduction` must be above 1, found {options.reduction}.")
    steps = options.trial_steps or base.train.max_steps
    config = with_values(base, {
        "run_dir": run.join("trials"), "data.root": RunDir(base.data.root).path,  # workers run in other directories
        "train.max_steps": steps, "train.keep_checkpoints": 1,
    })  # fmt: skip
    run.check_writable()
    if run.exists("space.yaml"):
        raise RunDirectoryError(f"{run.path} holds a sweep already. Give another `--run_dir`, or remove it.")
    run.write_text("config.yaml", dump_yaml(base))
    run.write_text("space.yaml", space.text)
    return config, base


def concurrency(have: dict[str, float], config: Config, wanted: int | None, cores: int | None) -> int:
    """How many trials run at a time without starving each other or Ray Data.

    Args:
        have: resources of the cluster.
        wanted: trials asked for; None for as many as fit.
        cores: physical cores, where the cluster's CPUs are logical ones.
    Raises:
        ClusterTooSmallError: with the arithmetic, when none or fewer than wanted fit.
    """
    t = config.train
    need = TRIAL_CPUS + needed_cpus(config)
    fit_in = math.floor((have.get("CPU", 0) - SPARE_CPUS + 1e-6) / need)
    text = (
        f"(the cluster's {have.get('CPU', 0):g} CPUs - {SPARE_CPUS} for Ray Data) / ({t.workers} workers x "
        f"({t.cpus_per_worker:g} CPU + {config.data.readers} readers) + {TRIAL_CPUS})"
    )
    if t.gpu and have.get("GPU", 0) // t.workers < fit_in:
        fit_in = int(have.get("GPU", 0) // t.workers)
        text = f"the cluster's {have.get('GPU', 0):g} GPUs / {t.workers} workers"
    if fit_in < (wanted or 1):
        raise ClusterTooSmallError(
            f"{wanted or 1} trials at a time do not fit, only {max(0, fit_in)}: {text}. Lower `--max-concurrent` or "
            "`--train.workers`, or add nodes."
        )
    if wanted:
        return wanted
    return fit_in if cores is None else max(1, min(fit_in, math.floor(cores / (t.workers * max(t.cpus_per_worker, 1)))))


def _search(config: Config, space: Space, options: Options, concurrent: int, run: RunDir) -> Recorder:
    """Run the trials; the recorder holds what came of them."""
    from ray import tune

    # Tune's own log files of a trial would say again what metrics.jsonl says
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # the recorder prints what a person needs; a failed trial is a line of its table, not a traceback of Tune
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    recorder = Recorder(run, [p.name for p in space.parameters], options.trials, config.train.max_steps)
    print(
        f"{options.trials} trials of {config.train.max_steps} steps to {run.path}, {concurrent} at a time ...",
        flush=True,
    )
    if left_out := space.outside(config):
        print(f"the config itself is not among the trials: the space leaves out {', '.join(left_out)}", flush=True)
    trainable = tune.with_resources(tune.with_parameters(run_trial, base=to_dict(config)), {"CPU": TRIAL_CPUS})
    tune.Tuner(
        trainable,
        param_space=space.domains(),
        tune_config=tune.TuneConfig(
            metric="score",
            mode="max",
            num_samples=options.trials,
            search_alg=_searcher(config, space, options, concurrent),
            scheduler=_scheduler(config, options),
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=run.path, verbose=0, callbacks=[recorder]),
    ).fit()
    recorder.close()
    return recorder


def _searcher(config: Config, space: Space, options: Options, concurrent: int) -> Any:
    """Optuna's TPE or random search, seeded by the config, the config's own values first."""
    point = space.default_point(config)
    first = [point] if point else []
    if options.searcher == "random":
        from ray.tune.search import BasicVariantGenerator

        return BasicVariantGenerator(first or None, max_concurrent=concurrent, random_state=config.train.seed)
    try:
        import optuna
    except ImportError:
        raise ConfigError(
            "`--searcher optuna` needs the tuning extra: `pip install 'mmref[tuning]'`; or use random."
        ) from None
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return OptunaSearch(points_to_evaluate=first or None, seed=config.train.seed)


def _scheduler(config: Config, options: Options) -> Any:
    """ASHA over steps, or None. The longest trial ends by itself, so that nothing is stopped at its last step."""
    if options.scheduler == "none":
        return None
    from ray.tune.schedulers import ASHAScheduler

    steps = config.train.max_steps
    return ASHAScheduler(
        time_attr="step",
        max_t=steps + 1,
        grace_period=min(steps, options.grace_steps or max(1, steps // 4)),
        reduction_factor=options.reduction,
    )


def _conclude(recorder: Recorder, base: Config, run: RunDir, trial_steps: int) -> Config:
    """Write best.yaml. Raises SweepError where no trial has a score."""
    best = recorder.best()
    if best is None:
        first = next((t.error for t in recorder.ranked() if t.error), "no trial reached its first evaluation")
        raise SweepError(
            f"no trial of {run.path} ended with a score; the first: {first} All of them are in trials.csv."
        )
    config = with_values(base, {**best.values, "run_dir": run.join("best")})
    run.write_text("best.yaml", best_yaml(config, best, base.eval.metric, trial_steps))
    print(
        f"best: trial {best.number}, score {best.score:.2f}. Train it: python jobs/train.py --config {run.join('best.yaml')}"
    )
    return config


def starts_ray() -> bool:
    """Whether mmref will start Ray on this machine itself: no cluster is named or connected."""
    import ray

    return not os.environ.get("RAY_ADDRESS") and not ray.is_initialized()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, found {text}")
    return value


def _concurrency(text: str) -> int | None:
    return None if text == "auto" else _positive(text)


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
