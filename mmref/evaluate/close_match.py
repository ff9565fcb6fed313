"""How alike a sentence and its image are, as a rule: below that a search says that nothing is close.

A search always has a first result. On val it is known which image is right, so that the cosines of right ones can be looked
at. They do not depend on what else is in a gallery, as ranks and the best cosine do, so what is found here holds for an index
of any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmref.evaluate.features import Floats, Queries
from mmref.evaluate.metrics import RECALL_AT, evaluate_features, same_object

MISSED = 0.05  # share of right images that are found and yet called not close
FEWEST = 40  # captions with a right image that is found: of fewer that share would be decided by one or two


def choose_close_match(text: Floats, queries: Queries, image: Floats, objects: np.ndarray) -> dict[str, Any] | None:
    """The cosine that the best right image of a caption reaches in all but `MISSED` of the cases in which it is among the first
    ten; None where fewer than `FEWEST` captions have theirs there.

    Args:
        text: (t, d) features of the distinct texts `queries.texts`.
        image: (g, d) features of the gallery, with their `objects` (g,).

    Returns:
        {"cosine", "missed": the share of found ones below it, "n_queries": captions found}.
    """
    # The same words for the same object are one question.
    pairs = np.unique(np.stack([queries.text, queries.objects], 1), axis=0)
    features, wanted = text[pairs[:, 0]], pairs[:, 1]
    ranked = evaluate_features(features, image, wanted, objects)
    offsets, columns = same_object(wanted, objects)
    rows = np.repeat(np.arange(len(pairs)), np.diff(offsets))
    right = np.full(len(pairs), -np.inf, np.float32)
    np.maximum.at(right, rows, np.einsum("nd,nd->n", features[rows], image[columns]))
    found = np.sort(right[ranked.valid & (ranked.first_rank <= RECALL_AT[-1])])
    if len(found) < FEWEST:
        return None
    cosine = float(found[int(MISSED * len(found))])
    return {"cosine": cosine, "missed": float((found < cosine).mean()), "n_queries": len(found)}
