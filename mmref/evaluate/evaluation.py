"""From a checkpoint to metrics.json and report.html: the protocol of person retrieval, refinement chosen on val."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from mmref.cluster.resources import workers_that_fit
from mmref.config import Config, config_hash, to_dict
from mmref.config.packages import check_imports
from mmref.data.decode import decode_rgb, webp
from mmref.data.sample_reader import RawSample, SampleReader, sound
from mmref.data.shard_set import ShardSet
from mmref.errors import RunDirectoryError, SampleError, ShardSetError, StorageError
from mmref.evaluate import judged as judgements
from mmref.evaluate.ambiguity import ambiguity
from mmref.evaluate.bootstrap import bootstrap_ci, paired_difference
from mmref.evaluate.choose import choose_on_val, settings_of, trained_space
from mmref.evaluate.class_protocol import class_metrics, class_queries
from mmref.evaluate.close_match import choose_close_match
from mmref.evaluate.examples import choose_further, choose_opening, count_moves
from mmref.evaluate.metrics import METRIC_NAMES, PerQuery, ScoreFn, evaluate_features, summarize, summarize_objects
from mmref.evaluate.protocols import CAPTIONS_AS_ONE, IMAGE_TO_IMAGE, Chosen, protocols
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings, refined_scores
from mmref.evaluate.report import (
    JUDGED,
    Metrics,
    format_table,
    metrics_path,
    render_report,
    report_path,
    section_path,
    with_section,
)
from mmref.evaluate.split_features import SplitFeatures, embed_splits
from mmref.run.checkpoints import CheckpointInfo, best_checkpoint, fetched
from mmref.run.directory import BAD_SAMPLES, RunDir, read_jsonl
from mmref.run.models import START, as_run, config_on, source_of, start_of_training
from mmref.run.row_file import StoredReferences
from mmref.storage.locations import is_url
from mmref.storage.whole_folder import check_output, write_output
from mmref.terminal.output import printable
from mmref.terminal.progress import say

TILE_PX, TILE_QUALITY, TILE_BYTES = 320, 85, 30_000  # of an image in a report; smaller files are shown as they are
CAPTIONS = "captions"  # single ones: the queries of the protocol that every evaluation has
START_METRICS = "start.json"  # of a run: what `evaluate_start` found before the training
SHOWN = 10  # results of an example in the report
SHOWN_FIRST = 5  # results of those at its top, two rows of which stand side by side


def open_run(run_dir: str, data: str | None = None) -> tuple[RunDir, Config, CheckpointInfo]:
    """A run, its config and its best checkpoint.

    Args:
        data: the shard set that is asked for: where it is the run's own in another place, the config has it there.

    Raises:
        RunDirectoryError, CheckpointError: there is none. ModelError: its config imports what nobody here vouches for.
    """
    run = RunDir(run_dir)
    config = config_on(run, data)
    check_imports(config.model)
    return run, config, best_checkpoint(run)


def reported_split(shards: ShardSet) -> str | None:
    """The split that a run reports at its end: test, val where there is no test, None where there is neither."""
    return next((split for split in ("test", "val") if split in shards.splits), None)


def is_own(config: Config, root: str) -> bool:
    """Whether a shard set is the one that a run was trained on."""
    return _place(root) == _place(config.data.root)


def _place(root: str) -> str:
    """A set that was moved may be reached by a link that was left."""
    path = RunDir(root).path
    return path if is_url(path) else os.path.realpath(path)


def view_of(config: Config, shards: ShardSet, split: str) -> str:
    """Name of what a run's files of an evaluation are of, "" for the reported split of the run's own set: of another set its
    name, of another split the split."""
    other = [] if is_own(config, shards.root) else [f"set-{shards.name}" if shards.name in shards.splits else shards.name]
    return "-".join([*other, *([] if split == reported_split(shards) else [split])])


def chosen_before(run: RunDir, checkpoint: CheckpointInfo, view: str = "") -> dict[str, Chosen]:
    """The refinements that an evaluation chose for this checkpoint, by block of metrics.json; that of captions is `CAPTIONS`.

    {} where there was no such evaluation.

    Args:
        view: of what, as of `view_of`; by default of the run's own set.
    """
    name = metrics_path(view)
    metrics = run.read_fields(name)
    if metrics.get("checkpoint") != checkpoint.folder:
        return {}
    blocks = {CAPTIONS: metrics, **{name: metrics.get(name) for name in (IMAGE_TO_IMAGE, CAPTIONS_AS_ONE)}}
    return {
        name: Chosen(settings_of(block), block["refinement"]["chosen_on"])
        for name, block in blocks.items()
        if isinstance(block, dict) and "refinement" in block
    }


def run_features(
    run: RunDir, config: Config, checkpoint: CheckpointInfo, root: str, splits: list[str]
) -> tuple[dict[str, SplitFeatures], ReferenceSpace | None]:
    """Features of splits of the shard set `root` by name, and the references of the checkpoint; None where it has none."""
    with fetched(run, checkpoint, "references") as folder:  # a training that goes on may replace the checkpoint meanwhile
        space = trained_space(config, StoredReferences(folder, checkpoint.meta))
    return embed_splits(config, run, checkpoint, root, splits), space


def chosen_evaluation(
    config: Config,
    features: Mapping[str, SplitFeatures],
    space: ReferenceSpace | None,
    split: str,
    otherwise: Mapping[str, Chosen] | None = None,
) -> Evaluation:
    """The evaluation of a split with the refinements that do best on val, each for its own kind of queries.

    Args:
        otherwise: those where `features` has no val, as of `chosen_before`; by default none.
    """
    chosen = dict(otherwise or {})
    if val := features.get("val"):
        say("choosing the refinement on val ...")
        best, tried = choose_on_val(config, space, val.text, val.queries, val.image, val.image_objects)
        chosen = {CAPTIONS: Chosen(best, "val", tried)}
        chosen |= {name: protocol.choose(config, space, "val") for name, protocol in protocols(config, val).items()}
    say(f"scoring {split} ...")
    return Evaluation(config, features[split], space, chosen, val)


def start_metrics(run: RunDir, split: str) -> dict[str, Any] | None:
    """What a run's training started from achieves on a split, for the run's own metrics; None where nobody evaluated that."""
    found = run.read_fields(START_METRICS)
    if found.get("split") != split:
        return None
    return {name: found[name] for name in ("model", "initial", "refined", "ci95_initial", "ci95")}


def evaluate_start(config: Config, run: RunDir, split: str) -> dict[str, Any]:
    """Metrics of the weights that a run's training starts from, prepared as their own model wants images and captions.

    Their references, where there are any, refine by settings chosen on val. The run directory is left as it is.
    """
    given = start_of_training(config)
    kept = run.exists(START)  # the training's own, which it still needs
    try:
        start, own, checkpoint = open_run(as_run(given, config.data.root, run.join(START)))
        own.eval = config.eval
        splits = sorted({split, "val"} & set(ShardSet.open(config.data.root).splits))
        features, space = run_features(start, own, checkpoint, config.data.root, splits)
    finally:
        if not kept:
            run.remove(START)
    return {**source_of(given), "model": given, "split": split, **chosen_evaluation(own, features, space, split).metrics()}


def evaluate_run(
    run_dir: str, data: str | None = None, split: str = "test", out: str | None = None, workers: int | None = None,
    report: bool = True, changes: Mapping[str, Any] | None = None,
) -> Metrics:  # fmt: skip
    """Evaluate the best checkpoint of a run on a split; refinement is chosen on the set's val split.

    A set without val has the refinement that was chosen on the val split of the run's own set, or none: never one that was
    chosen on the split reported.

    Args:
        run_dir: run directory of `mmref train`.
        data: shard set, by default the one it was trained on. The references stay those of training: they refine the
            results on another set as well, with weights chosen on that set's val.
        split: the split reported.
        out: where metrics are written besides the run directory, which gets metrics.json of its own set, metrics-SET.json
            of another set; of a split that is not the one reported at the end, metrics-SPLIT.json.
        workers: Ray actors, 0 for this process; by default `eval.workers`, this process where Ray is not installed.
        report: write report.html, named alike, into the run directory.
        changes: fields of `eval` that are not as in the run's config: {"image_to_image": True}.

    Returns:
        The metrics, as in metrics.json.
    """
    run, config, checkpoint = open_run(run_dir, data)
    config.eval = replace(config.eval, **(changes or {}))
    if out:
        _check_copy(out)
    kept = _can_keep(run, out)
    root = data or config.data.root
    shards = ShardSet.open(root)
    if split not in shards.splits:
        raise ShardSetError(f"{root} has no split `{split}`, only {shards.splits}.")
    if workers is not None:
        config.eval.workers = workers_that_fit(workers)
    began = time.perf_counter()
    own = is_own(config, root)
    features, space = run_features(run, config, checkpoint, root, sorted({split, "val"} & set(shards.splits)))
    embedded = time.perf_counter() - began
    before = {} if own or space is None else chosen_before(run, checkpoint)
    if any(chosen.chosen_on for chosen in before.values()):
        name = ShardSet.open(config.data.root).name
        before = {k: replace(c, chosen_on=f"{c.chosen_on} of {name}" if c.chosen_on else "") for k, c in before.items()}
    evaluation = chosen_evaluation(config, features, space, split, before)
    metrics = Metrics(
        {
            "data": shards.name,
            "split": split,
            **evaluation.metrics(),
            "wall_seconds": time.perf_counter() - began,
            "images_per_second": sum(len(f.image) for f in features.values()) / embedded,
            "config_hash": config_hash(config),
            "checkpoint": checkpoint.folder,
            "checkpoint_step": checkpoint.step,
        }
    )
    bad_training = run.read_json(BAD_SAMPLES) if run.exists(BAD_SAMPLES) else []
    metrics["bad_training_samples"] = bad_training
    if own and split == "test" and (best := best_on_test(read_jsonl(run))):
        metrics["best_on_test"] = best
    if own and (start := start_metrics(run, split)):
        metrics["start"] = start
    text = json.dumps(metrics, indent=1)
    view = view_of(config, shards, split)
    if out:
        _write_copy(out, text)
    if kept:
        run.write_text(metrics_path(view), text)
        if own and not run.exists("metrics.json"):  # of a run that reported nothing so far, for `mmref export`
            run.write_text("metrics.json", text)
    else:
        say(f"{run.path} cannot be written: the metrics are in {out} alone, and there is no report")
    if report and kept:
        opening, further = evaluation.examples(config.eval.examples)
        page = render_report(
            metrics=metrics,
            history=read_jsonl(run),
            opening=opening,
            examples=further,
            title=f"{shards.name} · {run.path.rsplit('/', 1)[-1]}",
            config=to_dict(config),
        )
        if run.exists(section := section_path(checkpoint.folder, view)):
            page = with_section(page, run.read_text(section))
        judged = run.read_fields(judgements.FILE) if own else {}
        if judged.get("checkpoint") == checkpoint.folder:
            page = with_section(page, judgements.section(judged), JUDGED)
        run.write_text(report_path(view), page)
    print(printable(format_table(metrics), lines=True))
    return metrics


def evaluate_model(
    model: str, data: str | None = None, split: str = "test", out: str | None = None, workers: int | None = None,
    report: bool = True, run_dir: str | None = None, changes: Mapping[str, Any] | None = None,
) -> Metrics:  # fmt: skip
    """As `evaluate_run`, of a run, an export or a pretrained model, of which a run without a step is made as by `as_run`."""
    return evaluate_run(as_run(model, data, run_dir), data, split, out, workers, report, changes)


def changed_options(image_to_image: bool, same_camera: str | None, captions_as_one: str | None) -> dict[str, Any]:
    """Fields of `eval` that a caller asks for besides the run's config: `changes` of `evaluate_run`."""
    given = {"image_to_image": image_to_image, "same_camera": same_camera, "captions_as_one": captions_as_one}
    return {name: value for name, value in given.items() if value}


def _can_keep(run: RunDir, out: str | None) -> bool:
    """Whether metrics and report can be written into the run directory. Raises RunDirectoryError where they cannot, and the
    metrics would have no other place."""
    try:
        run.check_writable()
    except RunDirectoryError as error:
        if not out:
            raise RunDirectoryError(f"{error} With `--out FILE` the metrics alone are written, to that file.") from None
        return False
    return True


def _check_copy(out: str) -> None:
    """Raise StorageError where the metrics cannot be written, before they are computed."""
    run, name = _parent(out)
    try:
        run.check_writable()
    except RunDirectoryError as error:
        raise StorageError(f"--out {out} cannot be written: {error.__context__}.") from None
    if run.local:
        check_output("--out", run.join(name))


def _write_copy(out: str, text: str) -> None:
    run, name = _parent(out)
    if run.local:
        write_output("--out", run.join(name), text)
    else:
        run.write_text(name, text)


def _parent(out: str) -> tuple[RunDir, str]:
    """The folder or URL that holds a file, and its name there."""
    folder, _, name = RunDir(out).path.rpartition("/")
    return RunDir(folder or "/"), name


def best_on_test(history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The best evaluation on test during training by R@1, the earlier on a tie: {"step", "R@1", ..., "chosen_on": "test"}.

    What papers report that keep the best epoch on test; None where `eval.test_in_training` was off. Not comparable with a
    checkpoint chosen on val: it is the largest of several draws.
    """
    lines = [line for line in history if "test_R@1" in line]
    if not lines:
        return None
    best = max(lines, key=lambda line: line["test_R@1"])
    scores = {m: best[f"test_{m}"] for m in METRIC_NAMES if f"test_{m}" in best}  # earlier versions knew fewer
    return {"step": best["step"], **scores, "chosen_on": "test"}


class Evaluation:
    """Scores of a split's features with and without refinement."""

    def __init__(
        self,
        config: Config,
        features: SplitFeatures,
        space: ReferenceSpace | None,
        chosen: Mapping[str, Chosen],
        val: SplitFeatures | None = None,
    ) -> None:
        """chosen: the refinements, as of `chosen_before`; none for those that are not there. val: says which cosine is close."""
        self.config, self.features, self.space, self.chosen, self.val = config, features, space, chosen, val
        self.settings = chosen.get(CAPTIONS, Chosen()).settings
        q = features.queries
        # The same words for the same object rank alike: each pair of text and object is scored once.
        pairs, of = np.unique(np.stack([q.text, q.objects], 1), axis=0, return_inverse=True)
        self.pair_of = of.reshape(-1)  # (q,) pair of each caption
        self.pair_features, self.pair_objects = features.text[pairs[:, 0]], pairs[:, 1]
        self.refine_images = self._refiner(self.pair_features, features.image)

    def _refiner(self, queries: np.ndarray, gallery: np.ndarray, settings: RefinementSettings | None = None) -> ScoreFn | None:
        return None if self.space is None else refined_scores(self.space, settings or self.settings, queries, gallery)

    @cached_property
    def initial(self) -> PerQuery:
        """What every caption achieves by its feature alone."""
        return self.text_to_image(None)

    @cached_property
    def refined(self) -> PerQuery:
        """What it achieves after refinement."""
        return self.text_to_image(self.refine_images)

    def text_to_image(self, score_fn: ScoreFn | None) -> PerQuery:
        """Every caption queries every image, and every object by its best one."""
        f = self.features
        given = self.pair_features, f.image, self.pair_objects, f.image_objects
        ranked = evaluate_features(*given, score_fn=score_fn, by_object=True)
        return ranked.take(self.pair_of)

    def image_to_text(self, score_fn: ScoreFn | None) -> PerQuery:
        """Every image queries every caption."""
        f = self.features
        texts = f.text[f.queries.text]
        return evaluate_features(f.image, texts, f.image_objects, f.queries.objects, score_fn=score_fn)

    def metrics(self) -> dict[str, Any]:
        """Metrics of both directions, intervals, per caption kind; keys as in metrics.json."""
        f, q, n = self.features, self.features.queries, self.config.eval.bootstrap
        initial, refined, chosen = self.initial, self.refined, self.chosen.get(CAPTIONS, Chosen())
        texts = f.text[q.text]
        back, back_refined = self.image_to_text(None), self.image_to_text(self._refiner(f.image, texts))
        kinds = {}
        for kind in sorted(set(q.kinds.tolist()) - {""}):
            at = np.flatnonzero(q.kinds == kind)
            if not initial.valid[at].any():
                continue  # none of its images could be read
            kinds[kind] = {
                "n_queries": int(initial.valid[at].sum()),
                "initial": summarize(initial, at),
                "refined": summarize(refined, at),
                "ci95": bootstrap_ci(refined.take(at), q.objects[at], n),
            }
        val = self.val
        close = choose_close_match(val.text, val.queries, val.image, val.image_objects) if val else None
        return {
            "n_queries": len(initial),
            "n_excluded": initial.n_excluded,
            "n_gallery": len(f.image),
            "n_objects": len(np.unique(f.image_objects)),
            "n_references": self.space.n_objects if self.space else 0,
            "initial": summarize(initial),
            "refined": summarize(refined),
            "by_object": {"initial": summarize_objects(initial), "refined": summarize_objects(refined)},
            "refinement": {**chosen.to_dict(), "tried": chosen.tried},
            **({"close_match": close} if close else {}),
            "ci95": bootstrap_ci(refined, q.objects, n),
            "ci95_initial": bootstrap_ci(initial, q.objects, n),
            "refinement_gain": paired_difference(initial, refined, q.objects, n),
            "image_to_text": {
                "initial": summarize(back),
                "refined": summarize(back_refined),
                "ci95": bootstrap_ci(back_refined, f.image_objects, n),
            },
            "by_caption_kind": kinds,
            "ambiguity": ambiguity(q.texts, q.text, q.objects, initial.valid),
            "skipped": f.skipped,
            **({"class_protocol": self.class_protocol()} if self.config.eval.class_protocol else {}),
            **{
                name: protocol.scores(name, self.space, self.chosen.get(name, Chosen()), n)
                for name, protocol in protocols(self.config, f).items()
            },
        }

    def class_protocol(self) -> dict[str, Any]:
        """Reed's protocol with and without refinement."""
        f, q = self.features, self.features.queries
        queries, classes = class_queries(f.text[q.text], q.objects)
        given = queries, classes, f.image, f.image_objects
        refined = self._refiner(queries, f.image)
        # All classes are candidates of an image.
        everywhere = self._refiner(queries, f.image, replace(self.settings, top_p=None))
        return {"initial": class_metrics(*given), "refined": class_metrics(*given, refined, everywhere)}

    def examples(self, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Up to `count` queries with their first results before and after refinement, for the top of the report and for further
        down: `opening` and `examples` of `render_report`."""
        before, after = self.initial.first_rank, self.refined.first_rank
        opening = choose_opening(before, after, SHOWN_FIRST)[:count]
        further = choose_further(before, after, count - len(opening), opening)
        reader = SampleReader(self.features.index)
        first = [self._example(reader, i, SHOWN_FIRST) for i in opening]
        return {"moves": count_moves(before, after), "examples": first}, [self._example(reader, i, SHOWN) for i in further]

    def _example(self, reader: SampleReader, i: int, shown: int) -> dict[str, Any]:
        f, q = self.features, self.features.queries
        target = int(q.objects[i])
        pair = slice(int(self.pair_of[i]), int(self.pair_of[i]) + 1)
        initial = self.pair_features[pair] @ f.image.T
        refined = self.refine_images(pair, initial.copy()) if self.refine_images else initial
        return {
            "query": q.texts[q.text[i]],
            "kind": str(q.kinds[i]),
            "object_id": f.index.object_ids[target],
            "label": self._label(target),
            "rank_before": int(self.initial.first_rank[i]),
            "rank_after": int(self.refined.first_rank[i]),
            "before": self._results(reader, initial[0], target, shown),
            "after": self._results(reader, refined[0], target, shown),
        }

    def _label(self, row: int) -> str:
        """What an object is called: by its shortest caption, by its id where it has none."""
        return self.features.queries.shortest(row) or self.features.index.object_ids[row]

    def _results(self, reader: SampleReader, scores: np.ndarray, target: int, shown: int) -> list[dict[str, Any]]:
        f, results = self.features, []
        first = np.argsort(-scores, kind="stable")[:shown]
        rows = f.image_rows[first].tolist()
        for at, row, record in zip(first, rows, reader.read_all(rows)):
            raw, found = sound(record), int(f.image_objects[at])
            shown_image, ending = tile(raw)
            results.append(
                {
                    "image": shown_image,
                    "ext": ending,
                    "object_id": f.index.object_ids[found],
                    "label": self._label(found),
                    "image_id": f.index.image_ids[row],
                    "score": float(scores[at]),
                    "hit": found == target,
                }
            )
        return results


def tile(raw: RawSample) -> tuple[bytes, str]:
    """An image as a report shows it, and its ending: a page has some hundred of them, so that photos are made small."""
    if len(raw.image_bytes) > TILE_BYTES:
        with contextlib.suppress(SampleError):
            return webp(decode_rgb(raw.image_bytes), TILE_PX, TILE_QUALITY), "webp"
    return raw.image_bytes, raw.image_ext
