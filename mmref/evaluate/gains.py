"""Why refinement moved a result: the part of its gain that each reference gave."""

from __future__ import annotations

import numpy as np

from mmref.evaluate.features import Floats
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings


def gains(
    space: ReferenceSpace,
    settings: RefinementSettings,
    query: Floats,
    items: Floats,
    query_mean: Floats | None = None,
    item_mean: Floats | None = None,
) -> Floats:
    """What each reference's object adds to the scores of items: (n, m).

    Their sum over the m objects is the gain of an item (`refine`), up to the constant weight / 2 that every item gets from
    codes which are not sparse.

    Args:
        query: (d,) feature of a query, L2-normalised.
        items: (n, d) features of items.
        query_mean, item_mean: for dense codes, the mean similarities (m,) of all queries and of all items.
    """
    n = min(settings.top_r, space.n_objects)
    if settings.kind == "dense":
        asked = space.similarities(query[None])[0] - query_mean
        found = space.similarities(items) - item_mean
        norms = np.linalg.norm(asked) * np.linalg.norm(found, axis=1, keepdims=True)
        return settings.weight / 2 * (found * asked) / np.maximum(norms, 1e-12)
    code = space.sparse_codes(*space.nearest(query[None], n), settings.tau)
    if settings.kind == "sparse":
        codes = space.sparse_codes(*space.nearest(items, n), settings.tau)
        return np.asarray(settings.weight * codes.multiply(code).toarray(), np.float32)
    weights = np.asarray(code.toarray()[0], np.float32)
    length = max(float(np.linalg.norm(weights @ space.centres)), 1e-12)
    return settings.weight / 2 * weights * (items @ space.centres.T) / length
