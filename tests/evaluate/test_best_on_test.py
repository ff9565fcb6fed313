"""What papers report that choose on test."""

from __future__ import annotations

from mmref.evaluate.evaluation import best_on_test
from mmref.evaluate.metrics import METRIC_NAMES


def line(step, value):
    return {"step": step, "val_R@1": 99.0, **{f"test_{m}": value for m in METRIC_NAMES}}


def test_the_best_by_r_at_1_the_earlier_on_a_tie():
    history = [{"step": 5, "loss": 1.0}, line(10, 40.0), line(20, 42.0), {"step": 25, "loss": 0.5}, line(30, 42.0)]
    assert best_on_test(history) == {"step": 20, **dict.fromkeys(METRIC_NAMES, 42.0), "chosen_on": "test"}


def test_nothing_where_test_was_left_alone():
    assert best_on_test([{"step": 10, "val_R@1": 40.0}]) is None
