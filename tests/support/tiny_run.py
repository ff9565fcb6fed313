"""A finished run in a moment: one checkpoint of random weights and references, and the metrics of its evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmref.config import Config, dump_yaml
from mmref.data.shard_set import ShardSet
from mmref.data.tokens import load_tokens
from mmref.evaluate.features import read_queries
from mmref.evaluate.refinement import ReferenceSpace
from mmref.evaluate.split_features import SplitFeatures
from mmref.model.mmref import MMRef, build_model
from mmref.run import checkpoints
from mmref.run.directory import RunDir
from mmref.train import checkpoint_files
from mmref.train.bank import ReferenceBank
from support.tiny_set import tiny_config

UNSEEN = 2  # the first objects have no trained reference


def run_of(tiny_set: Path, path: Path) -> Path:
    """`make_run` of the tiny set, for fixtures of a wider scope than a test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        make_run(tiny_config(tiny_set, {}), str(path), {})
    return path


def make_run(config: Config, path: str, refinement: dict[str, Any]) -> MMRef:
    """Write a run directory (a path or URL) and return its model; set DS_ACCELERATOR=cpu before."""
    run = RunDir(path)
    run.write_text("config.yaml", dump_yaml(config))
    model = build_model(config, load_tokens(config).vocab_size).eval()
    engine = SimpleNamespace(module=model, optimizer=torch.optim.AdamW(model.parameters()))
    index = ShardSet.open(config.data.root).index("train")
    bank = ReferenceBank(index.n_objects, model.embed_dim, config.reference, 0, object_ids=index.object_ids)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too: a swapped one must show
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
        bank.rows[UNSEEN:] = torch.randn(bank.rows[UNSEEN:].shape, generator=torch.Generator().manual_seed(1))
    scores = {"R@1": 40.0, "R@5": 60.0, "R@10": 70.0, "mAP": 45.0, "mINP": 30.0}
    folder = f"{checkpoints.FOLDER}/step-00000020-a"
    state = checkpoint_files.snapshot(engine, bank, {"step": 20, "score": 85.0, "val": scores})
    checkpoint_files.write(run, folder, state, 0)
    checkpoint_files.commit(run, folder, state.meta)
    metrics = {
        "split": "test", "checkpoint": folder, "n_queries": 20, "n_gallery": 10, "initial": scores,
        "refined": {name: value + 2.5 for name, value in scores.items()}, "ci95": {"R@1": [33.0, 51.0]},
        "refinement": {
            "kind": "sparse", "weight": 0.4, "top_r": 4, "tau": 0.05, "top_p": None, "chosen_on": "val", "tried": [],
            **refinement,
        },
    }  # fmt: skip
    run.write_text("metrics.json", json.dumps(metrics))
    return model


def random_features(
    run: Any, config: Any, checkpoint: Any, root: str, splits: list[str]
) -> tuple[dict[str, SplitFeatures], ReferenceSpace]:
    """In place of `evaluation.run_features`: features that no model has made, and no Ray."""
    rng, found = np.random.default_rng(0), {}
    for split in splits:
        index = ShardSet.open(root).index(split)
        queries = read_queries(index)
        image, text = (rng.normal(size=(n, 8)).astype(np.float32) for n in (len(index), len(queries.texts)))
        image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
        found[split] = SplitFeatures(index, queries, image, np.arange(len(index)), text, [])
    return found, ReferenceSpace(rng.normal(size=(10, 8)))
