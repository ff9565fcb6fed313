"""What `mmref evaluate` reports is what a service answers: R@k by image and by object, to the last query."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.services import client_of
from support.tiny_run import make_run
from support.tiny_set import tiny_config

from mmref.data.shard_set import ShardSet
from mmref.evaluate.evaluation import evaluate_run
from mmref.evaluate.features import read_queries
from mmref.evaluate.metrics import RECALL_AT
from mmref.retrieval import index
from mmref.retrieval.service.limits import Limits

SPLIT = "train"  # the largest: 14 objects


@pytest.mark.parametrize("top_p", [0, 7])
def test_the_service_answers_with_the_numbers_of_the_evaluation(tiny_set, tmp_path, monkeypatch, top_p):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    options = {
        "eval.bootstrap": 20, "eval.examples": 0, "eval.workers": 0, "eval.top_p": top_p, "eval.refine_kinds": ["sparse"],
        "eval.refine_weights": [0.4, 2.0], "eval.refine_top_rs": [2, 4],
    }  # fmt: skip
    run = str(tmp_path / "run")
    make_run(tiny_config(tiny_set, options), run, {})
    chosen = evaluate_run(run, report=False)["refinement"]
    assert chosen["weight"] > 0, "or there is nothing to refine by"
    metrics = evaluate_run(run, split=SPLIT, report=False)
    path = tmp_path / "index"
    index.create(str(tiny_set), run, str(path), split=SPLIT, workers=0)
    client = client_of(path, limits=Limits(rate=0))
    of = ShardSet.open(str(tiny_set))
    queries, ids = read_queries(of.index(SPLIT)), of.index(SPLIT).object_ids
    for state, refine in (("initial", False), ("refined", True)):
        ranks: dict[str, list[int]] = {"image": [], "object": []}
        for text, wanted in zip(queries.text, queries.objects):
            for by, found in ranks.items():
                asked = {"text": queries.texts[text], "by": by, "top": 100, "refine": refine}
                results = client.get("/search", params=asked).json()["results"]
                found.append(1 + [one["object_id"] for one in results].index(ids[wanted]))
        for by, block in (("image", metrics[state]), ("object", metrics["by_object"][state])):
            answered = {f"R@{k}": 100 * float(np.mean(np.array(ranks[by]) <= k)) for k in RECALL_AT}
            assert answered == pytest.approx({name: block[name] for name in answered}, abs=1e-9), (by, state)
        assert ranks["object"] != ranks["image"]
        assert metrics["by_object"][state]["R@1"] == metrics[state]["R@1"]
        assert metrics["by_object"][state]["R@5"] > metrics[state]["R@5"], "an object takes one place, whatever it has"
    assert Path(run, "metrics-train.json").exists()
