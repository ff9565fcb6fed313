"""Ablate: `python tune/ablate.py --rows tune/rows/default.yaml --config configs/emoji.yaml --seeds 0 1 2`.

Every row is trained with every seed, each the whole job of `mmref train`, as tasks that share the cluster. Finished ones
are not repeated and interrupted ones resume, so the same command goes on. The run directory gets ablation.json, .md,
.csv and .png and a folder for each training. ablation.json holds what came of each training: `--results` takes such files
in place of the folders.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from mmref.cluster.connection import SETTINGS
from mmref.config import Config, config_hash, dump_yaml, from_dict, to_dict, with_absolute_paths
from mmref.config.inputs import settled
from mmref.data.shard_set import ShardSet, data_fingerprint
from mmref.errors import ConfigError, RunDirectoryError, ShardSetError, SweepError
from mmref.evaluate.features import read_queries
from mmref.run.directory import DATA, RunDir
from mmref.run.models import is_of, source_of, start_of_training
from mmref.train.trainer import check_inputs, check_same_data
from mmref.tuning.ablation_table import markdown, plot, summarise, table_csv
from mmref.tuning.capacity import TRIAL_CPUS, connected, largest_node, sharing
from mmref.tuning.failure import reason
from mmref.tuning.reuse import Recorded, choices, chosen_otherwise, evaluated_for_less, record
from mmref.tuning.rows import Rows, Training, seed_of, trainings
from mmref.tuning.trial_log import median_step_seconds


def ablate(
    base: Config,
    rows: Rows,
    seeds: list[int],
    split: str = "test",
    kind: str = "",
    max_concurrent: int | None = None,
    only: list[str] | None = None,
    files: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Train and evaluate what is not there yet, write the tables whenever a training ends, and return the rows as
    `ablation.summarise` does.

    Args:
        seeds: to train the rows with; of other seeds the tables have what is there.
        only: rows to train, with those they read and the baseline; of the others the tables have what is there. None: all.
        files: ablation.json of other ablations, whose trainings of the same config and seed count as done.
    Raises:
        ConfigError, ShardSetError, RunDirectoryError: whatever can be known before Ray starts.
        SweepError: a training failed; those that did not are in the tables.
    """
    run = RunDir(base.run_dir)
    base = with_absolute_paths(base)
    check_inputs(settled(base))
    _check_asked(base, rows, seeds, split)
    recorded = Recorded(files, split)
    others = {seed for name in run.list("") if (seed := seed_of(name)) is not None} | recorded.seeds
    known = [*seeds, *sorted(others - set(seeds))]
    configs = {
        # Settled by each row's own model, as `mmref train` would.
        t: settled(with_absolute_paths(rows.config(base, t.row, t.point, t.seed, run.join(t.folder))))
        for t in trainings(rows, known)
    }
    if kind:
        check_kind(kind, {config.data.root for config in configs.values()}, split)
    wanted = rows.only(only, "--only") if only else rows
    planned = {t: configs[t] for t in trainings(wanted, seeds)}
    data = fingerprints(configs)
    refined_too = {row.training for row in rows.rows if row.refined}
    starts = {row.name for row in rows.rows if not row.steps}  # config_hash cannot tell them from trainings
    failures: dict[Training, str] = {}
    with run.held():
        for config in configs.values():
            check_judged_alike(config)
        found = {
            t: read_result(config, split, data[t])
            or (None if t.row in starts else recorded.get(config, data[t], t.row in refined_too))
            for t, config in configs.items()
        }
        results = {t: metrics for t, metrics in found.items() if metrics}
        for t in [t for t, metrics in results.items() if kind and kind not in metrics["by_caption_kind"]]:
            print(f"note: {t}: no captions of the kind `{kind}` on record, so its row has no column of them", flush=True)
        missing = [t for t in planned if t not in results]
        print(
            f"{len(planned)} trainings to {run.path}, {len(planned) - len(missing)} of them are there already",
            flush=True,
        )

        def tabulate() -> list[dict[str, Any]]:
            table = summarise(rows, results, known, kind)
            if table:
                done = [record(t, configs[t], metrics, data[t]) for t, metrics in results.items() if t.row not in starts]
                shown = sorted({*seeds, *(t.seed for t in results)})
                about = {"split": split, "seeds": shown, "steps": base.train.max_steps}
                write_tables(run, table, rows, {**about, "trainings": done})
            return table

        table = tabulate()
        for training, failure in _train(base, {t: planned[t] for t in missing}, split, max_concurrent, starts):
            if failure:
                failures[training] = failure
            elif metrics := read_result(configs[training], split, data[training]):
                results[training] = metrics
                table = tabulate()
    if failures:
        first = next(iter(failures))
        raise SweepError(
            f"{len(failures)} of {len(planned)} trainings failed; the first, {first}: {failures[first]} What there is so far is "
            f"in {run.join('ablation.md')}. The failed ones are tried again when it goes on."
        )
    return table


def _check_asked(base: Config, rows: Rows, seeds: list[int], split: str) -> None:
    """Raise ShardSetError where the base's set lacks a split that the rows need, ConfigError for a seed that is named twice."""
    if split not in (splits := ShardSet.open(base.data.root).splits):
        raise ShardSetError(f"{base.data.root} has no split `{split}`, only {splits}.")
    if "val" not in splits and (refined := [row.name for row in rows.rows if row.refined]):
        raise ShardSetError(
            f"{base.data.root} has no val split to choose the refinement of `{refined[0]}` on, only {splits}: build the set with "
            "`--val-fraction`, or leave refined rows out."
        )
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"`--seeds` names a seed twice: {seeds}.")


def check_kind(kind: str, roots: Collection[str], split: str) -> None:
    """Raise ConfigError where no caption of the split is of this kind in any of the shard sets."""
    kinds = {found for root in roots for found in read_queries(ShardSet.open(root).index(split)).kinds.tolist()} - {""}
    if kind not in kinds:
        there = f"only {', '.join(sorted(kinds))}" if kinds else "nor of any other: leave it out"
        raise ConfigError(f"`--kind {kind}`: no caption of {split} in {', '.join(sorted(roots))} is of that kind, {there}.")


def result_name(split: str) -> str:
    """File of a training's metrics in its run directory."""
    return f"result-{split}.json"


def fingerprints(configs: dict[Training, Config]) -> dict[Training, str]:
    """Of the shards of each training, which a row may set; every set is opened once."""
    found: dict[tuple[str, ...], str] = {}
    for config in configs.values():
        if (sets := _data_of(config)) not in found:
            found[sets] = data_fingerprint(config)
    return {t: found[_data_of(config)] for t, config in configs.items()}


def _data_of(config: Config) -> tuple[str, ...]:
    """What `data_fingerprint` looks at."""
    return config.data.root, *config.data.mix, config.data.neighbors


def check_judged_alike(config: Config) -> None:
    """Raise RunDirectoryError where the config's run directory holds a training whose checkpoint or refinement was chosen in
    another way: its results are not comparable."""
    run = RunDir(config.run_dir)
    if not run.exists("config.yaml"):
        return
    if otherwise := chosen_otherwise(choices(run.read_config()), config):
        raise RunDirectoryError(f"{run.path} {otherwise}. Give the same, another `--run_dir`, or remove that folder.")


def started_from(config: Config) -> dict[str, Any]:
    """What a result keeps of the model that its training starts from: nothing where the weights are random or of a hub, which
    the config names well enough."""
    given = start_of_training(config)
    return {"started_from": source_of(given)} if os.path.isdir(given) else {}


def read_result(config: Config, split: str, data: str) -> dict[str, Any] | None:
    """Metrics of a finished training, None where it is not finished. Raises RunDirectoryError for one of another config, of
    shards with other contents than `data`, as of `data_fingerprint`, of a start whose files were others, or evaluated for less
    than is asked for."""
    run = RunDir(config.run_dir)
    if not run.exists(result_name(split)):
        return None
    metrics = run.read_fields(result_name(split))
    if metrics.get("config_hash") != config_hash(config):
        raise RunDirectoryError(
            f"{run.path} holds a training of another config. Give another `--run_dir`, or remove that folder."
        )
    check_same_data(run, config, data)
    given, kept = start_of_training(config), metrics.get("started_from")
    if kept and os.path.isdir(given) and not is_of(kept, given):
        raise RunDirectoryError(
            f"{run.path} was trained from {given} as it was before its files changed. Give another `--run_dir`, or remove that "
            "folder."
        )
    if lacking := evaluated_for_less(metrics, config):
        raise RunDirectoryError(
            f"{run.path} {lacking}. Remove {result_name(split)} there to have it evaluated again, or leave that out."
        )
    metrics["step_seconds"] = median_step_seconds(run)
    metrics.setdefault("machine", None)
    return metrics


def train_and_evaluate(values: dict[str, Any], split: str, trains: bool = True) -> dict[str, float]:
    """One training and its evaluation, or that of the weights it would start from, in a task that Ray placed; leaves
    result-<split>.json in the run directory. Returns its refined metrics."""
    from mmref.cluster.connection import named_address
    from mmref.cluster.resources import machine, with_gpus
    from mmref.evaluate.evaluation import evaluate_run, evaluate_start
    from mmref.train.trainer import train

    for name, value in SETTINGS.items():  # of the nested training, for which this process is the driver
        os.environ.setdefault(name, value)
    config = from_dict(values)
    start = started_from(config)
    with named_address():
        if trains:
            train(config, final_evaluation=False)
            metrics: dict[str, Any] = evaluate_run(config.run_dir, split=split)
        else:
            run = RunDir(config.run_dir)
            run.write_text("config.yaml", dump_yaml(config))
            run.write_text(DATA, data_fingerprint(config))
            metrics = {**evaluate_start(config, run, split), "config_hash": config_hash(config)}
        result = {**metrics, **start, "machine": machine(with_gpus(config))}
        RunDir(config.run_dir).write_text(result_name(split), json.dumps(result, indent=1))
    return dict(metrics["refined"])


def _train(
    base: Config, planned: dict[Training, Config], split: str, wanted: int | None, starts: Collection[str] = ()
) -> Iterator[tuple[Training, str]]:
    """Run the trainings, as many at a time as fit; each as it ends, with the reason where it ended badly."""
    if not planned:
        return
    with connected(base, wanted, len(planned)) as fit_in:
        import ray

        at_once, node_cpus = min(len(planned), fit_in), largest_node()
        task = ray.remote(num_cpus=TRIAL_CPUS, max_retries=0)(train_and_evaluate)
        waiting = list(planned.items())[::-1]
        running: dict[Any, tuple[Training, float]] = {}
        while waiting or running:
            while waiting and len(running) < at_once:
                training, config = waiting.pop()
                values = to_dict(sharing(config, at_once, node_cpus))
                running[task.remote(values, split, training.row not in starts)] = (training, time.monotonic())
            for done in ray.wait(list(running), num_returns=1)[0]:
                training, began = running.pop(done)
                failure = ""
                try:
                    refined = ray.get(done)
                    text = ", ".join(f"{m} {refined[m]:.1f}" for m in ("R@1", "mAP"))
                except ray.exceptions.RayError as error:
                    text = failure = reason(error)
                left = len(waiting) + len(running)
                print(f"[{left} left] {training}: {text} ({time.monotonic() - began:.0f} s)", flush=True)
                yield training, failure


def write_tables(run: RunDir, table: list[dict[str, Any]], rows: Rows, about: dict[str, Any]) -> None:
    """ablation.json, .md, .csv and .png."""
    run.write_text("ablation.json", json.dumps({**about, "baseline": rows.baseline, "over": rows.over, "rows": table}, indent=1))
    run.write_text("ablation.md", markdown(table, rows.baseline) + "\n")
    run.write_text("ablation.csv", table_csv(table))
    run.write_bytes("ablation.png", plot(table, rows.baseline, rows.over))
