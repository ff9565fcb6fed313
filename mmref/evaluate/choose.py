"""Which refinement a config's grid, val features and references ask for; the same in training and in the final report."""

from __future__ import annotations

from typing import Any

import numpy as np

from mmref.config import Config
from mmref.evaluate.features import Floats, Queries
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings, choose_refinement, refinement_grid
from mmref.evaluate.shares import ALONE, QueryShare
from mmref.run.row_file import References, are_set

GRID = ("refine_kinds", "refine_weights", "refine_top_rs", "refine_taus", "top_p")
"""Fields of `eval` that say which settings are tried. Scores after refinement compare only where they agree."""


def trained_space(config: Config, references: References) -> ReferenceSpace | None:
    """The references (m, K, d) that training has set, None for a run that trains none (align-only)."""
    if not config.loss.uses_references:
        return None
    seen = are_set(references)
    return ReferenceSpace(references, seen) if seen.any() else None


def settings_of(metrics: dict[str, Any]) -> RefinementSettings:
    """The refinement of metrics.json."""
    return RefinementSettings(**{k: metrics["refinement"][k] for k in ("kind", "weight", "top_r", "tau", "top_p")})


def config_grid(config: Config) -> list[RefinementSettings]:
    """The settings that the fields of GRID ask for."""
    kinds, weights, top_rs, taus, top_p = (getattr(config.eval, name) for name in GRID)
    return refinement_grid(kinds, weights, top_rs, taus, (top_p or None,))


def gain_by_value(tried: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What the best setting with each value of kind, weight, top_r and tau adds to no refinement: {"weight": {"0.1": 0.8}, ...},
    in points of the objective.

    tried: of `choose_on_val`, the first row without refinement.
    """
    found: dict[str, dict[str, float]] = {}
    for row in tried[1:]:
        gain = row["objective"] - tried[0]["objective"]
        for name in ("kind", "weight", *(("top_r", "tau") if row["kind"] != "dense" else ())):
            values = found.setdefault(name, {})
            values[str(row[name])] = max(gain, values.get(str(row[name]), gain))
    return found


def choose_on_val(
    config: Config,
    space: ReferenceSpace | None,
    text: Floats,
    queries: Queries,
    image: Floats,
    objects: np.ndarray,
    chunk: int = 512,
    share: QueryShare = ALONE,
) -> tuple[RefinementSettings, list[dict[str, Any]]]:
    """The best refinement of the config's grid on val, and a row for each setting tried.

    Args:
        text: (t, d) features of the distinct texts `queries.texts`.
        image: (g, d) features of the gallery, with their `objects` (g,).
        chunk, share: as in `choose_refinement`.
    """
    if space is None:
        return RefinementSettings(weight=0.0), []
    # The same words for the same object rank alike: score each pair of text and object once, as the report does.
    pairs, counted = np.unique(np.stack([queries.text, queries.objects], 1), axis=0, return_inverse=True)
    return choose_refinement(
        space, text[pairs[:, 0]], image, pairs[:, 1], objects, config_grid(config), config.eval.metric,
        chunk=chunk, counted=counted.reshape(-1), share=share,
    )  # fmt: skip
