"""Reed's protocol against the protocol written out."""

from __future__ import annotations

import numpy as np
import pytest

from mmref.errors import EvaluationError
from mmref.evaluate.class_protocol import TOP, class_metrics, class_queries
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings, refined_scores


def features(seed: int, n: int, dim: int = 6) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_against_the_protocol_in_plain_python():
    rng = np.random.default_rng(0)
    text, text_objects = features(1, 90), rng.integers(0, 5, 90) * 3
    image, image_objects = features(2, 300), rng.integers(0, 5, 300) * 3
    queries, classes = class_queries(text, text_objects)
    found = class_metrics(queries, classes, image, image_objects)
    precisions, accuracies, means = [], [], {}
    for c in sorted(set(text_objects.tolist())):
        mean = sum(t for t, o in zip(text, text_objects) if o == c)
        means[c] = mean / np.sqrt((mean**2).sum())
        best = sorted(range(300), key=lambda i: -float(means[c] @ image[i]))[:TOP]
        precisions.append(sum(image_objects[i] == c for i in best) / TOP)
    for c in means:
        mine = [i for i in range(300) if image_objects[i] == c]
        accuracies.append(np.mean([max(means, key=lambda k: float(means[k] @ image[i])) == c for i in mine]))
    assert found["AP@50"] == pytest.approx(100 * np.mean(precisions))
    assert found["image top-1"] == pytest.approx(100 * np.mean(accuracies))


def test_refinement_changes_the_scores_and_classes_without_images_do_not_count():
    text, image = np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)[[0, 0, 1]]
    queries, classes = class_queries(text, np.arange(4))
    plain = class_metrics(queries, classes, image, np.array([0, 0, 1]))
    assert plain == {"AP@50": pytest.approx(50.0), "image top-1": 100.0}  # 2 of 3 and 1 of 3 images
    turned = class_metrics(queries, classes, image, np.array([0, 0, 1]), lambda rows, scores: -scores)
    assert turned["image top-1"] == 0.0


def test_candidates_bound_the_images_of_a_class_and_not_the_classes_of_an_image():
    image, text, references = features(2, 300), features(1, 90), features(3, 12)
    text_objects, image_objects = np.arange(90) % 5, np.arange(300) % 5
    queries, classes = class_queries(text, text_objects)
    found = {}
    for top_p in (None, 60):
        fn = refined_scores(ReferenceSpace(references), RefinementSettings(weight=2.0, top_p=top_p), queries, image)
        found[top_p] = fn, class_metrics(queries, classes, image, image_objects, fn)
    both = class_metrics(queries, classes, image, image_objects, found[60][0], found[None][0])
    assert both["image top-1"] == found[None][1]["image top-1"] != found[60][1]["image top-1"]
    assert both["AP@50"] == found[60][1]["AP@50"]


def test_nothing_in_common():
    queries, classes = class_queries(np.eye(2, dtype=np.float32), np.array([0, 1]))
    with pytest.raises(EvaluationError, match="no class"):
        class_metrics(queries, classes, np.eye(2, dtype=np.float32), np.array([7, 8]))
