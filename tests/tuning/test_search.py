"""What trials try: proposals from the log alone, the same after any interruption."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mmref.errors import ConfigError
from mmref.run.directory import RunDir
from mmref.tuning.search import Numbered, proposer, study
from mmref.tuning.space import Parameter, Space
from mmref.tuning.trial_log import Trial, TrialLog

SPACE = Space(
    (
        Parameter("loss.w_guide", "uniform", low=0.0, high=1.0),
        Parameter("train.lr", "loguniform", low=1e-4, high=1e-2),
        Parameter("reference.per_object", "choice", (1, 2, 4)),
        Parameter("reference.memory_tokens", "int", low=1, high=3),
    )
)
FIRST = {"loss.w_guide": 0.5, "train.lr": 1e-3, "reference.per_object": 1, "reference.memory_tokens": 2}


def run_search(searcher: str, count: int, pareto: bool = False, seed: int = 0) -> list[Trial]:
    """Trials one after the other; w_guide near 0.8 is good, a low rate is fast."""
    propose = proposer(SPACE, searcher, seed, FIRST, pareto, count)
    trials: list[Trial] = []
    for number in range(count):
        values = propose(number, trials)
        score = 10 - abs(values["loss.w_guide"] - 0.8)
        trials.append(Trial(number, values, "finished", [{"step": 9, "score": score}], step_seconds=values["train.lr"]))
    return trials


@pytest.mark.parametrize("searcher", ["optuna", "random"])
def test_values_lie_in_the_space_and_never_repeat(searcher: str) -> None:
    trials = run_search(searcher, 25)
    assert trials[0].values == FIRST
    for t in trials:
        v = t.values
        assert {type(value) for value in v.values()} <= {int, float}, "plain numbers, which YAML can write"
        assert 0 <= v["loss.w_guide"] <= 1 and 1e-4 <= v["train.lr"] <= 1e-2
        assert v["reference.per_object"] in (1, 2, 4) and v["reference.memory_tokens"] in (1, 2, 3)
    assert len({t.values["loss.w_guide"] for t in trials}) == 25
    assert {t.values["reference.memory_tokens"] for t in trials} == {1, 2, 3}


@pytest.mark.parametrize("searcher", ["optuna", "random"])
def test_a_proposal_depends_on_the_log_alone(searcher: str) -> None:
    trials = run_search(searcher, 14)
    again = proposer(SPACE, searcher, 0, FIRST, False, 14)  # as after a restart
    for number in (3, 13):
        assert again(number, trials[:number]) == trials[number].values
    assert run_search(searcher, 3, seed=1)[2].values != trials[2].values


def test_optuna_learns_from_the_trials_before() -> None:
    def miss(trials: list[Trial]) -> float:
        later = trials[20:]
        return sum(abs(t.values["loss.w_guide"] - 0.8) for t in later) / len(later)

    assert miss(run_search("optuna", 40)) < 0.6 * miss(run_search("random", 40))


def test_pareto_searches_for_fast_steps_too() -> None:
    def rate(trials: list[Trial]) -> float:
        later = trials[20:]
        return sum(math.log10(t.values["train.lr"]) for t in later) / len(later)

    assert rate(run_search("optuna", 40, pareto=True)) < rate(run_search("optuna", 40)) - 0.2


def test_the_grid_is_every_combination_once() -> None:
    space = Space(SPACE.parameters[2:])
    propose = proposer(space, "grid", 0, None, False, 9)
    found = [tuple(propose(n, []).values()) for n in range(9)]
    assert sorted(found) == sorted((k, m) for k in (1, 2, 4) for m in (1, 2, 3))
    with pytest.raises(ConfigError, match=r"int of at most 10,000 values; loss\.w_guide, train\.lr are ranges"):
        proposer(SPACE, "grid", 0, None, False, 9)


def test_random_shares_cover_ranges_evenly() -> None:
    rate, number = SPACE.parameters[1], SPACE.parameters[3]
    assert rate.at(0.5) == pytest.approx(1e-3), "the middle of a logarithmic range"
    assert [number.at(s) for s in (0.0, 0.33, 0.34, 0.66, 0.67, 0.999)] == [1, 1, 2, 2, 3, 3]


def test_how_trials_ended_is_how_optuna_sees_them() -> None:
    results = [{"step": 2, "score": 4.0}]
    states = [
        Trial(0, FIRST, "finished", results),
        Trial(1, FIRST, "stopped-early", results),
        Trial(2, FIRST, "failed", results),
        Trial(3, FIRST, "running", results),
        Trial(4, FIRST, "interrupted", []),
        Trial(5, FIRST, "finished", []),
    ]
    found = study(SPACE, states).trials
    assert [t.state.name for t in found] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "RUNNING", "FAIL"]
    assert found[1].intermediate_values == {2: 4.0}, "not compared with scores of later steps"


def test_trials_are_handed_out_by_number_the_interrupted_first(tmp_path: Path) -> None:
    log = TrialLog(RunDir(str(tmp_path)))
    for number in (0, 1, 3):
        log.begin(number, {"loss.w_guide": number / 10})
    log.end(0, "finished", None)
    asked: list[tuple[int, list[int]]] = []

    def propose(number: int, before: list[Trial]) -> dict[str, Any]:
        asked.append((number, [t.number for t in before]))
        return {"loss.w_guide": 0.9}

    searcher = Numbered(log, propose, 5)
    handed = [searcher.suggest(f"id{i}") for i in range(5)]
    assert [h["number"] for h in handed[:4]] == [1, 3, 2, 4] and handed[4] == "FINISHED"
    assert handed[0]["values"] == {"loss.w_guide": 0.1}, "an interrupted trial keeps its values"
    assert asked == [(2, [0, 1, 3]), (4, [0, 1, 2, 3])]
    assert set(TrialLog(RunDir(str(tmp_path))).trials) == {0, 1, 2, 3, 4}, "noted before they start"
