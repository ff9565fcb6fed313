"""Exact search over features as they are stored, against all scores in fp32."""

from __future__ import annotations

import numpy as np
import pytest

from mmref.retrieval import exact as exact_search
from mmref.retrieval.exact import BLOCK_ROWS, exact, exact_among, gather_features, multiplies_bf16

DIM = 48


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def stored(tmp_path, rows, dtype, seed=0, spread=0.5):
    """Features around a few centers, mapped from a file as those of an index are."""
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(9).standard_normal((20, DIM))
    x = unit(centers[rng.integers(0, 20, rows)] + spread * rng.standard_normal((rows, DIM)))
    np.save(tmp_path / f"{seed}.npy", x.astype(dtype))
    return np.load(tmp_path / f"{seed}.npy", mmap_mode="r")


def asked(count):
    rng = np.random.default_rng(5)
    centers = np.random.default_rng(9).standard_normal((20, DIM))
    return unit(centers[rng.integers(0, 20, count)] + rng.standard_normal((count, DIM)))


def check(queries, matrices, k, found):
    """The k best scores, and each row with its own: rows of scores that fp32 cannot tell apart may change places."""
    scores, rows = found
    everything = queries.astype(np.float64) @ np.concatenate([np.asarray(m, np.float64) for m in matrices]).T
    np.testing.assert_allclose(scores, -np.sort(-everything, 1)[:, :k], atol=1e-6)
    np.testing.assert_allclose(scores, np.take_along_axis(everything, rows, 1), atol=1e-6)
    assert all(len(set(r)) == k for r in rows.tolist())


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("count, k", [(1, 10), (9, 10), (40, 3), (40, 700), (300, 10), (12, 1500)])
def test_the_best_are_those_of_all_scores(tmp_path, monkeypatch, dtype, count, k, bf16):
    """Whichever way is taken; PyTorch imitates bf16 where the processor has none."""
    monkeypatch.setattr(exact_search, "multiplies_bf16", lambda: bf16)
    matrices = [stored(tmp_path, 2 * BLOCK_ROWS + 1000, dtype), stored(tmp_path, 1700, dtype, seed=1)]
    queries = asked(count)
    check(queries, matrices, k, exact(queries, matrices, k))


def test_candidates_in_bf16_are_few_and_enough(tmp_path, monkeypatch):
    """The bound does its work: no query falls back to comparing all rows, and few rows are scored again."""
    monkeypatch.setattr(exact_search, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(exact_search, "_compared", lambda *_: pytest.fail("all rows were compared"))
    scored = []
    widened = exact_search.widened
    monkeypatch.setattr(exact_search, "widened", lambda x: scored.append(len(x)) or widened(x))
    matrix, queries = stored(tmp_path, 3 * BLOCK_ROWS, np.float16), asked(20)
    check(queries, [matrix], 10, exact(queries, [matrix], 10))
    assert len(scored) == 20 and max(scored) < len(matrix) / 4


def test_what_no_bound_tells_apart_is_compared_in_full(tmp_path, monkeypatch):
    """Copies of one vector with the least noise, and queries that nothing is close to."""
    monkeypatch.setattr(exact_search, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(exact_search, "MOST_CANDIDATES", 500)
    matrix = stored(tmp_path, 2 * BLOCK_ROWS, np.float16, spread=1e-3)
    queries = np.concatenate([asked(10), -unit(np.asarray(matrix[:10], np.float32))])
    check(queries, [matrix], 20, exact(queries, [matrix], 20))


def test_features_of_older_versions_stand_beside_new_ones(tmp_path):
    matrices = [stored(tmp_path, 3000, np.float32), stored(tmp_path, 2000, np.float16, seed=1)]
    rows, queries = np.array([5, 2999, 3000, 4999]), asked(2)
    gathered = gather_features(matrices, rows)
    assert gathered.dtype == np.float32
    np.testing.assert_array_equal(gathered[:2], matrices[0][[5, 2999]])
    np.testing.assert_array_equal(gathered[2:], np.asarray(matrices[1][[0, 1999]], np.float32))
    scores, found = exact_among(queries, matrices, rows, 4)
    np.testing.assert_allclose(scores, -np.sort(-(queries @ gathered.T), 1), atol=1e-6)
    assert all(sorted(r) == rows.tolist() for r in found.tolist())


def test_a_search_leaves_the_threads_of_others_alone(tmp_path):
    import torch

    before = torch.get_num_threads()
    exact(asked(20), [stored(tmp_path, 3 * BLOCK_ROWS, np.float16)], 5)
    assert torch.get_num_threads() == before and isinstance(multiplies_bf16(), bool)
