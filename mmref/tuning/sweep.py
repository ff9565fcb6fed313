"""Search hyper-parameters: `python tune/sweep.py --space tune/spaces/default.yaml --trials 16 --config configs/x.yaml`.

Every trial is the same training as `mmref train`; ASHA stops the ones that fall behind on val. `--resume DIR` goes on with
an interrupted sweep. The run directory gets best.yaml (what `mmref train --config` takes), trials.parquet, sweep.html, the
log trials.jsonl, space.yaml, config.yaml, sweep.json and a folder for each trial.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mmref.config import Config, dump_yaml, load_config, to_dict, with_absolute_paths
from mmref.config.shipped import shipped
from mmref.data.shard_set import ShardSet, data_fingerprint
from mmref.errors import ConfigError, RunDirectoryError, ShardSetError, SweepError, SweepInterruptedError
from mmref.run.directory import RunDir, read_jsonl
from mmref.storage.locations import expanded
from mmref.terminal.arguments import count, positive
from mmref.train.ray_storage import ray_filesystem
from mmref.train.trainer import DATA, check_inputs, check_same_data
from mmref.tuning.asha import Asha, grace_steps, judged_at, share_of_steps
from mmref.tuning.capacity import TRIAL_CPUS, connected, largest_node, sharing
from mmref.tuning.display import Display
from mmref.tuning.recorder import Recorder
from mmref.tuning.results import best_yaml, format_trials
from mmref.tuning.search import SEARCHERS, Numbered, Propose, proposer
from mmref.tuning.space import Space, parse_space, read_space, with_values
from mmref.tuning.sweep_report import render_sweep
from mmref.tuning.trial_log import LOG, Trial, TrialLog, best_of
from mmref.tuning.trial_run import run_trial

DEFAULT_CONFIG = "configs/emoji.yaml"  # the bundled data
DEFAULT_SPACE = shipped("tune/spaces/default.yaml")
FINAL_SEEDS = 3
RESUMABLE = ("trials", "max_concurrent", "final_seeds")  # options that may change when a sweep goes on
AUTO = "auto"  # of --max-concurrent
TRIAL_RESTARTS = 3  # of a trial whose process was lost; its workers have `train.max_failures` of their own
PBT = (
    "`--scheduler pbt` is not offered: population-based training copies checkpoints between trials, and Ray Train hands "
    "Ray Tune none of a nested training's, so that every exploit would be skipped in silence and the trials would be "
    "independent. Use asha, or none."
)


@dataclass(frozen=True)
class Options:
    """What is asked of a sweep, besides its config and space."""

    trials: int
    searcher: str = "optuna"
    scheduler: str = "asha"
    pareto: bool = False
    max_concurrent: int | None = None  # None: as many as fit
    trial_steps: int | None = None  # None: as many as the config's
    grace_steps: int | None = None  # None: until guidance is full, at least a quarter of a trial
    reduction: float = 3.0
    final_seeds: int = 0  # trainings of the best config and of the default, each


def build_parser() -> argparse.ArgumentParser:
    """The sweep's own flags; everything else on the command line goes to the config."""
    parser = argparse.ArgumentParser(
        prog="mmref tune", allow_abbrev=False, description="Search hyper-parameters with Ray Tune.",
        epilog="Any config field is a flag too (`--train.max_steps 200`): `mmref train --help` lists them.",
    )  # fmt: skip
    parser.add_argument(
        "--space", default=str(DEFAULT_SPACE), type=expanded, metavar="FILE", help="search space (default: %(default)s)"
    )
    parser.add_argument("--trials", type=positive, metavar="N", help="number of trials (default: 16; grid: all combinations)")
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        type=expanded,
        metavar="FILE",
        help="config that the trials vary (default: %(default)s)",
    )
    parser.add_argument(
        "--run_dir", default="runs/sweep", type=expanded, metavar="DIR", help="directory or URL (default: %(default)s)"
    )
    parser.add_argument("--resume", type=expanded, metavar="DIR",
                        help="go on with the sweep in DIR; --trials, --max-concurrent, --final-seeds may change")  # fmt: skip
    parser.add_argument("--retry-failed", action="store_true", help="with --resume: run failed trials again")
    parser.add_argument("--workers-per-trial", type=positive, metavar="N", help="the same as --train.workers")
    parser.add_argument("--max-concurrent", type=_concurrency, default=None, metavar="N|auto",
                        help="trials at a time; auto (default): as many as the cluster's CPUs and GPUs hold")  # fmt: skip
    parser.add_argument("--searcher", choices=SEARCHERS, default="optuna", help="default: optuna (TPE)")
    parser.add_argument("--scheduler", choices=["asha", "none", "pbt"], default="asha",
                        help="default: asha (early stops); pbt is refused, and says why")  # fmt: skip
    parser.add_argument("--pareto", action="store_true",
                        help="search for a high score and a short step at once (optuna, --scheduler none)")  # fmt: skip
    parser.add_argument("--trial-steps", type=positive, metavar="N",
                        help="length of a trial (default: train.max_steps); best.yaml keeps train.max_steps")  # fmt: skip
    parser.add_argument("--grace-steps", type=positive, metavar="N",
                        help="steps before ASHA may stop a trial (default: until guidance has its full weight, "
                             "loss.guide_full, and at least a quarter of a trial)")  # fmt: skip
    parser.add_argument("--reduction", type=float, default=3.0, metavar="R",
                        help="ASHA lets about the best 1/R pass each rung (default: %(default)g)")  # fmt: skip
    parser.add_argument("--final-seeds", type=count, metavar="N",
                        help="fresh seeds for which the best config and the default are trained in full and compared on "
                        f"test at the end; 0: not at all (default: {FINAL_SEEDS})")  # fmt: skip
    return parser


def main(argv: Sequence[str]) -> int:
    """`mmref tune` and tune/sweep.py. Raises the errors of mmref.errors."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if args.resume:
        allowed = {"resume", "retry_failed", *RESUMABLE}
        if extra := rest or [k for k, v in vars(args).items() if k not in allowed and v != parser.get_default(k)]:
            raise ConfigError(
                f"`--resume` goes on with the sweep as it was asked for, and takes no `{extra[0]}`; only `--trials`, "
                "`--max-concurrent` and `--final-seeds` may change, and `--retry-failed` runs failed trials again."
            )
        resume(args.resume, args.retry_failed, **{name: getattr(args, name) for name in RESUMABLE})
        return 0
    if args.retry_failed:
        raise ConfigError("`--retry-failed` goes with `--resume DIR`: a new sweep has no failed trials.")
    base = load_config(["--config", args.config, *rest])
    base.run_dir = args.run_dir
    if args.workers_per_trial:
        base = with_values(base, {"train.workers": args.workers_per_trial})
    space = read_space(args.space)
    trials = args.trials or (len(space.grid()) if args.searcher == "grid" else 16)
    seeds = FINAL_SEEDS if args.final_seeds is None else args.final_seeds
    if args.scheduler != "asha" and (args.grace_steps or args.reduction != parser.get_default("reduction")):
        raise ConfigError("`--grace-steps` and `--reduction` are ASHA's: leave them out, or use `--scheduler asha`.")
    names = {f.name for f in dataclasses.fields(Options)} - {"trials", "final_seeds", "max_concurrent"}
    given = {k: v for k, v in vars(args).items() if k in names}
    sweep(base, space, Options(trials, final_seeds=seeds, max_concurrent=_number(args.max_concurrent), **given))
    return 0


def sweep(base: Config, space: Space, options: Options) -> Config:
    """Run a sweep, write what it found, and return the best config.

    Raises:
        ConfigError, ShardSetError, ...: whatever can be known before Ray starts.
        ClusterTooSmallError: not one trial, or not `max_concurrent` of them, fits.
        SweepInterruptedError: Ctrl-C; `resume` goes on.
        SweepError: no trial has a score.
    """
    run = RunDir(base.run_dir)
    check_options(options, space)
    prepared = prepare(base, space, options, run)
    if submitted() and run.local and not os.path.isabs(os.path.expanduser(base.run_dir)):
        print(
            f"the sweep goes to {run.path}, in this job's copy of the working directory, which the cluster deletes some time "
            "after the job: give `--run_dir` an absolute path or a URL to keep it",
            flush=True,
        )
    if not submitted():  # whose copy of the working directory does not last
        # Paths are made absolute, so that best.yaml and a sweep that goes on mean the same in any directory.
        base, prepared = with_absolute_paths(base), with_absolute_paths(prepared)
    with run.held():
        if read_jsonl(run, LOG):
            raise RunDirectoryError(
                f"{run.path} holds a sweep already. `--resume {run.path}` goes on with it; or give another `--run_dir`."
            )
        run.write_text("config.yaml", dump_yaml(base))
        run.write_text("sweep.json", json.dumps(dataclasses.asdict(options), indent=1))
        run.write_text("space.yaml", space.text)
        run.write_text(DATA, data_fingerprint(base))
        return _run(base, prepared, space, options, run)


def submitted() -> bool:
    """Whether this process is the driver of a `ray job submit`, which runs in a copy of the working directory."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def resume(run_dir: str, retry_failed: bool = False, **changes: int | str | None) -> Config:
    """Go on with a sweep: ended trials are kept as they are, interrupted ones go on from their checkpoints.

    Args:
        retry_failed: run failed trials again, from their checkpoints where they have one.
        changes: RESUMABLE fields of its Options; None leaves one as it was.
    Raises: as `sweep`; RunDirectoryError where there is no sweep.
    """
    run = RunDir(run_dir)
    if not run.exists("space.yaml"):
        raise RunDirectoryError(f"{run.path} holds no sweep to go on with (there is no space.yaml). Start it without "
                                "`--resume`.")  # fmt: skip
    options = Options(**run.read_json("sweep.json"))
    changed = {k: _number(v) for k, v in changes.items() if v is not None}
    options = dataclasses.replace(options, **changed)  # type: ignore[arg-type]
    if (begun := len({line["trial"] for line in read_jsonl(run, LOG)})) > options.trials:
        raise ConfigError(f"`--trials {options.trials}` is fewer than the {begun} that {run.path} has begun already.")
    space = parse_space(run.read_text("space.yaml"), run.join("space.yaml"))
    check_options(options, space)
    own = run.read_config()
    prepared = prepare(own, space, options, run)
    check_same_data(run, own, data_fingerprint(own))
    with run.held():
        run.write_text("sweep.json", json.dumps(dataclasses.asdict(options), indent=1))
        if retry_failed:
            log = TrialLog(run)
            for trial in [t for t in log.trials.values() if t.status == "failed"]:
                log.reopen(trial.number)
        return _run(own, prepared, space, options, run)


def check_options(options: Options, space: Space) -> None:
    """Raise ConfigError for options that do not go together."""
    if options.scheduler == "pbt":
        raise ConfigError(PBT)
    if options.reduction <= 1:
        raise ConfigError(f"`--reduction` must be above 1, found {options.reduction}.")
    if options.final_seeds < 0:
        raise ConfigError(f"`--final-seeds` must be at least 0, found {options.final_seeds}.")
    if options.pareto and (options.searcher, options.scheduler) != ("optuna", "none"):
        raise ConfigError(
            f"`--pareto` needs `--searcher optuna --scheduler none`, found {options.searcher} and {options.scheduler}: ASHA "
            "compares trials by their score alone, and would stop the fast ones."
        )
    if options.searcher == "grid" and options.trials > (size := len(space.grid())):
        raise ConfigError(f"`--trials {options.trials}` asks for more than the {size} combinations of the grid.")


def prepare(base: Config, space: Space, options: Options, run: RunDir) -> Config:
    """The config that best.yaml starts from, everything checked that needs no Ray."""
    trial = of_a_trial(base, options)
    steps, every, grace = trial.train.max_steps, trial.train.eval_every, grace_steps(options.grace_steps, trial)
    if options.scheduler == "asha" and every > grace:
        raise ConfigError(
            f"ASHA is to judge trials of {steps} steps from step {grace} on, and they are evaluated every {every} steps: set "
            f"`--train.eval_every` to at most {grace}, or `--grace-steps` higher."
        )
    base = with_values(space.prepare(base), {"run_dir": run.path})
    check_inputs(base)
    splits = ShardSet.open(base.data.root).splits
    if "val" not in splits:
        raise ShardSetError(f"{base.data.root} has no val split: trials are compared on it. Build the set with one.")
    if options.final_seeds and "test" not in splits:
        raise ShardSetError(
            f"{base.data.root} has no test split to compare the best config and the default on at the end: add "
            "`--final-seeds 0`, or build the set with one."
        )
    return base


def of_a_trial(base: Config, options: Options) -> Config:
    """The config at the length of a trial."""
    return with_values(base, {"train.max_steps": options.trial_steps or base.train.max_steps})


def _run(own: Config, base: Config, space: Space, options: Options, run: RunDir) -> Config:
    """The trials that are left, and everything that is made of all of them.

    Args:
        own: the config the sweep was asked to vary.
        base: what `prepare` made of it.
    """
    config = with_absolute_paths(with_values(of_a_trial(base, options), {"train.keep_checkpoints": 1}))
    if not submitted():
        space = space.with_absolute_paths()
    steps = config.train.max_steps
    first = space.default_point(config) if options.searcher != "grid" else None
    propose = proposer(space, options.searcher, config.train.seed, first, options.pareto, options.trials)
    log = TrialLog(run)
    if (left := options.trials - sum(not t.running for t in log.trials.values())) > 0:
        asha = None
        if options.scheduler == "asha":
            grace = grace_steps(options.grace_steps, config)
            asha = Asha(steps, grace, options.reduction, log.trials.values(), spared=0 if first else None)
            if at := judged_at(config, grace, options.reduction):
                share = share_of_steps(config, grace, options.reduction)
                print(
                    f"ASHA judges at step {', '.join(map(str, at))} of {steps}: about {share:.0%} or more of the steps that all "
                    "trials would take",
                    flush=True,
                )
        # Tune ends in order at Ctrl-C. Whatever else interrupts it is told of below in the same way.
        with contextlib.suppress(KeyboardInterrupt), connected(config, options.max_concurrent, left) as fit_in:
            at_once = min(fit_in, left)
            _search(sharing(config, at_once, largest_node()), space, options, propose, log, at_once, run, asha)
    trials = list(log.trials.values())
    print(format_trials(trials, [p.name for p in space.parameters], steps), flush=True)
    run.write_text("sweep.html", render_sweep(trials, space, config, f"Sweep {Path(run.path).name}"))
    if any(t.running for t in trials) or len(trials) < options.trials:
        raise SweepInterruptedError(
            f"{sum(not t.running for t in trials)} of {options.trials} trials are done. Go on with: mmref tune --resume "
            f"{run.path}"
        )
    best, chosen = _conclude(trials, base, run, steps)
    if options.final_seeds:
        from mmref.tuning.final import compare

        go_on = f"Go on with: mmref tune --resume {run.path}"
        own = with_values(own, {"run_dir": run.path})
        try:
            final = compare(own, base, chosen, options.final_seeds, options.max_concurrent)
        except KeyboardInterrupt:
            raise SweepInterruptedError(
                f"all trials are done and best.yaml is written; the comparison on test is not. {go_on}"
            ) from None
        except SweepError as error:
            raise SweepError(f"all trials are done and best.yaml is written; the comparison on test: {error} {go_on}") from None
        run.write_text("sweep.html", render_sweep(trials, space, config, f"Sweep {Path(run.path).name}", final))
    print(f"report: {run.join('sweep.html')}")
    return best


def _search(
    config: Config,
    space: Space,
    options: Options,
    propose: Propose,
    log: TrialLog,
    concurrent: int,
    run: RunDir,
    asha: Asha | None,
) -> None:
    """Run the trials that are left; the log holds what comes of them."""
    from ray import tune

    # Tune's own log files of a trial would say again what metrics.jsonl says.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # The recorder prints what a person needs; a failed trial is a line of its table, not a traceback of Tune.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # A trial may end before its first evaluation.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    ended = [t for t in log.trials.values() if not t.running]
    left = options.trials - len(ended)
    print(
        f"{left} trials of {config.train.max_steps} steps to {run.path}, {concurrent} at a time"
        f"{f', {len(ended)} are done already' if ended else ''} ...",
        flush=True,
    )
    if out := space.outside(config):
        print(f"the config itself is not among the trials: the space leaves out {', '.join(out)}", flush=True)
    run.remove("tune")  # Tune's own state, of a driver that has ended
    display = Display(log, options.trials, config.train.max_steps)
    stopped = set() if asha is None else asha.stopped
    recorder = Recorder(run, log, [p.name for p in space.parameters], config.train.max_steps, display, stopped)
    trainable = tune.with_resources(tune.with_parameters(run_trial, base=to_dict(config)), {"CPU": TRIAL_CPUS})
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            num_samples=left,
            search_alg=Numbered(log, propose, options.trials),
            scheduler=asha,
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=run.root,
            storage_filesystem=ray_filesystem(run),
            verbose=0,
            callbacks=[recorder],
            failure_config=tune.FailureConfig(max_failures=TRIAL_RESTARTS),
        ),
    )
    try:
        with display:
            tuner.fit()
    finally:
        recorder.close()
        run.remove("tune")


def _conclude(trials: list[Trial], base: Config, run: RunDir, trial_steps: int) -> tuple[Config, Trial]:
    """Write best.yaml. Raises SweepError where no trial has a score."""
    best = best_of(trials)
    if best is None:
        first = next((t.error for t in trials if t.error), "no trial reached its first evaluation")
        raise SweepError(f"no trial of {run.path} ended with a score; the first: {first} All of them are in trials.parquet.")
    config = with_values(base, {**best.values, "run_dir": run.join("best")})
    run.write_text("best.yaml", best_yaml(config, best, base.eval.metric, trial_steps))
    print(f"best: trial {best.number}, score {best.score:.2f}. Train it: python jobs/train.py --config {run.join('best.yaml')}")
    return config, best


def _number(value: int | str | None) -> int | None:
    """What `--max-concurrent` and the other numbers mean: None for auto."""
    return None if value == AUTO or value is None else int(value)


def _concurrency(text: str) -> int | str:
    return text if text == AUTO else positive(text)
