"""The parts of a gain add up to what refinement added."""

from __future__ import annotations

import numpy as np
import pytest

from mmref.evaluate.gains import gains
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings, refined_scores


def unit(rng, *shape):
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("per_object", [1, 3])
@pytest.mark.parametrize("kind", ["sparse", "dense", "expansion"])
@pytest.mark.parametrize("objects", [6, 40])
def test_parts_add_up_to_the_gain(kind, per_object, objects):
    rng = np.random.default_rng(0)
    space = ReferenceSpace(unit(rng, objects, per_object, 12))
    queries, images = unit(rng, 7, 12), unit(rng, 9, 12)
    settings = RefinementSettings(kind, weight=0.4, top_r=5, tau=0.1)
    initial = queries @ images.T
    gain = refined_scores(space, settings, queries, images)(slice(None), initial.copy()) - initial
    means = (space.similarities(queries).mean(0), space.similarities(images).mean(0)) if kind == "dense" else ()
    constant = 0.0 if kind == "sparse" else settings.weight / 2
    for q in range(len(queries)):
        parts = gains(space, settings, queries[q], images, *means)
        assert parts.shape == (9, objects)
        np.testing.assert_allclose(parts.sum(1) + constant, gain[q], atol=1e-5)


def test_only_shared_references_give_anything_to_sparse_codes():
    references = np.eye(4, dtype=np.float32)
    query = np.array([0.8, 0.6, 0, 0], np.float32)
    items = np.array([[0.9, 0, np.sqrt(0.19), 0], [0, 0, 0.6, 0.8]], np.float32)
    settings = RefinementSettings("sparse", weight=0.5, top_r=2, tau=0.5)
    parts = gains(ReferenceSpace(references), settings, query, items)
    assert (parts > 0).tolist() == [[True, False, False, False], [False] * 4]
