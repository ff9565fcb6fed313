"""sweep.html of made-up trials: what it shows, and that it loads nothing."""

from __future__ import annotations

import re

from mmref.config import Config
from mmref.tuning.results import short_names
from mmref.tuning.search import proposer
from mmref.tuning.space import Parameter, Space
from mmref.tuning.sweep_figures import importances
from mmref.tuning.sweep_report import render_sweep
from mmref.tuning.trial_log import Trial

SPACE = Space(
    (
        Parameter("loss.w_guide", "uniform", low=0.0, high=1.0),
        Parameter("loss.tau", "loguniform", low=0.02, high=0.2),
        Parameter("reference.tau", "loguniform", low=0.02, high=0.2),
        Parameter("reference.per_object", "choice", (1, 2, 4)),
        Parameter("train.lr", "loguniform", low=1e-4, high=1e-2),
    )
)


def made_up(count: int) -> list[Trial]:
    """Trials whose score is w_guide's doing alone; every third is stopped at step 20, the second fails."""
    propose = proposer(SPACE, "random", 0, SPACE.default_point(Config()), False, count)
    trials = []
    for n in range(count):
        trial = Trial(n, propose(n, []), "stopped-early" if n % 3 == 2 else "finished", seconds=9.0, step_seconds=1 + n)
        for step in (20,) if n % 3 == 2 else (20, 40):
            score = 50 * trial.values["loss.w_guide"] + step
            best = {
                "val_R@1": score / 2,
                "val_mAP": score / 3,
                "val_refined_R@1": score / 2 + 1,
                "val_refined_mAP": score / 3,
            }
            gain = {
                "weight": {"0.1": 1.0, "0.2": 0.5 * n, "1.5": -2.0},
                "kind": {"sparse": 1.0},
                "top_r": {"16": 1.0, "8": 0.5},
            }
            found = {"val_refine_kind": "sparse", "val_refine_weight": 0.1 * (1 + n % 2), "val_refine_gain": gain}
            trial.results.append({"step": step, "score": score, **best, **found})
        trials.append(trial)
    if count > 1:
        trials[1].status, trials[1].error = "failed", "NonFiniteLossError: the loss of <step> 3"
    return trials


def row(name: str, mean: float, delta: float | None = None) -> dict:
    def interval(value: float) -> dict:
        return {"mean": value, "ci95": [value - 0.5, value + 0.5]}

    found = {"name": name, "seeds": [1, 2, 3], "R@1": interval(mean), "mAP": interval(mean - 5)}
    return found if delta is None else found | {"delta_R@1": interval(delta), "delta_mAP": interval(-delta)}


def test_everything_is_on_the_page_and_nothing_is_loaded() -> None:
    html = render_sweep(made_up(24), SPACE, Config(), "Sweep", [row("default", 40.0), row("best", 42.0, 2.0)])
    assert html.count("<svg") == 6 + 4, (
        "history, curves, front, importances, refinement, parallel; three groups of slices and the refinement's"
    )
    for text in ("stopped (8)", "PED-ANOVA", "All fields at once", "References", "Loss weights and temperatures", "Other fields",
                 "the loss of &lt;step&gt; 3", "+2.0", "-2.0", "39.5 to 40.5", "the config itself",
                 "refinement weight", "refinement top_r"):  # fmt: skip
        assert text in html, text
    assert "refinement kind" not in html, "a single value is no slice"
    assert html.index(">8<") < html.index(">16<"), "numbers by size"
    assert not re.search(r"https?://|@import|<script|url\((?!#)", html)


def test_a_page_of_hardly_anything() -> None:
    for trials in ([], made_up(1), made_up(2)):
        html = render_sweep(trials, SPACE, Config(), "Sweep")
        assert "Importances need" in html and "On test" not in html
    assert "nothing to compare" in render_sweep(made_up(3), SPACE, Config(), "Sweep", [])


def test_importances_name_the_field_that_matters() -> None:
    sound = [t for t in made_up(40) if t.status != "failed" and t.status != "stopped-early"]
    found = importances(SPACE, sound)
    assert found is not None and max(found, key=lambda name: found[name]) == "loss.w_guide"
    assert found["loss.w_guide"] > 0.5 and importances(SPACE, sound[:7]) is None


def test_short_names_stay_apart() -> None:
    assert short_names(["loss.tau", "reference.tau", "loss.w_rec"]) == ["loss.tau", "reference.tau", "w_rec"]
