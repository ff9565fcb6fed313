"""Features of whole splits by Ray workers, each of which loads the model once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmref.config import Config
from mmref.config.packages import trust_own
from mmref.data.sample_reader import SampleReader, SplitIndex
from mmref.data.shard_set import ShardSet
from mmref.data.stream import quiet_ray_data
from mmref.data.tokens import load_tokens
from mmref.evaluate.features import Encoder, Floats, Queries, read_pixels, read_queries
from mmref.model.mmref import build_model
from mmref.run.checkpoints import CheckpointInfo, fetched, load_model
from mmref.run.directory import RunDir


@dataclass
class SplitFeatures:
    """A split as features; images that cannot be read are left out and listed."""

    index: SplitIndex
    queries: Queries
    image: Floats  # (n, d) normalised features of the usable images
    image_rows: np.ndarray  # (n,) their positions in the index
    text: Floats  # (t, d) normalised features of the distinct captions
    skipped: list[str]

    @property
    def image_objects(self) -> np.ndarray:
        return np.asarray(self.index.object_row)[self.image_rows].astype(np.int64)


class Embedder:
    """Ray Data's actor: a row is a job {split, kind, start, stop, texts}, the answer its features."""

    def __init__(self, run_dir: str, checkpoint: CheckpointInfo, config: Config, root: str, splits: list[str]) -> None:
        self.device = torch.device("cuda" if config.train.gpu and torch.cuda.is_available() else "cpu")
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        trust_own(config.model)  # whoever opened the run has checked it
        tokens = load_tokens(config)
        model = build_model(config, tokens.vocab_size)
        with fetched(RunDir(run_dir), checkpoint, "model") as folder:
            load_model(folder, model)
        self.encoder = Encoder(model.to(self.device), model, config.data, tokens, self.device)
        self.config = config
        shards = ShardSet.open(root)
        self.readers = {split: SampleReader(shards.index(split)) for split in splits}

    def __call__(self, jobs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        job, split, kind = int(jobs["job"][0]), str(jobs["split"][0]), str(jobs["kind"][0])
        rows = list(range(int(jobs["start"][0]), int(jobs["stop"][0])))
        bad = [""] * len(rows)
        with self.encoder:
            if kind == "image":
                pixels, bad = read_pixels(self.readers[split], rows, self.config.data)
                features = self.encoder.images(pixels)
            else:
                features = self.encoder.texts(list(jobs["texts"][0]))
        return {
            "job": np.full(len(rows), job),
            "row": np.array(rows),
            "feature": features,
            "bad": np.array(bad, dtype=object),
        }


def embed_splits(
    config: Config, run: RunDir, checkpoint: CheckpointInfo, root: str, splits: list[str]
) -> dict[str, SplitFeatures]:
    """Features of the splits of a shard set with a checkpoint's weights. Ray must be connected."""
    import ray
    import ray.data

    from mmref.cluster.resources import has_gpu

    shards = ShardSet.open(root)
    indices = {s: shards.index(s) for s in splits}
    queries = {s: read_queries(indices[s]) for s in splits}
    jobs: list[dict[str, Any]] = []
    for s in splits:
        for kind, count in (("image", len(indices[s])), ("text", len(queries[s].texts))):
            for start in range(0, count, config.eval.batch):
                stop = min(start + config.eval.batch, count)
                texts = queries[s].texts[start:stop] if kind == "text" else []
                jobs.append({"job": len(jobs), "split": s, "kind": kind, "start": start, "stop": stop, "texts": texts})
    quiet_ray_data()
    dataset = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map_batches(
        Embedder,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=config.eval.workers),
        num_cpus=1,
        num_gpus=int(config.train.gpu and has_gpu()),  # the run may have been trained on GPUs elsewhere
        fn_constructor_args=(run.path, checkpoint, config, root, splits),
    )
    parts: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
        for job in np.unique(batch["job"]):
            at = batch["job"] == job
            of = jobs[int(job)]
            parts.setdefault((of["split"], of["kind"]), []).append((batch["row"][at], batch["feature"][at], batch["bad"][at]))
    return {s: _collect(indices[s], queries[s], parts[s, "image"], parts[s, "text"]) for s in splits}


def _collect(index: SplitIndex, queries: Queries, images: list, texts: list) -> SplitFeatures:
    rows, features, bad = (np.concatenate(x) for x in zip(*images))
    order = np.argsort(rows)
    rows, features, bad = rows[order], features[order], bad[order]
    usable = np.array([not b for b in bad])
    text_rows, text, _ = (np.concatenate(x) for x in zip(*texts))
    return SplitFeatures(
        index, queries, np.ascontiguousarray(features[usable]), rows[usable],
        np.ascontiguousarray(text[np.argsort(text_rows)]), queries.skipped + [b for b in bad if b],
    )  # fmt: skip
