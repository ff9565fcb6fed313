"""Which cosine is close: against right images counted one by one, whatever else the gallery holds."""

from __future__ import annotations

import numpy as np
import pytest

from mmref.evaluate import close_match
from mmref.evaluate.close_match import choose_close_match
from mmref.evaluate.features import Floats, Queries


def split(objects: int = 60, seed: int = 0) -> tuple[Floats, Queries, Floats, np.ndarray]:
    """Texts near the images of their objects, two images and two texts an object, and one text twice."""
    rng = np.random.default_rng(seed)
    of = np.repeat(np.arange(objects), 2)
    centres = rng.normal(size=(objects, 16))
    image, text = (centres[of] + scale * rng.normal(size=(len(of), 16)) for scale in (0.5, 1.2))
    image, text = ((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))
    asked = np.append(np.arange(len(of)), 0)  # the first caption twice: it is one question
    queries = Queries([f"text {i}" for i in range(len(of))], asked, np.full(len(asked), ""), of[asked], asked)
    return text, queries, image, of


def by_hand(text: Floats, image: Floats, objects: np.ndarray) -> list[float]:
    """Cosine of the best right image of each text that has one among its first ten."""
    found = []
    for i in range(len(text)):
        scores = image @ text[i]
        first = np.argsort(-scores, kind="stable")[:10]
        if (objects[first] == objects[i]).any():
            found.append(float(scores[objects == objects[i]].max()))
    return sorted(found)


def test_all_but_a_share_of_the_right_images_that_are_found_lie_above() -> None:
    text, queries, image, objects = split()
    expected = by_hand(text, image, objects)
    assert 100 < len(expected) < len(text), "some are not found"
    chosen = choose_close_match(text, queries, image, objects)
    assert chosen is not None
    below = sum(cosine < chosen["cosine"] - 1e-6 for cosine in expected)
    assert chosen["n_queries"] == len(expected) and chosen["missed"] == below / len(expected)
    assert below == int(0.05 * len(expected))
    assert chosen["cosine"] == pytest.approx(expected[below], abs=1e-6)


def test_images_of_others_change_nothing_as_long_as_right_ones_are_found() -> None:
    text, queries, image, objects = split()
    keep = np.array([i for i in range(len(text)) if np.argmax(image @ text[i]) // 2 == objects[i]])
    asked = Queries(queries.texts, keep, queries.kinds[keep], objects[keep], keep)
    others = np.repeat(image[::20], 2, axis=0)  # the first result stays an own one: it comes before its equals
    larger = np.concatenate([image, others]), np.concatenate([objects, np.full(len(others), 999)])
    assert choose_close_match(text, asked, *larger) == choose_close_match(text, asked, image, objects)


def test_few_captions_decide_nothing() -> None:
    text, queries, image, objects = split(objects=close_match.FEWEST // 2 - 1)
    assert choose_close_match(text, queries, image, objects) is None
