"""From a checkpoint to metrics.json and report.html: the protocol of person retrieval, refinement chosen on val."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmref.cluster import connect
from mmref.config import Config, config_hash, from_dict, read_yaml, to_dict
from mmref.data.shards import SampleReader, ShardSet
from mmref.errors import CheckpointError, ShardSetError
from mmref.evaluate.bootstrap import bootstrap_ci
from mmref.evaluate.embed import SplitFeatures, embed_splits
from mmref.evaluate.metrics import PerQuery, evaluate_features, summarize
from mmref.evaluate.refinement import (
    ReferenceSpace,
    RefinementSettings,
    choose_refinement,
    refined_scores,
    refinement_grid,
)
from mmref.evaluate.report import format_table, render_report
from mmref.rundir import RunDir, read_jsonl
from mmref.train.checkpoint import CheckpointInfo, best_checkpoint, load_references

SHOWN = 10  # results of an example in the report


def open_run(run_dir: str) -> tuple[RunDir, Config, CheckpointInfo]:
    """A run, its config and its best checkpoint. Raises CheckpointError where there is none."""
    run = RunDir(run_dir)
    if not run.exists("config.yaml"):
        raise CheckpointError(
            f"{run.path} is no run directory: it has no config.yaml. Give one that `mmref train` wrote."
        )
    config = from_dict(read_yaml(f"{run.fetch('').rstrip('/')}/config.yaml"), "config.yaml")
    return run, config, best_checkpoint(run)


def evaluate_run(
    run_dir: str, data: str | None = None, split: str = "test", out: str | None = None, workers: int | None = None,
    report: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate the best checkpoint of a run on a split; refinement is chosen on the set's val split.

    Args:
        run_dir: run directory of `mmref train`.
        data: shard set, by default the one it was trained on. The references stay those of training.
        split: the split reported.
        out: where metrics are written besides `metrics.json` of the run.
        workers: Ray actors, by default `eval.workers`.
        report: write report.html into the run directory.

    Returns:
        The metrics, as in metrics.json.
    """
    run, config, checkpoint = open_run(run_dir)
    root = data or config.data.root
    shards = ShardSet.open(root)
    if split not in shards.splits:
        raise ShardSetError(f"{root} has no split `{split}`, only {shards.splits}.")
    if workers:
        config.eval.workers = workers
    began = time.perf_counter()
    tuned_on = "val" if "val" in shards.splits else split
    with connect(config.eval.workers):
        features = embed_splits(config, run, checkpoint, root, sorted({split, tuned_on}))
    embedded = time.perf_counter() - began
    space = _reference_space(run, config, checkpoint)
    evaluation = Evaluation(config, features[split], space, *_choose(config, features[tuned_on], space))
    metrics = {
        "split": split,
        **evaluation.metrics(),
        "wall_seconds": time.perf_counter() - began,
        "images_per_second": sum(len(f.image) for f in features.values()) / embedded,
        "config_hash": config_hash(config),
        "checkpoint": checkpoint.folder,
        "checkpoint_step": checkpoint.step,
    }
    metrics["refinement"]["chosen_on"] = tuned_on
    bad_training = json.loads(run.read_text("bad_samples.json")) if run.exists("bad_samples.json") else []
    metrics["bad_training_samples"] = bad_training
    text = json.dumps(metrics, indent=1)
    if data is None and split == "test" or not run.exists("metrics.json"):
        run.write_text("metrics.json", text)
    if out:
        target = RunDir(out)
        target.fs.makedirs(target.root.rsplit("/", 1)[0], exist_ok=True)
        with target.fs.open(target.root, "w") as file:
            file.write(text)
    if report:
        page = render_report(
            metrics=metrics,
            history=read_jsonl(run),
            examples=evaluation.examples(config.eval.examples),
            title=f"{shards.manifest['name']} · {run.path.rsplit('/', 1)[-1]}",
            config=to_dict(config),
        )
        run.write_text("report.html" if data is None else f"report-{shards.manifest['name']}.html", page)
    print(format_table(metrics))
    return metrics


def _reference_space(run: RunDir, config: Config, checkpoint: CheckpointInfo) -> ReferenceSpace | None:
    """The trained references, None for a run that had none (align-only)."""
    references = load_references(run.fetch(checkpoint.folder), checkpoint.meta).numpy()
    seen = np.abs(references).max((1, 2)) > 0
    trained = config.loss.w_guide > 0 or config.loss.w_fuse > 0 or config.loss.w_rec > 0
    return ReferenceSpace(references[seen]) if trained and seen.any() else None


def _choose(
    config: Config, val: SplitFeatures, space: ReferenceSpace | None
) -> tuple[RefinementSettings, list[dict[str, Any]]]:
    if space is None:
        return RefinementSettings(weight=0.0), []
    q = val.queries
    # top_p is a cap on cost: with fewer images than it, everything is a candidate
    top_p = config.eval.top_p if 0 < config.eval.top_p < len(val.image) else None
    metric = config.eval.metric
    return choose_refinement(
        space, val.text[q.text], val.image, q.objects, val.image_objects, refinement_grid(top_ps=(top_p,)), metric
    )


@dataclass
class Evaluation:
    """Scores of a split's features with and without refinement."""

    config: Config
    features: SplitFeatures
    space: ReferenceSpace | None
    settings: RefinementSettings
    tried: list[dict[str, Any]]

    def _rank(self, text_queries: bool, refined: bool) -> PerQuery:
        f = self.features
        text, text_objects = f.text[f.queries.text], f.queries.objects
        image, image_objects = f.image, f.image_objects
        q, g = (text, image) if text_queries else (image, text)
        ql, gl = (text_objects, image_objects) if text_queries else (image_objects, text_objects)
        if not text_queries:
            return evaluate_features(q, g, ql, gl, score_fn=self._score_fn(q, g) if refined else None)
        # the same words for the same object rank alike: score each pair of text and object once
        pairs, inverse = np.unique(np.stack([f.queries.text, ql], 1), axis=0, return_inverse=True)
        q, ql = f.text[pairs[:, 0]], pairs[:, 1]
        score_fn = self._score_fn(q, g) if refined else None
        return evaluate_features(q, g, ql, gl, score_fn=score_fn).take(inverse.reshape(-1))

    def _score_fn(self, queries: np.ndarray, gallery: np.ndarray):  # type: ignore[no-untyped-def]
        return None if self.space is None else refined_scores(self.space, self.settings, queries, gallery)

    def metrics(self) -> dict[str, Any]:
        """Metrics of both directions, intervals, per caption kind; keys as in metrics.json."""
        f, q = self.features, self.features.queries
        initial, refined = self._rank(True, False), self._rank(True, True)
        back, back_refined = self._rank(False, False), self._rank(False, True)
        kinds = {}
        for kind in sorted(set(q.kinds.tolist()) - {""}):
            at = q.kinds == kind
            kinds[kind] = {
                "n_queries": int(at.sum()),
                "initial": summarize(initial, at),
                "refined": summarize(refined, at),
            }
        s = asdict(self.settings)
        return {
            "n_queries": len(initial),
            "n_gallery": len(f.image),
            "n_objects": int(len(np.unique(f.image_objects))),
            "initial": summarize(initial),
            "refined": summarize(refined),
            "refinement": {**{k: s[k] for k in ("kind", "weight", "top_r", "tau", "top_p")}, "tried": self.tried},
            "ci95": bootstrap_ci(refined, q.objects, self.config.eval.bootstrap),
            "image_to_text": {"initial": summarize(back), "refined": summarize(back_refined)},
            "by_caption_kind": kinds,
            "skipped": f.skipped,
        }

    def examples(self, count: int) -> list[dict[str, Any]]:
        """Queries with their first results before and after refinement: half where refinement moved the first hit."""
        f, q = self.features, self.features.queries
        before, after = self._rank(True, False).first_rank, self._rank(True, True).first_rank
        moved = np.flatnonzero(before != after)
        rng = np.random.default_rng(0)
        chosen = list(rng.permutation(moved)[: count // 2])
        others = np.setdiff1d(np.arange(len(before)), chosen)
        chosen += list(rng.permutation(others)[: count - len(chosen)])
        reader = SampleReader(f.index)
        queries = f.text[q.text[chosen]]
        initial = queries @ f.image.T
        score_fn = self._score_fn(queries, f.image)
        refined = score_fn(slice(0, len(chosen)), initial.copy()) if score_fn else initial
        return [
            {
                "query": q.texts[q.text[i]],
                "kind": str(q.kinds[i]),
                "object_id": f.index.object_ids[q.objects[i]],
                "before": self._results(reader, initial[n], int(q.objects[i])),
                "after": self._results(reader, refined[n], int(q.objects[i])),
            }
            for n, i in enumerate(chosen)
        ]

    def _results(self, reader: SampleReader, scores: np.ndarray, target: int) -> list[dict[str, Any]]:
        f, results = self.features, []
        for at in np.argsort(-scores, kind="stable")[:SHOWN]:
            row = int(f.image_rows[at])
            raw = reader.read(row)
            results.append(
                {
                    "image": raw.image_bytes,
                    "ext": raw.image_ext,
                    "object_id": f.index.object_ids[int(f.image_objects[at])],
                    "image_id": f.index.image_ids[row],
                    "score": float(scores[at]),
                    "hit": int(f.image_objects[at]) == target,
                }
            )
        return results
