"""Search hyper-parameters: `python tune/sweep.py --space tune/spaces/default.yaml --trials 16 --config configs/x.yaml`.

Every trial is the same training as `mmref train`; ASHA stops the ones that fall behind on val. `--resume DIR` goes on with
an interrupted sweep. The run directory gets best.yaml (what `mmref train --config` takes), trials.parquet, sweep.html, the
log trials.jsonl, space.yaml, config.yaml, sweep.json and a folder for each trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from pathlib import Path

from mmref.config import Config, dump_yaml, to_dict, with_absolute_paths
from mmref.config.inputs import settled
from mmref.data.shard_set import ShardSet, data_fingerprint
from mmref.errors import ConfigError, RunDirectoryError, ShardSetError, SweepError, SweepInterruptedError
from mmref.run.directory import DATA, RunDir, read_jsonl
from mmref.train.ray_storage import ray_filesystem
from mmref.train.trainer import check_inputs, check_same_data
from mmref.tuning.asha import Asha, grace_steps, judged_at, share_of_steps
from mmref.tuning.capacity import TRIAL_CPUS, connected, largest_node, sharing
from mmref.tuning.display import Display
from mmref.tuning.options import Options, check_options, number
from mmref.tuning.recorder import Recorder
from mmref.tuning.results import best_yaml, format_trials
from mmref.tuning.search import Numbered, Propose, proposer
from mmref.tuning.space import Space, parse_space, with_values
from mmref.tuning.sweep_report import render_sweep
from mmref.tuning.trial_log import LOG, Trial, TrialLog, best_of
from mmref.tuning.trial_run import run_trial

TRIAL_RESTARTS = 3  # of a trial whose process was lost; its workers have `train.max_failures` of their own


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
        base, prepared, space = with_absolute_paths(base), with_absolute_paths(prepared), space.with_absolute_paths()
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
    options = _options_of(run)
    changed = {k: number(v) for k, v in changes.items() if v is not None}
    options = dataclasses.replace(options, **changed)  # type: ignore[arg-type]
    if (begun := len({line["trial"] for line in read_jsonl(run, LOG)})) > options.trials:
        raise ConfigError(f"`--trials {options.trials}` is fewer than the {begun} that {run.path} has begun already.")
    space = parse_space(run.read_text("space.yaml"), run.join("space.yaml"))
    if not submitted():
        space = space.with_absolute_paths()  # earlier versions wrote it as it was given
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


def _options_of(run: RunDir) -> Options:
    """What a sweep was begun with. Raises RunDirectoryError where this version has other options."""
    try:
        return Options(**run.read_fields("sweep.json"))
    except TypeError as error:
        raise RunDirectoryError(
            f"{run.join('sweep.json')} is damaged, or of a version with other options ({error}): go on with the version of mmref "
            "that began the sweep, or start one in another `--run_dir`."
        ) from None


def prepare(base: Config, space: Space, options: Options, run: RunDir) -> Config:
    """The config that best.yaml starts from, everything checked that needs no Ray. Its `auto` is for each trial to settle."""
    trial = of_a_trial(base, options)
    steps, every = trial.train.max_steps, trial.train.steps_between_evaluations
    grace = grace_steps(options.grace_steps, trial)
    if options.scheduler == "asha" and every > grace:
        raise ConfigError(
            f"ASHA is to judge trials of {steps} steps from step {grace} on, and they are evaluated every {every} steps: set "
            f"`--train.eval_every` to at most {grace}, or `--grace-steps` higher."
        )
    base = with_values(space.prepare(base), {"run_dir": run.path})
    check_inputs(settled(base))
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
