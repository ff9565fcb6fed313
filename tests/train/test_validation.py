"""Refinement inside training: the best of its grid on val, found exactly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch

from mmref.config import Config
from mmref.evaluate.metrics import evaluate_features, summarize
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings, refined_scores
from mmref.evaluate.shares import ALONE
from mmref.train import validation as module
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
    found = validation._refined(references, text, image, validation.objects, ALONE)

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


class Stored:
    """An encoder whose features are given."""

    device = torch.device("cpu")

    def __init__(self, image: np.ndarray, text: np.ndarray) -> None:
        self.image, self.text, self.seen = image, text, 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def images(self, pixels: np.ndarray) -> np.ndarray:
        self.seen += len(pixels)
        return self.image[self.seen - len(pixels) : self.seen]

    def texts(self, texts: list[str]) -> np.ndarray:
        return self.text[: len(texts)]


def test_images_that_cannot_be_read_are_left_out_as_at_the_end(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = Validation(make_config({"eval.batch": 1000}))
    count, bad = len(validation.objects), {1, 4}

    def read(reader: object, rows: list[int], data: object) -> tuple[np.ndarray, list[str]]:
        return np.zeros((len(rows), 1, 1, 3), np.uint8), ["broken" if i in bad else "" for i in rows]

    monkeypatch.setattr(module, "read_pixels", read)
    text, image = unit(len(validation.queries.texts), 8, seed=1), unit(count, 8, seed=2)
    found = validation(Stored(image, text), None)  # type: ignore[arg-type]
    usable = [i for i in range(count) if i not in bad]
    queries = validation.queries
    expected = evaluate_features(text[queries.text], image[usable], queries.objects, validation.objects[usable])
    assert found == pytest.approx(summarize(expected))
    assert found != pytest.approx(summarize(evaluate_features(text[queries.text], image, queries.objects, validation.objects)))
