"""How a model ranks what people have judged, before and after a training from judgements: by sentence, with intervals.

Only judged items are compared with each other, since nobody has looked at the rest; where the right ones stand among all the
items of a gallery is told beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmref.evaluate.bootstrap import resampled
from mmref.evaluate.report import rendered

MEASURES = ("pairs", "precision", "rank")
"""`pairs`: percent of a sentence's pairs of a right and a wrong item in which the right one scores higher, a tie counts half.
`precision`: percent of right ones among as many of its first judged items as are right. Both are of sentences that have right
and wrong items. `rank`: mean place of its right items in the gallery, from 1."""
FILE = "judgements.json"  # of a run


@dataclass(frozen=True)
class JudgedQuery:
    """A sentence, by its row, with the gallery rows of what was judged right and wrong for it."""

    query: int
    right: NDArray[np.int64]
    wrong: NDArray[np.int64]


def measure(scores: NDArray[np.float32], judged: Sequence[JudgedQuery]) -> NDArray[np.float64]:
    """MEASURES of each judged sentence, (n, 3); NaN where one says nothing.

    Args:
        scores: (q, g) of each sentence with each item of the gallery, higher is better. Of equal scores the lower row is first.
    """
    found = np.full((len(judged), len(MEASURES)), np.nan)
    for i, of in enumerate(judged):
        own = scores[of.query]
        if not len(of.right):
            continue
        order = np.argsort(-own, kind="stable")
        places = np.empty(len(own))
        places[order] = np.arange(1, len(own) + 1)
        found[i, 2] = places[of.right].mean()
        if not len(of.wrong):
            continue
        right, wrong = own[of.right][:, None], own[of.wrong][None]
        found[i, 0] = 100 * ((right > wrong) + (right == wrong) / 2).mean()
        first = np.sort(np.concatenate([places[of.right], places[of.wrong]]))[: len(of.right)]
        found[i, 1] = 100 * np.isin(places[of.right], first).mean()
    return found


def compared(before: NDArray[np.float64], after: NDArray[np.float64], n: int = 1000, seed: int = 0) -> dict[str, dict[str, Any]]:
    """{measure: {"queries", "before", "after", "change": {"mean", "ci95"}}} of `measure` of the same sentences twice.

    The 95 % intervals are by bootstrap over sentences; before and after share every replicate. A measure that no sentence has
    is left out.
    """
    found = {}
    for name, old, new in zip(MEASURES, before.T, after.T):
        said = ~np.isnan(old)
        if not said.any():
            continue
        columns = np.stack([old[said], new[said], new[said] - old[said]], 1)
        means, intervals = columns.mean(0), resampled(columns, n, seed)
        parts = [{"mean": float(mean), "ci95": interval} for mean, interval in zip(means, intervals)]
        found[name] = {"queries": int(said.sum()), **dict(zip(("before", "after", "change"), parts))}
    return found


def section(judged: Mapping[str, Any]) -> str:
    """The section of a report on what `judgements.json` holds."""
    return rendered("judgements.html.j2", judged=judged, names=LABELS)


LABELS = {
    "pairs": "right above wrong, % of pairs",
    "precision": "precision of the first judged, %",
    "rank": "place of the right ones",
}


def format_judged(judged: Mapping[str, Any]) -> str:
    """The same as aligned plain text."""
    lines = [
        f"held-out judgements: {judged['held_out']['judgements']:,} of {judged['held_out']['queries']:,} sentences, among "
        f"{judged['gallery']:,} images",
        f"{'':<34}{'before':>9}{'after':>9}{'change':>9}   95 % interval",
    ]
    for name, label in LABELS.items():
        if name not in judged["refined"]:
            continue
        row = judged["refined"][name]
        before, after, change = (row[part]["mean"] for part in ("before", "after", "change"))
        low, high = row["change"]["ci95"]
        lines.append(f"{label:<34}{before:>9.1f}{after:>9.1f}{change:>+9.1f}   {low:+.1f} to {high:+.1f}")
    return "\n".join(lines)
