"""The bootstrap against one that builds every resampled list of queries."""

import numpy as np
import pytest

from mmref.errors import EvaluationError
from mmref.evaluate import bootstrap
from mmref.evaluate.bootstrap import bootstrap_ci, paired_difference
from mmref.evaluate.metrics import METRIC_NAMES, PerQuery, summarize


def results(seed, n_queries=120, n_objects=25, worse=1.0):
    rng = np.random.default_rng(seed)
    objects = rng.integers(0, n_objects, n_queries)
    skill = rng.random(n_objects)[objects]
    valid = rng.random(n_queries) > 0.1
    first_rank = np.where(valid, 1 + rng.poisson(6 * worse * (1 - skill)), 0)
    ap = np.where(valid, skill * rng.random(n_queries) / worse, 0.0)
    return PerQuery(first_rank, ap, ap / 2, ap / 3, valid, first_rank), objects


def literal_replicates(values, valid, objects, n, seed):
    """Draw objects, list the queries of each draw, average them."""
    names = sorted(set(objects[valid].tolist()))
    counts = bootstrap._draw_counts(np.random.default_rng(seed), n, len(names))
    replicates = []
    for row in counts:
        queries = []
        for name, count in zip(names, row, strict=True):
            for _ in range(count):
                queries += [i for i in range(len(objects)) if objects[i] == name and valid[i]]
        replicates.append(np.mean([values[i] for i in queries], axis=0))
    return np.array(replicates)


def test_agrees_with_literal_resampling():
    per_query, objects = results(0)
    replicates = literal_replicates(per_query.values(), per_query.valid, objects, 60, seed=3)
    intervals = bootstrap_ci(per_query, objects, n=60, seed=3)
    for column, name in enumerate(METRIC_NAMES):
        expected = np.quantile(replicates[:, column], [0.025, 0.975])
        np.testing.assert_allclose(intervals[name], expected, atol=1e-9)


def test_paired_difference_agrees_with_literal_resampling():
    (a, objects), (b, _) = results(0), results(0, worse=2.0)
    replicates = literal_replicates(b.values() - a.values(), a.valid, objects, 60, seed=3)
    found = paired_difference(a, b, objects, n=60, seed=3)
    for column, name in enumerate(METRIC_NAMES):
        assert found[name]["mean"] == pytest.approx(summarize(b)[name] - summarize(a)[name])
        expected = np.quantile(replicates[:, column], [0.025, 0.975])
        np.testing.assert_allclose(found[name]["ci95"], expected, atol=1e-9)
    assert found["R@5"]["ci95"][1] < 0  # b is clearly worse


def test_draws_are_with_replacement_and_uniform():
    counts = bootstrap._draw_counts(np.random.default_rng(0), 4000, 10)
    assert (counts.sum(axis=1) == 10).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1.0, atol=0.06)
    np.testing.assert_allclose(counts.var(axis=0), 0.9, atol=0.12)


def test_blocks_of_replicates_do_not_change_the_result(monkeypatch):
    per_query, objects = results(1)
    whole = bootstrap_ci(per_query, objects, n=50)
    monkeypatch.setattr(bootstrap, "_BLOCK_COUNTS", 25 * 7)
    assert bootstrap_ci(per_query, objects, n=50) == whole


def test_seed_and_level():
    per_query, objects = results(1)
    assert bootstrap_ci(per_query, objects, seed=1) == bootstrap_ci(per_query, objects, seed=1)
    assert bootstrap_ci(per_query, objects, seed=1) != bootstrap_ci(per_query, objects, seed=2)
    (low, high), (lower, higher) = (bootstrap_ci(per_query, objects, level=x)["mAP"] for x in (0.5, 0.99))
    assert lower < low < summarize(per_query)["mAP"] < high < higher


def test_interval_is_that_of_objects_not_of_queries():
    # 20 objects, each all right or all wrong on 50 queries: 20 coin tosses, not 1,000.
    objects = np.repeat(np.arange(20), 50)
    right = objects % 2 == 0
    per_query = PerQuery(np.where(right, 1, 99), right / 1.0, right / 1.0, right / 1.0, np.ones(1000, bool), np.zeros(1000, int))
    low, high = bootstrap_ci(per_query, objects)["R@1"]
    deviation = 100 * np.sqrt(0.25 / 20)
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_identical_systems_differ_by_nothing():
    per_query, objects = results(1)
    assert paired_difference(per_query, per_query, objects)["mAP"] == {"mean": 0.0, "ci95": [0.0, 0.0]}


def test_string_objects_equal_integer_objects():
    per_query, objects = results(2)
    names = np.array([f"{o:03d}" for o in objects])
    assert bootstrap_ci(per_query, names) == bootstrap_ci(per_query, objects)


def test_what_cannot_be_compared_is_an_error():
    per_query, objects = results(1)
    with pytest.raises(EvaluationError, match="same queries"):
        paired_difference(per_query, per_query.take(np.arange(10)), objects)
    nothing = PerQuery(np.zeros(3, int), *np.zeros((3, 3)), np.zeros(3, bool), np.zeros(3, int))
    with pytest.raises(EvaluationError, match="None of the 3"):
        bootstrap_ci(nothing, np.arange(3))
    with pytest.raises(ValueError, match="2 objects for 120 queries"):
        bootstrap_ci(per_query, objects[:2])
