"""What held-out judgements say of two models: measures against loops, intervals, and the section of a report."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mmref.evaluate.judged import MEASURES, JudgedQuery, compared, format_judged, measure, section
from mmref.evaluate.report import JUDGED, with_section


def by_loops(scores: np.ndarray, of: JudgedQuery) -> list[float]:
    """MEASURES of one sentence that has right and wrong items, as their definitions read."""
    own = scores[of.query].tolist()
    order = sorted(range(len(own)), key=lambda i: (-own[i], i))
    pairs = [1.0 if own[r] > own[w] else 0.5 if own[r] == own[w] else 0.0 for r, w in itertools.product(of.right, of.wrong)]
    judged = [i for i in order if i in {*of.right.tolist(), *of.wrong.tolist()}][: len(of.right)]
    hits = sum(i in of.right for i in judged)
    places = [order.index(i) + 1 for i in of.right]
    return [100 * sum(pairs) / len(pairs), 100 * hits / len(of.right), sum(places) / len(places)]


def test_measures_are_as_defined():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (5, 30)).astype(np.float32)  # with ties
    judged = []
    for q in range(5):
        some = rng.permutation(30)[:9]
        judged.append(JudgedQuery(q, some[: 2 + q % 3], some[5:]))
    found = measure(scores, judged)
    np.testing.assert_allclose(found, [by_loops(scores, of) for of in judged])


def test_a_sentence_says_what_it_can():
    scores, none = np.array([[3, 2, 1]], np.float32), np.array([], np.int64)
    only_right, only_wrong = JudgedQuery(0, np.array([1]), none), JudgedQuery(0, none, np.array([1]))
    found = measure(scores, [only_right, only_wrong])
    np.testing.assert_array_equal(found, [[np.nan, np.nan, 2], [np.nan] * 3])


def test_the_change_is_paired_and_its_interval_is_that_of_sentences():
    rng = np.random.default_rng(1)
    before = np.column_stack([rng.uniform(0, 100, 80), np.full(80, np.nan), rng.uniform(1, 9, 80)])
    after = before + np.array([5.0, 0.0, -1.0])
    after[:4, 0] = before[:4, 0] = np.nan
    found = compared(before, after)
    assert list(found) == [MEASURES[0], MEASURES[2]], "what no sentence has is left out"
    assert found["pairs"]["queries"] == 76
    assert found["pairs"]["change"] == {"mean": pytest.approx(5), "ci95": [pytest.approx(5), pytest.approx(5)]}
    low, high = found["pairs"]["before"]["ci95"]
    assert low < found["pairs"]["before"]["mean"] < high and high - low == pytest.approx(4 * 29 / 76**0.5, rel=0.2)


def test_the_report_and_the_terminal_show_it():
    row = {"queries": 7, **{name: {"mean": mean, "ci95": [mean - 1, mean + 1]} for name, mean in
           (("before", 60.0), ("after", 72.5), ("change", 12.5))}}  # fmt: skip
    judged = {
        "refined": {"pairs": row}, "gallery": 1234, "before": "the model of <index>",
        "trained_on": {"judgements": 70, "queries": 7}, "held_out": {"judgements": 30, "queries": 3},
    }  # fmt: skip
    page = with_section("<!-- judgements -->\n<!-- end of judgements --><p>rest</p>", section(judged), JUDGED)
    assert "+12.5" in page and "70 judgements of" in page and "1,234 images" in page and "&lt;index&gt;" in page
    assert page == with_section(page, section(judged), JUDGED), "in the place of an earlier one"
    text = format_judged(judged)
    assert "+12.5   +11.5 to +13.5" in text and "30 of 3 sentences" in text
