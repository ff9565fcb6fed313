"""The protocol of Reed et al. (CVPR 2016) for sets whose objects are classes: a class is described by all of its captions.

A class's query is the mean of its captions' features. Text to image: AP@50, the share of the class among its 50
best-scored images, averaged over classes. Image to text: top-1 accuracy, the share of a class's images whose
best-scored query is that class's, averaged over classes. Ties go to the lower index.
"""

from typing import Any

import numpy as np

from mmref.errors import EvaluationError
from mmref.evaluate.metrics import ScoreFn

TOP = 50


def class_queries(text: np.ndarray, text_objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean feature of each class's captions, normalised (c, d), and the classes (c,), ascending.

    Args:
        text: (q, d) L2-normalised features, one row a caption (repeats count).
        text_objects: (q,) class of each.
    """
    classes, of = np.unique(text_objects, return_inverse=True)
    sums = np.zeros((len(classes), text.shape[1]), dtype=np.float64)
    np.add.at(sums, of, text)
    means = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return means.astype(np.float32), classes


def class_metrics(
    queries: np.ndarray,
    classes: np.ndarray,
    image: np.ndarray,
    image_objects: np.ndarray,
    score_fn: ScoreFn | None = None,
    score_classes: ScoreFn | None = None,
) -> dict[str, Any]:
    """{"AP@50": percent, "image top-1": percent}; classes without an image count in neither.

    Args:
        queries, classes: of `class_queries`.
        image: (g, d) L2-normalised features, with their classes (g,).
        score_fn: refines the scores of the queries, as in `metrics.evaluate_features`.
        score_classes: the same for the direction of images, where every class is a candidate; by default `score_fn`.
    Raises:
        EvaluationError: no class has both captions and images.
    """
    with_images = np.isin(classes, image_objects)
    if not with_images.any():
        raise EvaluationError("no class has captions and images: check that both come from one split.")
    initial, every = queries @ image.T, slice(0, len(queries))  # (c, g)
    scores = initial if score_fn is None else score_fn(every, initial.copy())
    of_images = scores if score_classes is None else score_classes(every, initial)
    hit = classes[:, None] == image_objects[None, :]
    best = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    precision = np.take_along_axis(hit, best, axis=1).mean(1)
    right = classes[of_images.argmax(0)] == image_objects  # (g,)
    accuracy = [right[image_objects == c].mean() for c in classes[with_images]]
    return {f"AP@{TOP}": 100 * float(precision[with_images].mean()), "image top-1": 100 * float(np.mean(accuracy))}
