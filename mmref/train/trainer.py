"""The driver of a run: checks, Ray Train, the progress bar, and what is made of the checkpoints afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from mmref.cluster.connection import SETTINGS, connect
from mmref.cluster.reservations import take_place
from mmref.cluster.resources import check_resources, needed_cpus, with_gpus
from mmref.config import AUTO, Config, config_hash, dump_yaml, to_dict, with_absolute_paths
from mmref.config.checks import check_taught
from mmref.config.inputs import differing, settled
from mmref.config.packages import trust_own
from mmref.data.epochs import in_steps
from mmref.data.plan import build_plan
from mmref.data.shard_set import ShardSet, data_fingerprint, train_index
from mmref.data.tokens import load_tokens
from mmref.errors import RunDirectoryError, ShardSetError
from mmref.evaluate.choose import GRID, config_grid
from mmref.evaluate.few_objects import few_objects
from mmref.evaluate.refinement import check_dense
from mmref.evaluate.report import Metrics
from mmref.model.backbone import check_towers
from mmref.run import checkpoints
from mmref.run.directory import DATA, RunDir
from mmref.run.models import SOURCE, START, as_run, find_model, has_references, is_of, start_of_training
from mmref.run.progress import Progress
from mmref.train import checkpoint_files
from mmref.train.division import Division
from mmref.train.loop import train_worker
from mmref.train.ray_storage import ray_filesystem
from mmref.train.sinks import check_sinks
from mmref.train.stop import DRAIN, GROW, Termination, withdraw_request

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
# Workers may wait for a place on a node that has just gone, so they are counted again soon.
ELASTIC_START_TIMEOUT_S = "10"
START_ATTEMPTS = 3
RESIZE_CHECK_S = 30.0  # how often a group with fewer workers than asked for looks for places
OF_OTHERS = (
    "manifest.json",
    "model.safetensors",
)  # what a shard set or an index, or an export, holds, and a run does not
LEFT = {
    DRAIN: "a node is being taken away: the workers checkpointed and left it",
    GROW: "there are places for more workers: they checkpointed to start again with more",
}


def train(config: Config, final_evaluation: bool = True) -> Metrics | None:
    """Train (or resume) a run, then evaluate its best checkpoint and write metrics.json and report.html.

    A set without test is reported on val, one with neither is not evaluated.

    Returns the final metrics, None without an evaluation. Raises the errors of mmref.errors.
    """
    from mmref.evaluate.evaluation import evaluate_run, reported_split

    run = RunDir(config.run_dir)
    config = settled(in_steps(with_absolute_paths(config)))
    for line in differing(config):
        print(f"not as the pretrained model has it: {line}", flush=True)
    check_inputs(config)
    split = reported_split(ShardSet.open(config.data.root)) if final_evaluation else None
    if final_evaluation and split != "test":
        what = ": val, which chooses checkpoint and refinement, is reported too" if split else " and no val: nothing is evaluated"
        print(f"{config.data.root} has no test split{what}", flush=True)
    with run.held():
        prepare_run(config, run)
        with connect(needed_cpus(config), config.train.storage_gb), Termination(run) as termination:
            check_resources(config)
            if split:
                evaluate_before(config, run, split)
            fit(config, run, termination=termination)
            return evaluate_run(config.run_dir, split=split) if split else None


def evaluate_before(config: Config, run: RunDir, split: str) -> None:
    """Keep what the weights that a fine-tuning starts from achieve, for the report; once a run, before its first step."""
    from mmref.evaluate.evaluation import START_METRICS, evaluate_start

    given = start_of_training(config)
    if not given or run.exists(START_METRICS) or checkpoints.has_checkpoints(run):
        return
    print(f"evaluating {given} on {split} before training", flush=True)
    metrics = evaluate_start(config, run, split)
    run.write_text(START_METRICS, json.dumps(metrics, indent=1))
    scores = metrics["refined"]
    print(f"before training: {', '.join(f'{name} {scores[name]:.1f}' for name in ('R@1', 'R@10', 'mAP'))}", flush=True)


def check_inputs(config: Config) -> None:
    """Everything that can be known before Ray starts: data, objects, tokenizer. Raises the named error, and says where objects
    are few for references."""
    trust_own(config.model)
    index = train_index(config)
    for root in (config.data.root, *config.data.mix):
        if "://" in root:
            continue  # every byte would travel; sizes were compared above
        if problems := ShardSet.open(root).verify(checksums=False):
            raise ShardSetError(f"{root} does not match its manifest: {problems[0]} ({len(problems)} problems in all). "
                                f"`mmref shards verify {root}` lists them.")  # fmt: skip
    build_plan(config, index)
    Division.of(config, index)
    config_grid(config)
    check_codes(config, index.n_objects)
    check_sinks(config)
    start = config.train.start_from
    if start and not checkpoints.has_checkpoints(RunDir(config.run_dir)) and not has_references(find_model(start)):
        check_taught(config)
    tokens = load_tokens(config)
    size = config.data.image_height, config.data.image_width
    check_towers(config.model, tokens.tokenizer.eos_token_id, size)
    if config.loss.uses_references and (said := few_objects(index.n_objects)):
        print(f"note: {said}", flush=True)


def check_codes(config: Config, objects: int) -> None:
    """Raise DenseCodesError for codes that an evaluation, in training or behind it, could not hold."""
    if not config.loss.uses_references or "dense" not in config.eval.refine_kinds or config.reference.per_object == 1:
        return
    shards = ShardSet.open(config.data.root)
    for split in {"val", "test"} & set(shards.splits):
        check_dense(len(shards.index(split)), objects)


def prepare_run(config: Config, run: RunDir) -> None:
    """Write the resolved config, and the model of `train.start_from` that is no run.

    Raises RunDirectoryError for another config's run, or what another command wrote.
    """
    if found := next((name for name in OF_OTHERS if run.exists(name)), None):
        raise RunDirectoryError(
            f"{run.path} is no run's: it holds {found}, as a shard set, an index or an export does, whose files would be "
            "overwritten. Give another `--run_dir`."
        )
    data = data_fingerprint(config)
    if run.exists("config.yaml"):
        before = run.read_config()
        if checkpoints.has_checkpoints(run):
            if config_hash(before) != config_hash(config):
                raise RunDirectoryError(
                    f"{run.path} holds checkpoints of another config: {_differences(before, config)}. Resume with the same "
                    "config, or give another `--run_dir`."
                )
            check_same_data(run, config, data)
            _check_same_scores(before, config, run)
    run.write_text("config.yaml", dump_yaml(config))
    run.write_text(DATA, data)
    checkpoint_files.remove_uncommitted(run)
    checkpoint_files.repair_snapshot(run)
    drop_other_start(config, run)
    first_weights(config, run)


def drop_other_start(config: Config, run: RunDir) -> None:
    """Remove what an attempt that ended before its first checkpoint has left of another start than the config's, or of the same
    one before its files changed: its weights, and what they achieve. Raises as `find_model`."""
    from mmref.evaluate.evaluation import START_METRICS

    if checkpoints.has_checkpoints(run):
        return
    given = start_of_training(config)
    for left, said in ((START, f"{START}/{SOURCE}"), (START_METRICS, START_METRICS)):
        if run.exists(said) and not (given and is_of(run.read_fields(said), given)):
            run.remove(left)


def first_weights(config: Config, run: RunDir) -> None:
    """Put the export or pretrained model of `train.start_from` into the run directory, which every worker reads: nothing for a
    run, nor where training has begun."""
    given = config.train.start_from
    if given and not checkpoints.has_checkpoints(run) and find_model(given).kind != "run":
        as_run(given, config.data.root, run.join(START))


def check_same_data(run: RunDir, config: Config, now: str) -> None:
    """Raise RunDirectoryError where a run was trained on shards with other contents than `now`, as of `data_fingerprint`."""
    if not run.exists(DATA):  # of an older version
        return
    if (before := run.read_text(DATA)) != now:
        raise RunDirectoryError(
            f"{run.path} was trained on shards with the fingerprint {before}, {config.data.root} has {now}: the set, or its file "
            "of neighbors, was built anew. Give another `--run_dir` (`--train.start_from` takes the weights along), or what was "
            "there before."
        )


def _check_same_scores(before: Config, config: Config, run: RunDir) -> None:
    """Raise RunDirectoryError where the checkpoints of an unfinished run were scored in another way than the next would be."""
    if _latest_step(run) >= config.train.max_steps:
        return
    for name in ("metric", "refine_in_training", *(GRID if config.eval.refine_in_training else ())):
        was, now = getattr(before.eval, name), getattr(config.eval, name)
        if was != now:
            raise RunDirectoryError(
                f"{run.path} holds checkpoints scored with `eval.{name}` {was}, and is to go on with {now}: the best could not "
                "be told. Go on with the same, and evaluate with another afterwards, or give another `--run_dir`."
            )


def _differences(before: Config, now: Config) -> str:
    """The fields that differ, as `train.lr 0.001 -> 0.01`."""
    found = []
    a, b = to_dict(before), to_dict(now)
    for section in a:
        if isinstance(a[section], dict) and section != "eval":
            found += [f"{section}.{k} {a[section][k]} -> {b[section][k]}" for k in a[section] if a[section][k] != b[section][k]]
    return "; ".join(found[:5])


def fit(config: Config, run: RunDir, callbacks: Sequence[Any] = (), termination: Termination | None = None) -> None:
    """Run Ray Train to the end, showing progress. Raises the worker's own error where it is one of ours.

    Workers that left at a checkpoint, before a node is taken away or for more workers to join, are started again from
    there. Raises TrainingStoppedError when `termination` has received a signal. `callbacks` are Ray Train's: a sweep
    hears of every evaluation through one.
    """
    import ray.train

    from mmref.train.ray_trainer import named_error

    step = _latest_step(run)
    if step >= config.train.max_steps:
        return  # a finished run: only its evaluation is left
    if config.train.gpu == AUTO:
        config = with_gpus(config)
        print(f"training on {'GPUs' if config.train.on_gpu else 'CPUs'}", flush=True)
    t = config.train
    termination = termination or Termination(run)
    with Progress(run, t.max_steps, start=step) as progress:
        while step < t.max_steps:
            withdraw_request(run)
            if termination.received:
                raise termination.error(step)
            trainer = _trainer(config, run, callbacks)
            take_place(run.path, "workers", f"train-{trainer.train_run_context.run_id}")
            termination.training = True
            try:
                reason = trainer.fit().return_value
            except ray.train.TrainingFailedError as error:
                raise named_error(error) from error
            termination.training = False
            step = _latest_step(run)
            if reason in LEFT:
                progress.say(LEFT[reason])
    if termination.received:  # in the last step, or while the last checkpoint was written
        raise termination.error(step)
    checkpoint_files.remove_uncommitted(run)
    run.remove(START)


def _latest_step(run: RunDir) -> int:
    latest = checkpoints.latest_checkpoint(run)
    return latest.step if latest else 0


def _trainer(config: Config, run: RunDir, callbacks: Sequence[Any]) -> Any:
    import ray.train
    from ray.train.torch import TorchConfig

    from mmref.train.ray_trainer import Trainer

    t = config.train
    elastic = 0 < t.min_workers < t.workers
    workers: Any = (t.min_workers, t.workers) if elastic else t.workers
    if elastic and os.environ.get(START_TIMEOUT) == SETTINGS[START_TIMEOUT]:
        os.environ[START_TIMEOUT] = ELASTIC_START_TIMEOUT_S
    return Trainer(
        config,
        train_worker,
        train_loop_config=to_dict(config),
        torch_config=TorchConfig(backend="nccl" if t.on_gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers,
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,  # type: ignore[call-arg]
            use_gpu=t.on_gpu,
            resources_per_worker={"CPU": t.cpus_per_worker, **({"GPU": 1} if t.on_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name=checkpoints.FOLDER,
            storage_path=run.root,
            storage_filesystem=ray_filesystem(run),
            callbacks=list(callbacks),
            failure_config=ray.train.FailureConfig(
                max_failures=t.max_failures,
                controller_failure_limit=START_ATTEMPTS * (5 if elastic else 1),  # type: ignore[call-arg]
            ),
            checkpoint_config=ray.train.CheckpointConfig(
                num_to_keep=t.keep_checkpoints, checkpoint_score_attribute="score", checkpoint_score_order="max"
            ),
        ),
    )
