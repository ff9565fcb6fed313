"""The rule that chooses the queries of the report's first screen, and what is shown of them."""

from __future__ import annotations

import numpy as np
import pytest
from support.tiny_run import random_features
from support.tiny_set import tiny_config

from mmref.data.captions import shortest
from mmref.evaluate.evaluation import CAPTIONS, SHOWN, SHOWN_FIRST, Evaluation
from mmref.evaluate.examples import OPENING, choose_further, choose_opening, count_moves
from mmref.evaluate.protocols import Chosen
from mmref.evaluate.refinement import RefinementSettings


def ranks(count=400, seed=5):
    """Ranks before and after of queries of which a tenth have no right image."""
    rng = np.random.default_rng(seed)
    before, after = rng.integers(1, 60, count), rng.integers(1, 60, count)
    after[::3] = before[::3]
    before[::10] = after[::10] = 0
    return before, after


def test_one_query_of_each_kind_with_a_right_image_in_a_row():
    before, after = ranks()
    up, down, same = choose_opening(before, after, 5)
    assert after[up] < before[up] and after[down] > before[down] and after[same] == before[same]
    assert all(0 < min(before[i], after[i]) <= 5 for i in (up, down, same))
    assert [up, down, same] == choose_opening(before.copy(), after.copy(), 5), "the same each time"


def test_the_choice_is_drawn_not_picked():
    """Of many sets of ranks the chosen improvement is not the largest: a rule that sorted by gain would show it."""
    gains = []
    for seed in range(20):
        before, after = ranks(seed=seed)
        up = choose_opening(before, after, 5)[0]
        visible = (np.minimum(before, after) <= 5) & (after < before)
        gains.append((before - after)[visible].max() == before[up] - after[up])
    assert sum(gains) < 10


def test_where_no_row_has_a_right_image_it_is_shown_all_the_same():
    before, after = np.array([50, 60, 70]), np.array([40, 90, 70])
    assert choose_opening(before, after, 5) == [0, 1, 2]


def test_kinds_that_there_are_not_leave_their_place_to_others():
    before = np.array([0, 3, 2, 9, 1])
    assert len(set(choose_opening(before, before, 5))) == OPENING and 0 not in choose_opening(before, before, 5)
    assert choose_opening(np.array([0, 4]), np.array([0, 2]), 5) == [1]
    assert choose_opening(np.zeros(3, np.int64), np.zeros(3, np.int64), 5) == []


def test_moves_are_counted_over_queries_that_have_a_right_image():
    assert count_moves(np.array([0, 3, 2, 9, 1]), np.array([0, 1, 5, 9, 1])) == {"up": 1, "down": 1, "same": 2}


def test_further_examples_are_others_half_of_which_moved():
    before, after = ranks()
    first = choose_opening(before, after, 5)
    further = choose_further(before, after, 10, first)
    assert len(set(further)) == 10 and not set(further) & set(first)
    assert sum(before[i] != after[i] for i in further[:5]) == 5


def test_the_shortest_caption_and_of_equally_long_ones_the_first():
    assert shortest(["a red bird", "robin", "eagle"]) == "eagle" and shortest([]) == ""


@pytest.fixture(scope="module")
def evaluation(tiny_set):
    """Of features that no model has made, refined."""
    found, space = random_features(None, None, None, str(tiny_set), ["test"])
    settings = RefinementSettings(kind="sparse", weight=0.8, top_r=4, tau=0.1)
    return Evaluation(tiny_config(tiny_set, {}), found["test"], space, {CAPTIONS: Chosen(settings)})


def test_examples_have_rows_ranks_and_captions_for_names(evaluation):
    opening, further = evaluation.examples(8)
    assert len(opening["examples"]) == OPENING and len(further) == 8 - OPENING
    assert sum(opening["moves"].values()) == len(evaluation.initial)
    for shown, examples in ((SHOWN_FIRST, opening["examples"]), (SHOWN, further)):
        for example in examples:
            assert len(example["before"]) == len(example["after"]) == min(shown, len(evaluation.features.image))
            number = example["object_id"].split(".")[1]
            assert example["label"].endswith(f" {number}") and "drawing" not in example["label"]
            for side in ("before", "after"):
                hits = [rank for rank, r in enumerate(example[side], 1) if r["hit"]]
                assert (hits or [shown + 1])[0] == min(example[f"rank_{side}"], shown + 1)
                for r in example[side]:
                    assert r["label"].split()[-1] == r["object_id"].split(".")[1] and len(r["label"].split()) == 3


def test_as_many_as_asked_for_from_the_top(evaluation):
    for count in (0, 1, 3):
        opening, further = evaluation.examples(count)
        assert (len(opening["examples"]), further) == (count, [])
