"""The comparison on test at the end of a sweep: what is trained, and when there is nothing to train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmref.config import Config
from mmref.tuning import final
from mmref.tuning.rows import Rows
from mmref.tuning.space import with_values
from mmref.tuning.trial_log import Trial


def test_both_configs_are_trained_with_seeds_no_trial_used(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(final, "ablate", lambda *given, **named: asked.append((*given, named)) or [{"name": "default"}])
    monkeypatch.setattr(final, "markdown", lambda table, baseline: f"the table over {baseline}")
    base = make_config({"run_dir": "/sweep", "train.seed": 4, "train.max_steps": 90})
    searched = {"eval.refine_weights": [0.1, 0.9], "eval.refine_in_training": True}
    best = Trial(7, {"loss.w_guide": 0.9, "reference.per_object": 2})
    assert final.compare(base, with_values(base, searched), best, 3, 1) == [{"name": "default"}]
    config, rows, seeds, named = asked[0]
    assert (config.run_dir, seeds, named) == ("/sweep/final", [5, 6, 7], {"max_concurrent": 1})
    name = "best, trial 7"
    trained = {
        "default": rows.config(config, "default", None, 5, "/here"),
        "best": rows.config(config, name, None, 5, "/here"),
    }
    assert trained["default"].eval == base.eval, "the default is the config as it was given"
    assert trained["best"].eval.refine_weights == [0.1, 0.9] and trained["best"].eval.refine_in_training
    assert trained["default"].loss.w_guide == base.loss.w_guide and trained["default"].reference.per_object == 1
    assert trained["best"].loss.w_guide == 0.9 and trained["best"].reference.per_object == 2
    assert {c.train.max_steps for c in trained.values()} == {90}
    assert isinstance(rows, Rows) and rows.baseline == "default" and rows["default"].refined and rows[name].refined
    assert "the table over default" in capsys.readouterr().out


def test_there_is_nothing_to_compare_where_the_config_itself_is_the_best(make_config: Callable[..., Config]) -> None:
    base = make_config()
    assert final.compare(base, base, Trial(0, {"loss.w_guide": base.loss.w_guide}), 3, None) == []
