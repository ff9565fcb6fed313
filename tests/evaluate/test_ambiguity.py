"""What ambiguous captions leave of R@1, on sets small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mmref.evaluate.ambiguity import ambiguity, same_words


def found(captions, in_gallery=None):
    """Of (caption, object) pairs, each a query."""
    texts = sorted({caption for caption, _ in captions})
    text = np.array([texts.index(caption) for caption, _ in captions])
    there = np.ones(len(captions), bool) if in_gallery is None else np.array(in_gallery)
    return ambiguity(texts, text, np.array([row for _, row in captions]), there)


def test_the_same_words_of_three_objects_are_right_for_one_in_three():
    captions = [("a red bird", 0), ("a red bird", 1), ("a red bird", 2), ("a blue bird", 2)]
    assert found(captions)["ceiling"] == pytest.approx(100 * (3 * 1 / 3 + 1) / 4)
    assert found(captions)["n_same"] == 3


def test_case_spaces_and_compatible_letters_make_no_difference():
    assert same_words(" A  red\tBird ") == same_words("a red bird") == same_words("a ｒｅｄ bird")
    assert same_words("a red bird") != same_words("a red bird.")
    assert found([("A red bird", 0), ("a  red bird", 1)])["ceiling"] == 50


def test_captions_of_one_object_are_not_ambiguous():
    assert found([("bird", 0), ("bird", 0), ("Bird", 0), ("fish", 1)]) == {
        "n_same": 0, "ceiling": 100.0, "n_fitting": 0, "guessing": 100.0,
    }  # fmt: skip


def test_no_ranking_by_words_is_better_in_expectation():
    """Every choice of one object for each text, each as good as any to who knows words alone."""
    captions = [("x", 0), ("x", 1), ("y", 1), ("y", 2), ("y", 3), ("z", 3)]
    hits = []
    for x in (0, 1):
        for y in (1, 2, 3):
            first = {"x": x, "y": y, "z": 3}
            hits.append(np.mean([first[text] == row for text, row in captions]))
    assert found(captions)["ceiling"] == pytest.approx(100 * np.mean(hits))


def test_what_is_not_in_the_gallery_counts_for_nothing():
    captions = [("bird", 0), ("bird", 1), ("fish", 2)]
    assert found(captions, [True, False, True]) == found([("bird", 0), ("fish", 2)])


def test_a_caption_fits_whose_words_are_all_said_of_an_object():
    captions = [("ear", 0), ("ear with hearing aid", 1), ("Aid, hearing!", 1), ("nose", 2), ("dark", 0)]
    got = found(captions)
    assert (got["n_same"], got["n_fitting"]) == (0, 1), "ear fits both objects, the others one"
    assert got["guessing"] == pytest.approx(100 * (1 / 2 + 4) / 5)
    spread = [("dark ear", 0), ("ear", 1), ("dark", 1)]  # the words of object 1 are in two captions
    assert found(spread)["guessing"] == pytest.approx(50)


def test_captions_without_words_fit_their_own_object():
    assert found([("!?", 0), ("…", 1)])["guessing"] == 100


def test_vowel_signs_are_parts_of_words():
    """Indic scripts and Thai write vowels as marks, which are no letters."""
    for captions in (["काली बिल्ली", "लाल किताब"], ["แมว ดำ", "หนังสือ แดง"]):
        assert found(list(zip(captions, range(2))))["guessing"] == 100
