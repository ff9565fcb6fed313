"""The answer of a sweep on test: its best config beside the one it started from, each trained in full with fresh seeds."""

from __future__ import annotations

from typing import Any

from mmref.config import Config
from tune.ablate import ablate
from tune.ablation import markdown
from tune.rows import Row, Rows
from tune.space import get_value, with_values

FOLDER = "final"


def compare(base: Config, values: dict[str, Any], seeds: int, max_concurrent: int | None) -> list[dict[str, Any]]:
    """Train both, evaluate each once on test, print the table and return its rows (`ablation.summarise`).

    No trial has used these seeds, and nothing was chosen on test. What is there already is not trained again.

    Args:
        base: the config of the sweep, its `run_dir` the sweep's.
        values: of the best trial, dotted config fields. Nothing is trained where they are the config's own.
        seeds: fresh seeds of each.
    """
    if all(get_value(base, name) == value for name, value in values.items()):
        print("the best trial is the config itself: there is nothing to compare", flush=True)
        return []
    rows = Rows(
        (
            Row("default", refined=True),
            Row("best", dict(values), refined=True),
            Row("default, not refined", of="default"),
            Row("best, not refined", of="best", against="default, not refined"),
        ),
        "default",
    )
    fresh = [base.train.seed + 1 + i for i in range(seeds)]
    base = with_values(base, {"run_dir": f"{base.run_dir}/{FOLDER}"})
    table = ablate(base, rows, fresh, max_concurrent=max_concurrent)
    print(f"on test, {seeds} fresh seeds:\n{markdown(table, rows.baseline)}", flush=True)
    return table
