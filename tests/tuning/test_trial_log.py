"""The log of a sweep: what it tells after any interruption, and how trials are compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmref.run.directory import RunDir
from mmref.tuning.trial_log import LOG, Trial, TrialLog, best_of, median_step_seconds, pareto_front, ranked


def evaluation(step: int, score: float, weight: float = 0.0) -> dict:
    return {"step": step, "score": score, "val_refine_kind": "sparse", "val_refine_weight": weight}


def test_the_log_is_read_back_as_it_was(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path))
    log = TrialLog(run)
    for number in (0, 1, 2):
        log.begin(number, {"loss.w_guide": number / 4})
        log.start(number)
    for step, score in ((2, 5.0), (4, 9.0), (6, 8.0)):
        assert log.result(0, evaluation(step, score, 0.4))
    log.result(1, evaluation(2, 1.0))
    log.end(0, "finished", 0.5)
    log.end(2, "failed", None, "NonFiniteLossError: the loss of step 3")
    with (tmp_path / LOG).open("a") as file:
        file.write('{"trial": 1, "step": 4, "sco')  # killed while it wrote
    found = TrialLog(run).trials
    assert found == log.trials
    assert (found[0].score, found[0].best["step"], found[0].steps) == (9.0, 4, 6)
    assert found[0].refinement == {"kind": "sparse", "weight": 0.4} and found[1].refinement == {"weight": 0.0}
    assert [t.running for t in found.values()] == [False, True, False] and found[2].error.startswith("NonFinite")


def test_a_trial_that_starts_again_adds_only_what_is_new(tmp_path: Path) -> None:
    log = TrialLog(RunDir(str(tmp_path)))
    log.begin(0, {})
    assert log.result(0, evaluation(2, 5.0)) and log.result(0, evaluation(4, 6.0))
    log.interrupt()
    again = TrialLog(RunDir(str(tmp_path)))
    assert log.trials[0].status == "interrupted" and again.trials[0].running
    again.start(0)
    assert not again.result(0, evaluation(2, 5.0)) and not again.result(0, evaluation(4, 6.0))
    assert again.result(0, evaluation(6, 7.0)) and [r["step"] for r in again.trials[0].results] == [2, 4, 6]


def test_seconds_go_on_over_starts(tmp_path: Path) -> None:
    log = TrialLog(RunDir(str(tmp_path)))
    log.begin(0, {})
    log.trials[0].seconds = 100.0
    log.start(0)
    log.result(0, evaluation(2, 1.0))
    assert 100.0 <= log.trials[0].seconds < 160


def trial(number: int, score: float | None, status: str = "finished", seconds: float | None = None) -> Trial:
    results = [] if score is None else [evaluation(2, score)]
    return Trial(number, {}, status, results, step_seconds=seconds)


def test_a_failed_trial_is_never_the_best() -> None:
    trials = [trial(0, None), trial(1, 20.0, "failed"), trial(2, 9.0), trial(3, 9.0), trial(4, 3.0, "stopped-early")]
    best = best_of(trials)
    assert best is not None and best.number == 2, "the earlier one on a tie"
    assert [t.number for t in ranked(trials)] == [2, 3, 4, 0, 1]
    assert best_of([trial(0, None), trial(1, 1.0, "failed")]) is None


def test_the_pareto_front_against_every_pair() -> None:
    values = [(5.0, 1.0), (7.0, 2.0), (6.0, 2.0), (7.0, 3.0), (9.0, 3.0), (4.0, 0.5), (5.0, 1.0)]
    trials = [trial(n, score, seconds=seconds) for n, (score, seconds) in enumerate(values)]
    trials += [trial(7, 99.0, "stopped-early", 0.1), trial(8, 99.0, "failed", 0.1), trial(9, 99.0)]

    def beaten(own: tuple[float, float]) -> bool:
        return any(s >= own[0] and t <= own[1] and (s, t) != own for s, t in values)

    assert {values[t.number] for t in pareto_front(trials)} == {v for v in values if not beaten(v)}
    assert [t.number for t in pareto_front(trials)] == [5, 0, 1, 4]


@pytest.mark.parametrize(("times", "median"), [([], None), ([9.0], 9.0), ([9.0, 1.0, 3.0, 2.0], 2.0)])
def test_the_first_log_line_holds_the_warm_up(times: list[float], median: float | None, tmp_path: Path) -> None:
    lines = "".join(f'{{"step": {i}, "step_seconds": {t}}}\n' for i, t in enumerate(times))
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert median_step_seconds(RunDir(str(tmp_path))) == median
