"""The answer of a sweep on test: its best config beside the one it started from, each trained in full with fresh seeds."""

from __future__ import annotations

from typing import Any

from mmref.config import Config
from mmref.config.inputs import settled
from mmref.tuning.ablate import ablate
from mmref.tuning.ablation_table import markdown
from mmref.tuning.rows import Row, Rows
from mmref.tuning.space import REFINEMENT, get_value, with_values
from mmref.tuning.trial_log import Trial

FOLDER = "final"


def compare(own: Config, prepared: Config, best: Trial, seeds: int, max_concurrent: int | None) -> list[dict[str, Any]]:
    """Train both, evaluate each once on test, print the table and return its rows (`ablation.summarise`).

    No trial has used these seeds, and nothing was chosen on test. What is there already is not trained again.

    Args:
        own: the config the sweep was asked to vary, as it was given but with the sweep's `run_dir`: the default.
        prepared: the one its trials have, with the space's refinement grid searched in training.
        best: the best trial. Nothing is trained where its values are the config's own.
        seeds: fresh seeds of each.
    """
    if all(get_value(settled(own), name) == value for name, value in best.values.items()):
        print("the best trial is the config itself: there is nothing to compare", flush=True)
        return []
    searched = ["eval.refine_in_training", *REFINEMENT.values()]
    values = {**best.values, **{name: get_value(prepared, name) for name in searched}}
    name = f"best, trial {best.number}"  # a longer sweep may end with another best, beside it in the folder
    rows = Rows(
        (
            Row("default", refined=True),
            Row(name, values, refined=True),
            Row("default, not refined", of="default"),
            Row(f"{name}, not refined", of=name, against="default, not refined"),
        ),
        "default",
    )
    fresh = [own.train.seed + 1 + i for i in range(seeds)]
    table = ablate(with_values(own, {"run_dir": f"{own.run_dir}/{FOLDER}"}), rows, fresh, max_concurrent=max_concurrent)
    print(f"on test, {seeds} fresh seeds:\n{markdown(table, rows.baseline)}", flush=True)
    return table
