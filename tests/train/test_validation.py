"""Refinement inside training: the best of its grid on val, found exactly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from mmref.config import Config
from mmref.evaluate.metrics import evaluate_features, summarize
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings, refined_scores
from mmref.train.validation import Validation, score_of

WEIGHTS, TOP_RS, TAUS = [0.1, 0.4], [2, 4], [0.05, 0.2]


def unit(*shape: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_the_search_is_every_setting_scored_on_its_own(make_config: Callable[..., Config]) -> None:
    config = make_config({"eval.refine_in_training": True, "eval.refine_weights": WEIGHTS, "eval.refine_top_rs": TOP_RS,
                          "eval.refine_taus": TAUS})  # fmt: skip
    validation = Validation(config)
    references = unit(14, 1, 8, seed=0)
    text, image = unit(len(validation.queries.texts), 8, seed=1), unit(len(validation.objects), 8, seed=2)
    found = validation._refined(references, text, image)

    queries = text[validation.queries.text]

    def score(settings: RefinementSettings) -> float:
        refiner = refined_scores(ReferenceSpace(references), settings, queries, image)
        per_query = evaluate_features(queries, image, validation.queries.objects, validation.objects, score_fn=refiner)
        return score_of(summarize(per_query), config.eval.metric)

    grid = [RefinementSettings("sparse", w, r, tau) for w, r, tau in product(WEIGHTS, TOP_RS, TAUS)]
    grid += [RefinementSettings("dense", w) for w in WEIGHTS]
    scores = {settings: score(settings) for settings in grid}
    plain = score(RefinementSettings(weight=0.0))
    assert len({round(s, 6) for s in scores.values()}) > 3, "settings differ"
    assert found["refined_mAP"] == pytest.approx(max(plain, *scores.values()))
    sparse = {settings: s for settings, s in scores.items() if settings.kind == "sparse"}
    searched = (
        ("weight", WEIGHTS, scores),
        ("kind", ["sparse", "dense"], scores),
        ("top_r", TOP_RS, sparse),
        ("tau", TAUS, sparse),
    )
    for name, values, among in searched:
        best = {str(v): max(s for k, s in among.items() if getattr(k, name) == v) for v in values}
        assert found["refine_gain"][name] == pytest.approx({v: s - plain for v, s in best.items()})
