"""The vectorised ranking against a literal twin: one stable sort and one Python loop per query."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mmref.errors import EvaluationError
from mmref.evaluate import metrics
from mmref.evaluate.metrics import (
    METRIC_NAMES,
    evaluate_features,
    rank_objects,
    rank_positives,
    score_ranking,
    summarize,
    summarize_objects,
)


def literal_ranks(scores, query_labels, gallery_labels):
    """Ranks of the hits of every query by sorting (-score, index) pairs of the items of its gallery."""
    result = []
    for row, label in zip(scores.tolist(), query_labels, strict=True):
        order = sorted((j for j in range(len(row)) if row[j] > -math.inf), key=lambda j: (-row[j], j))
        result.append([rank for rank, j in enumerate(order, 1) if gallery_labels[j] == label])
    return result


def literal_summary(scores, query_labels, gallery_labels):
    rows = []
    for ranks in literal_ranks(scores, query_labels, gallery_labels):
        if ranks:
            precision = [k / rank for k, rank in enumerate(ranks, 1)]
            ndcg = sum(1 / math.log2(rank + 1) for rank in ranks if rank <= 10) / sum(
                1 / math.log2(rank + 1) for rank in range(1, min(10, len(ranks)) + 1)
            )
            recalls = [ranks[0] <= k for k in (1, 5, 10)]
            rows.append([*recalls, sum(precision) / len(ranks), len(ranks) / ranks[-1], ndcg, 1 / ranks[0]])
    return dict(zip(METRIC_NAMES, 100 * np.mean(np.array(rows, float), axis=0), strict=True))


def random_case(rng, n_queries=70, n_gallery=90, n_objects=12, levels=None):
    scores = rng.standard_normal((n_queries, n_gallery)).astype(np.float32)
    if levels:
        scores = np.round(scores * levels) / np.float32(levels)
    return scores, rng.integers(0, n_objects + 2, n_queries), rng.integers(0, n_objects, n_gallery)


@pytest.mark.parametrize("cost", [(0, 0), metrics._COUNT_COST, (100, 100)], ids=["counted", "both", "sorted"])
@pytest.mark.parametrize("levels", [None, 4, 1])
@pytest.mark.parametrize("n_objects", [2, 12, 60])
def test_agrees_with_literal_twin(levels, n_objects, cost, monkeypatch):
    monkeypatch.setattr(metrics, "_COUNT_COST", cost)
    case = random_case(np.random.default_rng(n_objects), n_objects=n_objects, levels=levels)
    ranks, offsets = rank_positives(*case)
    assert [ranks[a:b].tolist() for a, b in pairwise(offsets)] == literal_ranks(*case)
    assert summarize(score_ranking(*case)) == pytest.approx(literal_summary(*case), abs=1e-9)


def test_published_example_of_ndcg_mrr_and_map():
    # Of the documentation of torchmetrics (RetrievalNormalizedDCG, RetrievalMRR, RetrievalMAP): two queries with galleries of
    # their own, of three and of four items.
    away = -np.inf
    scores = np.array([[0.2, 0.3, 0.5, away, away, away, away], [away, away, away, 0.1, 0.3, 0.5, 0.2]], np.float32)
    result = summarize(score_ranking(scores, np.array([0, 1]), np.array([9, 9, 0, 9, 1, 9, 1])))
    assert (result["NDCG@10"], result["MRR"], result["mAP"]) == pytest.approx((84.67, 75.0, 79.17), abs=0.005)


def test_ndcg_looks_at_ten_results():
    scores = -np.arange(30, dtype=np.float32)[None]
    labels = np.where(np.isin(np.arange(30), [0, 9, 10, *range(20, 30)]), 1, 0)  # hits at ranks 1, 10, 11, 21 to 30
    (found,) = score_ranking(scores, np.array([1]), labels).ndcg
    assert found == pytest.approx((1 + 1 / math.log2(11)) / sum(1 / math.log2(i + 1) for i in range(1, 11)))


def test_what_is_not_in_a_query_s_gallery_is_no_hit_and_before_none():
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.9, 0.8, 0.7, 0.6]], np.float32)
    labels = np.array([0, 1, 0, 0])
    scores[0, 0] = scores[1, :] = -np.inf
    result = score_ranking(scores, np.array([0, 0]), labels)
    assert result.first_rank.tolist() == [2, 0] and result.valid.tolist() == [True, False]
    assert result.ap[0] == pytest.approx((1 / 2 + 2 / 3) / 2) and result.inp[0] == pytest.approx(2 / 3)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_floats_and_labels(data):
    q, g = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, np.float32(np.inf), -np.float32(np.inf)])
    values = few | st.floats(width=32, allow_nan=False)
    scores = data.draw(hnp.arrays(np.float32, (q, g), elements=values))
    query_labels = data.draw(hnp.arrays(np.int64, q, elements=st.integers(0, 3)))
    gallery_labels = data.draw(hnp.arrays(np.int64, g, elements=st.integers(0, 3)))
    ranks, offsets = rank_positives(scores, query_labels, gallery_labels)
    found = [ranks[a:b].tolist() for a, b in pairwise(offsets)]
    assert found == literal_ranks(scores, query_labels, gallery_labels)
    counted = [metrics._counted(row, np.flatnonzero(gallery_labels == label)) for row, label in zip(scores, query_labels)]
    there = [row[gallery_labels == label] > -np.inf for row, label in zip(scores, query_labels)]
    assert [sorted(r for r, is_hit in zip(*one) if is_hit) for one in zip(counted, there)] == found


def test_several_blocks_give_the_same_ranks(monkeypatch):
    case = random_case(np.random.default_rng(5), levels=3)
    monkeypatch.setattr(metrics, "_COUNT_COST", (12, 0))  # some rows are counted, some sorted
    whole = rank_positives(*case)
    monkeypatch.setattr(metrics, "_BLOCK_SCORES", 7 * 90)
    for one, other in zip(whole, rank_positives(*case), strict=True):
        np.testing.assert_array_equal(one, other)


def test_ties_go_to_the_lower_gallery_index():
    labels = np.array([0, 1, 0, 1])
    ranks, _ = rank_positives(np.zeros((2, 4), np.float32), np.array([0, 1]), labels)
    assert ranks.tolist() == [1, 3, 2, 4]


def test_known_values():
    scores = np.array([[0.9, 0.8, 0.7, 0.6], [0.1, 0.2, 0.3, 0.4]], np.float32)
    result = score_ranking(scores, np.array([1, 0]), np.array([0, 1, 0, 1]))
    np.testing.assert_array_equal(result.first_rank, [2, 2])
    np.testing.assert_allclose(result.ap, [(1 / 2 + 2 / 4) / 2, (1 / 2 + 2 / 4) / 2])
    np.testing.assert_allclose(result.inp, [2 / 4, 2 / 4])
    assert summarize(result)["R@1"] == 0.0
    assert summarize(result)["R@5"] == 100.0


def test_queries_without_a_hit_are_excluded_and_counted():
    scores = np.array([[0.1, 0.9], [0.1, 0.9], [0.5, 0.4]], np.float32)
    result = score_ranking(scores, np.array([7, 1, 8]), np.array([0, 1]))
    assert result.valid.tolist() == [False, True, False]
    assert result.n_excluded == 2
    assert summarize(result)["R@1"] == 100.0
    with pytest.raises(EvaluationError, match="None of the 2 queries"):
        summarize(result, np.array([0, 2]))


def test_string_labels_and_subsets():
    scores = np.array([[0.1, 0.9, 0.3], [0.9, 0.1, 0.3]], np.float32)
    result = score_ranking(scores, np.array(["a", "long name"]), np.array(["long name", "a", "b"]))
    assert result.first_rank.tolist() == [1, 1]
    worse = score_ranking(scores, np.array(["b", "a"]), np.array(["long name", "a", "b"]))
    assert summarize(worse, np.array([True, False]))["mAP"] == pytest.approx(50.0)


def test_nan_is_an_error_that_says_where():
    scores = np.zeros((3, 4), np.float32)
    scores[1, 2] = np.nan
    with pytest.raises(EvaluationError, match="query 1 of this chunk, gallery item 2"):
        score_ranking(scores, np.zeros(3), np.zeros(4))
    with pytest.raises(EvaluationError, match="NaN"):
        features = np.full((2, 4), np.nan, np.float32)
        evaluate_features(features, np.ones((3, 4), np.float32), np.zeros(2), np.zeros(3))


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"\(2, 3\).*2 query labels and 4 gallery labels"):
        rank_positives(np.zeros((2, 3)), np.zeros(2), np.zeros(4))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_features_in_chunks(chunk):
    rng = np.random.default_rng(2)
    # Small integers: every product is exact, so that chunk sizes cannot differ by rounding, and ties abound.
    queries, gallery = (rng.integers(-2, 3, (n, 6)).astype(np.float32) for n in (40, 50))
    query_labels, gallery_labels = rng.integers(0, 9, 40), rng.integers(0, 9, 50)
    result = evaluate_features(queries, gallery, query_labels, gallery_labels, chunk=chunk)
    expected = literal_summary(queries @ gallery.T, query_labels, gallery_labels)
    assert summarize(result) == pytest.approx(expected, abs=1e-9)


def test_score_function_sees_its_rows_and_replaces_the_scores():
    rng = np.random.default_rng(3)
    queries, gallery = rng.standard_normal((20, 4)).astype(np.float32), rng.standard_normal((9, 4)).astype(np.float32)
    labels = np.arange(20) % 9
    wanted = np.eye(9, dtype=np.float32)[labels]
    seen = []

    def perfect(rows, initial):
        np.testing.assert_allclose(initial, queries[rows] @ gallery.T, atol=1e-6)
        seen.append((rows.start, rows.stop))
        return wanted[rows]

    result = evaluate_features(queries, gallery, labels, np.arange(9), chunk=8, score_fn=perfect)
    assert seen == [(0, 8), (8, 16), (16, 20)]
    assert summarize(result)["mINP"] == 100.0


def test_no_queries_is_an_error():
    with pytest.raises(EvaluationError, match="no query"):
        evaluate_features(np.zeros((0, 4)), np.zeros((3, 4)), np.zeros(0), np.zeros(3))


def test_among_no_images_no_object_has_a_rank():
    none = np.zeros((0, 4), np.float32)
    assert rank_objects(np.zeros((3, 0), np.float32), np.arange(3), np.zeros(0)).tolist() == [0, 0, 0]
    found = evaluate_features(np.zeros((3, 4), np.float32), none, np.arange(3), np.zeros(0), by_object=True)
    with pytest.raises(EvaluationError, match="None of the 3 queries has an item"):
        summarize(found)


def test_objects_rank_by_their_best_item():
    """Against a twin in loops, with ties, and queries of objects that the gallery does not hold."""
    rng = np.random.default_rng(0)
    gallery = np.array(["d", "a", "b", "a", "c", "b", "d", "d"])
    queries = np.array(["a", "b", "c", "d", "nobody", "a", "zz", "0"] * 6)
    scores = rng.integers(-2, 3, (len(queries), len(gallery))).astype(np.float32)
    expected = []
    for row, wanted in zip(scores, queries):
        order = sorted(range(len(gallery)), key=lambda i: (-row[i], i))
        objects = list(dict.fromkeys(gallery[order].tolist()))
        expected.append(objects.index(wanted) + 1 if wanted in objects else 0)
    assert rank_objects(scores, queries, gallery).tolist() == expected
    found = evaluate_features(scores, np.eye(len(gallery), dtype=np.float32), queries, gallery, chunk=5, by_object=True)
    assert found.object_rank.tolist() == expected and found.valid.tolist() == [rank > 0 for rank in expected]
    assert evaluate_features(scores, np.eye(8, dtype=np.float32), queries, gallery).object_rank.tolist() == [0] * len(queries)
    valid = np.array([rank for rank in expected if rank])
    summary = summarize_objects(found)
    assert summary == pytest.approx({f"R@{k}": 100 * np.mean(valid <= k) for k in (1, 5, 10)})
    assert summary["R@1"] == pytest.approx(summarize(found)["R@1"]), "the first item is the first object's"
