"""Refinement against a literal twin: a dictionary per code, a Python loop per pair."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmref.errors import ConfigError, DenseCodesError, EvaluationError
from mmref.evaluate import refinement
from mmref.evaluate.metrics import evaluate_features, summarize
from mmref.evaluate.refinement import (
    ReferenceSpace,
    RefinementSettings,
    candidates,
    choose_refinement,
    reference_similarity,
    refine,
    refined_scores,
    refinement_grid,
)


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def features(rng, n, d=8):
    return unit(rng.standard_normal((n, d)) + 0.5)


def case(seed=0, n_queries=17, n_gallery=23, m=11, per_object=2, d=8):
    rng = np.random.default_rng(seed)
    references = rng.standard_normal((m, per_object, d)).astype(np.float32)
    return references, features(rng, n_queries, d), features(rng, n_gallery, d)


def literal_similarities(references, x):
    """Best cosine of each row of x with each object, as nested lists."""
    return [
        [max(float(np.dot(r, row) / np.linalg.norm(r)) for r in rows) for rows in references.astype(float)]
        for row in x.astype(float)
    ]


def literal_cosine(a, b):
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def literal_code(similarity, top_r, tau):
    nearest = sorted(range(len(similarity)), key=lambda k: -similarity[k])[:top_r]
    total = sum(math.exp(similarity[k] / tau) for k in nearest)
    return [math.exp(similarity[k] / tau) / total if k in nearest else 0.0 for k in range(len(similarity))]


def literal_reference_similarity(references, queries, gallery, chosen):
    codes = []
    for x in (queries, gallery):
        rows = literal_similarities(references, x)
        if chosen.kind == "sparse":
            codes.append([literal_code(row, chosen.top_r, chosen.tau) for row in rows])
        else:
            mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            codes.append([[value - mu for value, mu in zip(row, mean, strict=True)] for row in rows])
    result = np.array([[literal_cosine(a, b) for b in codes[1]] for a in codes[0]])
    return result if chosen.kind == "sparse" else (1 + result) / 2


def scores_of(references, queries, gallery, chosen):
    score = refined_scores(ReferenceSpace(references), chosen, queries, gallery)
    return score(slice(0, len(queries)), queries @ gallery.T)


@pytest.mark.parametrize("per_object", [1, 3])
@pytest.mark.parametrize("m", [5, 30])
@pytest.mark.parametrize(
    "chosen",
    [
        RefinementSettings("sparse", 0.3, 1, 0.05),
        RefinementSettings("sparse", 0.3, 4, 0.05),
        RefinementSettings("sparse", 1.5, 5, 0.5),
        RefinementSettings("dense", 0.3),
    ],
)
def test_agrees_with_literal_twin(chosen, m, per_object):
    references, queries, gallery = case(m=m, per_object=per_object)
    expected = literal_reference_similarity(references, queries, gallery, chosen)
    expected = queries @ gallery.T + chosen.weight * expected
    np.testing.assert_allclose(scores_of(references, queries, gallery, chosen), expected, atol=2e-5)


def test_more_nearest_references_than_objects_are_clipped():
    references, queries, gallery = case(m=5)
    clipped = scores_of(references, queries, gallery, RefinementSettings(top_r=500))
    np.testing.assert_array_equal(clipped, scores_of(references, queries, gallery, RefinementSettings(top_r=5)))


def test_weight_zero_is_the_identity():
    references, queries, gallery = case()
    initial = queries @ gallery.T
    score = refined_scores(ReferenceSpace(references), RefinementSettings(weight=0.0), queries, gallery)
    np.testing.assert_array_equal(score(slice(0, 17), initial.copy()), initial)
    np.testing.assert_array_equal(refine(initial, np.ones_like(initial), 0.0), initial)


@pytest.mark.parametrize("kind", ["sparse", "dense", "expansion"])
def test_chunks_and_blocks_do_not_change_the_result(kind, monkeypatch):
    references, queries, gallery = case()
    chosen = RefinementSettings(kind, 0.4, 6, 0.1, top_p=9)
    labels, gallery_labels = np.arange(17) % 6, np.arange(23) % 6
    whole = scores_of(references, queries, gallery, chosen)
    monkeypatch.setattr(refinement, "_BLOCK_VALUES", 60)
    score = refined_scores(ReferenceSpace(references), chosen, queries, gallery)
    parts = [score(slice(a, a + 5), queries[a : a + 5] @ gallery.T) for a in range(0, 17, 5)]
    np.testing.assert_allclose(np.concatenate(parts), whole, atol=1e-6)
    result = evaluate_features(queries, gallery, labels, gallery_labels, chunk=4, score_fn=score)
    assert 0 < summarize(result)["mAP"] < 100


def test_dense_product_of_sparse_codes_equals_the_sparse_one(monkeypatch):
    references, queries, gallery = case(m=40)
    space, chosen = ReferenceSpace(references), RefinementSettings(top_r=9)
    codes = space.encode(queries, chosen), space.encode(gallery, chosen)
    monkeypatch.setattr(refinement, "_SPARSE_COST", 0)
    by_sparse = reference_similarity(*codes)
    monkeypatch.setattr(refinement, "_SPARSE_COST", 1e9)
    monkeypatch.setattr(refinement, "_BLOCK_VALUES", 200)
    np.testing.assert_allclose(reference_similarity(*codes), by_sparse, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.sampled_from(["sparse", "dense", "expansion"]), st.floats(0, 100))
def test_no_item_outside_top_p_moves_past_a_candidate(seed, top_p, kind, weight):
    rng = np.random.default_rng(seed)
    references, queries, gallery = case(seed % 7)
    # Duplicate gallery items: ties at the border of the candidates are common.
    gallery = gallery[rng.integers(0, 12, 23)]
    initial = queries @ gallery.T
    chosen = RefinementSettings(kind, weight, 3, 0.05, top_p)
    final = refined_scores(ReferenceSpace(references), chosen, queries, gallery)(slice(0, 17), initial.copy())
    for before, after in zip(initial, final, strict=True):
        first_pass = np.argsort(-before, kind="stable")
        order = np.argsort(-after, kind="stable")
        assert set(order[:top_p]) == set(first_pass[:top_p])
        assert order[top_p:].tolist() == first_pass[top_p:].tolist()
        np.testing.assert_array_equal(after[first_pass[top_p:]], before[first_pass[top_p:]])


@pytest.mark.parametrize("per_object", [1, 2])
def test_expansion_adds_the_weighted_mean_of_the_nearest_references_to_a_query(per_object):
    """S_ref of a pair one at a time: the expanded query with the gallery item as it is."""
    references, queries, gallery = case(per_object=per_object)
    chosen = RefinementSettings("expansion", 0.4, 5, 0.1)
    found = scores_of(references, queries, gallery, chosen)
    for i, similarity in enumerate(literal_similarities(references, queries)):
        code = literal_code(similarity, 5, 0.1)
        units = [[r / np.linalg.norm(r) for r in rows] for rows in references.astype(float)]
        expansion = sum(a * sum(rows) for a, rows in zip(code, units, strict=True))
        for j, item in enumerate(gallery):
            expected = queries[i] @ item + 0.4 * (1 + literal_cosine(expansion, item)) / 2
            assert found[i, j] == pytest.approx(expected, abs=1e-5)


def test_the_search_scores_each_kind_as_the_refinement_does():
    references, queries, gallery = case()
    labels = np.arange(17) % 5, np.arange(23) % 5
    space, grid = ReferenceSpace(references), refinement_grid(["dense", "expansion", "sparse"], [0.4], [3, 6], [0.1])
    assert [s.kind for s in grid] == ["dense", "expansion", "expansion", "sparse", "sparse"]
    _, table = choose_refinement(space, queries, gallery, *labels, grid=grid)
    for chosen, row in zip(grid, table[1:], strict=True):
        score = refined_scores(space, chosen, queries, gallery)
        expected = summarize(evaluate_features(queries, gallery, *labels, score_fn=score))
        assert {name: row[name] for name in expected} == pytest.approx(expected)
    _, alone = choose_refinement(space, queries, gallery, *labels, grid=[grid[1]])
    assert alone[1] == table[2], "expansion needs no codes of the gallery"


def test_candidates_of_tied_scores_are_the_first():
    scores = np.array([[0.0, 1.0, 1.0, 1.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]], np.float32)
    assert candidates(scores, 3).tolist() == [[False, True, True, False, True], [True, True, True, False, False]]
    assert candidates(scores, 99).all()


def test_dense_codes_of_one_query_use_a_given_mean():
    references, queries, _ = case(m=30, per_object=1)
    space, chosen = ReferenceSpace(references), RefinementSettings("dense")
    together = space.encode(queries, chosen)
    alone = space.encode(queries[3:4], chosen, mean=space.coordinates(queries).mean(axis=0))
    np.testing.assert_allclose(alone, together[3:4], atol=1e-6)


def test_nearest_is_sorted_and_best_of_an_objects_references():
    references = np.zeros((3, 2, 4), np.float32)
    references[0, 0, 0] = references[1, 1, 1] = references[2, 0, 2] = 2.0  # the other rows stay zero
    ids, cosines = ReferenceSpace(references).nearest(unit(np.array([[0.1, 0.9, 0.3, 0.0]])), 2)
    assert ids.tolist() == [[1, 2]]
    assert cosines[0, 0] == pytest.approx(0.9 / math.sqrt(0.91))


@pytest.mark.parametrize("per_object", [1, 3])
@pytest.mark.parametrize("shard", [7, 30, 1 << 20])
def test_nearest_searched_in_shards_is_that_of_all_similarities(monkeypatch, per_object, shard):
    """With equal references among them, which go by the lower id."""
    monkeypatch.setattr(refinement, "_SHARD_ROWS", shard)
    rng = np.random.default_rng(5)
    references = rng.standard_normal((60, per_object, 8)).astype(np.float32)
    references[50] = references[4]
    features = unit(rng.standard_normal((20, 8)))
    features[0] = unit(references[4, 0][None])[0]
    ids, cosines = ReferenceSpace(references).nearest(features, 9)
    similarity = np.einsum("nd,mkd->nmk", features, unit(references)).max(-1)
    expected = np.argsort(-np.round(similarity, 5), axis=1, kind="stable")[:, :9]
    assert (ids == expected).all() and ids[0, :2].tolist() == [4, 50]
    np.testing.assert_allclose(cosines, np.take_along_axis(similarity, expected, axis=1), atol=1e-6)


def helpful_case(rng, n_objects=40, noise=1.2):
    """Known objects span the ways in which new ones differ; the first pass sees mostly a nuisance shared by all."""
    basis = rng.standard_normal((30, 16))
    mixture = rng.dirichlet(np.full(30, 0.1), n_objects)
    labels = np.repeat(np.arange(n_objects), 3)
    views = [unit((mixture @ basis)[labels] + noise * 0.3 * rng.standard_normal((len(labels), 16))) for _ in range(2)]
    return basis[:, None].astype(np.float32), views[0], views[1], labels


def test_choice_is_the_argmax_of_independent_evaluations():
    references, queries, gallery, labels = helpful_case(np.random.default_rng(0))
    space = ReferenceSpace(references)
    grid = refinement_grid(weights=(0.0, 0.3, 1.0), top_rs=(2, 8, 64, 99), taus=(0.05, 0.3), top_ps=(None, 10))
    best, table = choose_refinement(space, queries, gallery, labels, labels, grid, metric="R@1", chunk=50)
    assert len(table) == 1 + 2 * (2 * 4 * 2 + 2)
    for row in table:
        tried = RefinementSettings(*(row[k] for k in ("kind", "weight", "top_r", "tau", "top_p")))
        score = refined_scores(space, tried, queries, gallery)
        result = summarize(evaluate_features(queries, gallery, labels, labels, score_fn=score))
        assert {k: row[k] for k in result} == pytest.approx(result, abs=1e-9)
    assert table[0]["weight"] == 0
    assert best.weight > 0
    score = refined_scores(space, best, queries, gallery)
    chosen = summarize(evaluate_features(queries, gallery, labels, labels, score_fn=score))["R@1"]
    assert chosen == max(row["R@1"] for row in table) > table[0]["R@1"]


def test_refinement_that_does_not_help_is_declined():
    references, queries, _ = case(m=3)
    labels = np.arange(17)  # identical query and gallery features: the first pass is perfect
    best, table = choose_refinement(ReferenceSpace(references), queries, queries, labels, labels)
    assert table[0]["R@1"] == 100.0
    assert best.weight == 0.0


@pytest.mark.parametrize(("metric", "terms"), [({}, ["mAP"]), ({"metric": "mAP+R@1"}, ["mAP", "R@1"])])
def test_the_objective_is_map_or_a_sum(metric, terms):
    references, queries, gallery = case()
    labels = np.arange(17) % 5, np.arange(23) % 5
    grid = refinement_grid(["dense"])
    _, table = choose_refinement(ReferenceSpace(references), queries, gallery, *labels, grid=grid, **metric)
    assert all(row["objective"] == pytest.approx(sum(row[term] for term in terms)) for row in table)


def test_duplicate_settings_are_tried_once():
    references, queries, gallery = case()
    grid = [RefinementSettings(), RefinementSettings()]
    labels = np.arange(17) % 5, np.arange(23) % 5
    _, table = choose_refinement(ReferenceSpace(references), queries, gallery, *labels, grid=grid)
    assert [row["weight"] for row in table] == [0.0, 0.2]


@pytest.mark.parametrize(
    "bad", [{"kind": "other"}, {"weight": -0.1}, {"weight": math.nan}, {"top_r": 0}, {"tau": 0.0}, {"top_p": 0}]
)
def test_settings_out_of_range(bad):
    with pytest.raises(ConfigError, match=f"{next(iter(bad))}"):
        RefinementSettings(**bad)


def test_unknown_metric_names_the_known_ones():
    references, queries, gallery = case()
    with pytest.raises(ConfigError, match=r"'R@2' is none of R@1, R@5"):
        choose_refinement(ReferenceSpace(references), queries, gallery, np.zeros(17), np.zeros(23), metric="mAP+R@2")


@pytest.mark.parametrize("kind", ["sparse", "dense", "expansion"])
def test_a_reference_that_was_never_set_counts_in_nothing(kind):
    """An object with one reference of two is the object with that one alone, also where its cosine is below 0."""
    rng = np.random.default_rng(0)
    one, queries, gallery = (rng.standard_normal((n, 6)).astype(np.float32) for n in (5, 4, 7))
    queries, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery))
    references = np.zeros((5, 2, 6), np.float32)
    references[np.arange(5), [0, 1, 0, 1, 0]] = one
    both = np.stack([one, one], 1)  # no short cut of dense codes with K = 2
    settings = RefinementSettings(kind=kind, weight=0.5, top_r=3)
    found, expected = (
        refined_scores(ReferenceSpace(r), settings, queries, gallery)(slice(0, 4), queries @ gallery.T)
        for r in (references, both)
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(ReferenceSpace(references).centres, one / np.linalg.norm(one, axis=1)[:, None], atol=1e-6)


@pytest.mark.parametrize("bad", [np.full((3, 2, 4), np.nan), np.zeros((0, 2, 4)), np.zeros(3)])
def test_references_that_cannot_be_used(bad):
    with pytest.raises(EvaluationError, match="references"):
        ReferenceSpace(bad)


def test_dense_codes_that_are_too_large_are_refused_with_what_helps(monkeypatch):
    """With several references for each object a code has a number for each object; with one it is as wide as a feature."""
    references, queries, gallery = case(m=11)
    monkeypatch.setattr(refinement, "DENSE_BYTES", 4 * 11 * len(queries))
    dense = RefinementSettings(kind="dense")
    space = ReferenceSpace(references)
    space.encode(queries, dense)
    with pytest.raises(DenseCodesError, match=r"23 images or texts over 11 objects .*--eval.refine_kinds '\[sparse\]'"):
        space.encode(gallery, dense)
    space.encode(gallery, RefinementSettings(kind="sparse", top_r=3))
    assert ReferenceSpace(references[:, :1]).encode(gallery, dense).shape == (23, 8)
