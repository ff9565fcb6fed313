"""Queries shared out over processes and scored on a device: the results of one process with NumPy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from mmref.errors import EvaluationError
from mmref.evaluate import metrics, on_device, refinement
from mmref.evaluate.metrics import PerQuery, evaluate_features, rank_positives
from mmref.evaluate.refinement import ReferenceSpace, candidates, choose_refinement, refinement_grid, score_refinements
from mmref.evaluate.shares import ALONE, QueryShare

CPU = torch.device("cpu")
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DEVICES = [CPU, pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
GRID = refinement_grid(("sparse", "dense", "expansion"), (0.1, 0.8), (2, 200), (0.05,), (None, 10))


def on_parts(parts: int, work: Callable[[QueryShare], Any], device: torch.device | None = None) -> list[Any]:
    """What each of some parts gets, each in a thread; they exchange rows as ranks do."""
    barrier, given = threading.Barrier(parts), [np.zeros(0)] * parts

    def one(part: int) -> Any:
        def gather(rows: np.ndarray) -> np.ndarray:
            given[part] = rows
            barrier.wait()
            everyone = np.concatenate(given)
            barrier.wait()
            return everyone

        return work(QueryShare(part, parts, gather, device))

    with ThreadPoolExecutor(parts) as pool:
        return list(pool.map(one, range(parts)))


def features(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape) + 0.3
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def case(seed: int = 0, queries: int = 101, gallery: int = 60, objects: int = 20) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    asked, found = features(rng, queries, 16), features(rng, gallery, 16)
    return asked, found, rng.integers(0, objects + 1, queries), rng.integers(0, objects, gallery)


def assert_same(one: PerQuery, other: PerQuery) -> None:
    for f in fields(PerQuery):
        np.testing.assert_array_equal(getattr(one, f.name), getattr(other, f.name), err_msg=f.name)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("chunk", [8, 64])
def test_each_part_gets_the_results_of_all_to_the_last_bit(parts: int, chunk: int) -> None:
    given = case()
    alone = evaluate_features(*given, chunk=chunk)
    for found in on_parts(parts, lambda share: evaluate_features(*given, chunk=chunk, share=share)):
        assert_same(found, alone)


def test_a_part_ranks_its_chunks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[int] = []
    known = metrics.score_ranking
    monkeypatch.setattr(metrics, "score_ranking", lambda scores, *labels: (ranked.append(len(scores)), known(scores, *labels))[1])
    on_parts(4, lambda share: evaluate_features(*case(), chunk=8, share=share))
    assert sum(ranked) == 101
    ranked.clear()
    evaluate_features(*case(), chunk=8, share=QueryShare(3, 4, lambda rows: np.concatenate([rows] * 4)))
    assert ranked == [8, 8, 8]  # of 13 chunks, the last of 5 queries


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("per_object", [1, 2])
def test_refinement_is_chosen_alike_by_all_parts(parts: int, per_object: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refinement, "_CODED", 16)
    space, given = ReferenceSpace(features(np.random.default_rng(3), 30, per_object, 16)), case()
    best, table = choose_refinement(space, *given, GRID, chunk=8)
    assert len({round(row["objective"], 6) for row in table}) > 5, "settings differ"
    for found in on_parts(parts, lambda share: choose_refinement(space, *given, GRID, chunk=8, share=share)):
        assert found == (best, table)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("levels", [None, 2])
def test_ranks_on_a_device_are_those_of_numpy(device: Any, levels: int | None) -> None:
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((40, 70)).astype(np.float32)
    if levels:  # many ties
        scores = np.round(scores * levels) / np.float32(levels)
    scores[rng.random(scores.shape) < 0.1] = -np.inf  # not in that query's gallery
    labels = rng.integers(0, 9, 40), rng.integers(0, 7, 70)
    for one, other in zip(rank_positives(scores, *labels), rank_positives(torch.from_numpy(scores).to(device), *labels)):
        np.testing.assert_array_equal(one, other)
    for top_p in (1, 10, 69, 70, 100):
        found = candidates(torch.from_numpy(scores).to(device), top_p)
        np.testing.assert_array_equal(found.cpu().numpy(), candidates(scores, top_p))


def test_nan_on_a_device_is_an_error_that_says_where() -> None:
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan
    with pytest.raises(EvaluationError, match=r"1 of 12 scores are NaN .*query 1 of this chunk, gallery item 2"):
        rank_positives(scores, np.zeros(3), np.zeros(4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_object", [1, 2])
@pytest.mark.parametrize("most_dense", [1 << 17, 0])
def test_refinement_on_a_device(device: Any, per_object: int, most_dense: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a device may round otherwise: a few ranks of neighbors with all but equal scores may change places."""
    monkeypatch.setattr(on_device, "_BLOCK_VALUES", 7 * 30)
    monkeypatch.setattr(refinement, "_DENSE_ON_DEVICE", most_dense)
    space, given = ReferenceSpace(features(np.random.default_rng(3), 30, per_object, 16)), case()
    alone = score_refinements(space, *given, GRID, chunk=32)
    (found,) = on_parts(1, lambda share: score_refinements(space, *given, GRID, chunk=32, share=share), torch.device(device))
    assert list(found) == list(alone)
    for settings, expected in alone.items():
        assert np.mean(found[settings].ap != expected.ap) < 0.01, settings
        np.testing.assert_array_equal(found[settings].valid, expected.valid)


def test_no_query_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="no query to evaluate"):
        evaluate_features(*case(queries=0), share=ALONE)
