"""A sweep without training: what fits, what it refuses, how trials are recorded, and what it leaves."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.tiny_set import TinySource, build_tiny_set

from mmref.cluster.connection import connect
from mmref.config import AUTO, Config, dump_yaml, from_dict, load_config, to_dict
from mmref.config.inputs import BEFORE, PLAIN, settled
from mmref.data.shard_set import data_fingerprint
from mmref.errors import ClusterTooSmallError, ConfigError, RunDirectoryError, ShardSetError, SweepError
from mmref.run.directory import DATA, RunDir
from mmref.tuning import recorder as recorder_module
from mmref.tuning import sweep as sweep_module
from mmref.tuning import trial_run as trial_module
from mmref.tuning.asha import Asha, judged_at, share_of_steps
from mmref.tuning.command import tune_main as main
from mmref.tuning.display import Display
from mmref.tuning.options import Options, check_options
from mmref.tuning.recorder import Recorder
from mmref.tuning.results import format_trials
from mmref.tuning.space import Space, parse_space, read_space, with_values
from mmref.tuning.sweep import prepare, resume, sweep
from mmref.tuning.trial_log import Trial, TrialLog

SPACE = """
loss.w_guide: {type: uniform, low: 0.0, high: 1.0}
refinement.weight: {type: choice, values: [0.1, 0.4]}
"""


def read_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of trials.parquet."""
    return pq.read_table(run_dir / "trials.parquet").to_pylist()


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "my_space.yaml").write_text(SPACE)
    return read_space(str(tmp_path / "my_space.yaml"))


# --- what it refuses before Ray starts


def test_command_line_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean `loss\.w_guide`"):
        main(["--loss.w_gide", "1"])
    with pytest.raises(ConfigError, match="cannot be read"):
        main(["--space", str(tmp_path / "none.yaml"), "--config", "configs/smoke.yaml"])
    with pytest.raises(SystemExit):
        main(["--trials", "0"])


def test_a_directory_that_holds_a_sweep_is_left_alone(tmp_path: Path, space: Space, make_config: Callable[..., Config]) -> None:
    config = make_config({"run_dir": str(tmp_path / "sweep")})
    (tmp_path / "sweep").mkdir()
    log = TrialLog(RunDir(str(tmp_path / "sweep")))
    log.begin(0, {"loss.w_guide": 0.5})
    with pytest.raises(RunDirectoryError, match="holds a sweep already"):
        sweep(config, space, Options(trials=1))
    assert log.trials == TrialLog(RunDir(str(tmp_path / "sweep"))).trials
    with pytest.raises(RunDirectoryError, match="holds no sweep to go on with"):
        resume(str(tmp_path / "none"))


def test_a_sweep_that_did_not_fit_may_be_asked_for_again(
    tmp_path: Path, space: Space, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config({"run_dir": str(tmp_path / "sweep"), "train.workers": 8})
    for _ in range(2):
        with pytest.raises(ClusterTooSmallError, match=r"17\.1 CPUs and this machine offers"):
            sweep(config, space, Options(trials=1))
    log = TrialLog(RunDir(str(tmp_path / "sweep")))
    for number in (0, 1):
        log.begin(number, {"loss.w_guide": 0.5})
    with pytest.raises(ConfigError, match="fewer than the 2 that"):
        resume(str(tmp_path / "sweep"), trials=1)


def test_asha_needs_evaluations_as_often_as_it_judges(tmp_path: Path, space: Space, make_config: Callable[..., Config]) -> None:
    changed = {"train.max_steps": 80, "train.eval_every": 40, "loss.w_guide": 0.5, "loss.guide_full": 0.4}
    config = make_config({"run_dir": str(tmp_path / "sweep"), **changed})
    with pytest.raises(ConfigError, match=r"from step 32 on.*every 40 steps: set `--train\.eval_every` to at most 32"):
        sweep(config, space, Options(trials=1))  # guidance is full at 0.4 of the 80 steps
    with pytest.raises(ConfigError, match="from step 20 on"):
        sweep(with_values(config, {"loss.w_guide": 0.0}), space, Options(trials=1))
    prepare(config, space, Options(1, scheduler="none"), RunDir(config.run_dir))
    prepare(config, space, Options(1, grace_steps=40), RunDir(config.run_dir))
    by_default = with_values(config, {"train.eval_every": 0})  # a tenth of the 80 steps
    with pytest.raises(ConfigError, match=r"from step 5 on.*every 8 steps"):
        prepare(by_default, space, Options(1, grace_steps=5), RunDir(config.run_dir))
    prepare(by_default, space, Options(1, grace_steps=8), RunDir(config.run_dir))
    with pytest.raises(ConfigError, match=r"trials of 80 steps from step 12 on.*every 16 steps"):
        longer = with_values(by_default, {"train.eval_every": 16})
        prepare(longer, space, Options(1, grace_steps=12), RunDir(config.run_dir))


def test_trials_are_compared_on_the_same_shards(tmp_path: Path, space: Space, make_config: Callable[..., Config]) -> None:
    run = RunDir(str(tmp_path / "sweep"))
    config = make_config({"run_dir": run.path, "train.workers": 8})
    with pytest.raises(ClusterTooSmallError):
        sweep(config, space, Options(trials=1))
    assert run.read_text(DATA) == data_fingerprint(config)
    run.write_text(DATA, "0123456789ab")
    with pytest.raises(RunDirectoryError, match="trained on shards with the fingerprint 0123456789ab"):
        resume(run.path)


def test_without_test_there_is_no_comparison_at_the_end(tmp_path: Path, space: Space, make_config: Callable[..., Config]) -> None:
    class WithoutTest(TinySource):
        def objects(self):  # type: ignore[no-untyped-def]
            return (o for o in super().objects() if o.split != "test")

    config = make_config({"data.root": str(build_tiny_set(tmp_path / "set", WithoutTest("no-test")))})
    with pytest.raises(ShardSetError, match=r"no test split to compare .*add `--final-seeds 0`"):
        prepare(config, space, Options(1, scheduler="none", final_seeds=3), RunDir(str(tmp_path / "sweep")))
    prepare(config, space, Options(1, scheduler="none"), RunDir(str(tmp_path / "sweep")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": 1.0}, "--reduction"),
        ({"scheduler": "pbt"}, "pbt` is not offered.*every exploit would be skipped in silence"),
        ({"pareto": True}, "--scheduler none.*would stop the fast ones"),
        ({"pareto": True, "searcher": "random", "scheduler": "none"}, "found random"),
        ({"searcher": "grid"}, "loss.w_guide are ranges"),
        ({"final_seeds": -1}, "--final-seeds"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str, space: Space) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(Options(4, **options), space)


def test_resume_takes_no_new_options() -> None:
    with pytest.raises(ConfigError, match="takes no `searcher`"):
        main(["--resume", "somewhere", "--searcher", "random"])
    with pytest.raises(ConfigError, match=r"takes no `--train\.lr`"):
        main(["--resume", "somewhere", "--train.lr", "1"])


def test_the_command_line_reaches_the_sweep(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sweep_module, "sweep", lambda *given: seen.append(given))
    (tmp_path / "config.yaml").write_text(dump_yaml(make_config()))
    (tmp_path / "space.yaml").write_text("loss.w_rec: {type: choice, values: [0.0, 0.1, 0.2]}\n"
                                         "reference.per_object: {type: int, low: 1, high: 2}\n")  # fmt: skip
    argv = ["--config", str(tmp_path / "config.yaml"), "--space", str(tmp_path / "space.yaml"), "--searcher", "grid"]
    main([*argv, "--workers-per-trial", "2", "--final-seeds", "0", "--max-concurrent", "auto", "--train.lr", "0.5"])
    with pytest.raises(ConfigError, match="are ASHA's"):
        main([*argv, "--scheduler", "none", "--grace-steps", "4"])
    base, space, options = seen[0]
    assert (base.train.workers, base.train.lr, base.run_dir) == (2, 0.5, "runs/sweep")
    assert options == Options(6, "grid", final_seeds=0) and len(space.grid()) == 6
    main(argv[:-2])
    assert seen[1][2] == Options(16, final_seeds=3)
    main([])
    assert seen[2][0].model == load_config(["--config", "configs/emoji.yaml"]).model and len(seen[2][1].parameters) == 10


# --- how trials are recorded


def started(tmp_path: Path, count: int, stopped: Any = frozenset()) -> tuple[Recorder, list[Any]]:
    """A recorder, and trials of 6 steps as Tune shows them, each with its number in its config; `stopped` by a scheduler."""
    run = RunDir(str(tmp_path))
    log = TrialLog(run)
    recorder = Recorder(run, log, ["loss.w_guide"], 6, Display(log, count, 6), stopped)
    trials = [SimpleNamespace(config={"number": n}) for n in range(count)]
    for n, t in enumerate(trials):
        log.begin(n, {"loss.w_guide": n / 4})
        recorder.on_trial_start(0, trials, t)
    return recorder, trials


def report(recorder: Recorder, trial: Any, step: int, score: float, weight: float) -> None:
    found = {"val_refine_kind": "sparse", "val_refine_weight": weight, "val_refine_top_r": 16, "val_refine_tau": 0.05}
    result = {"step": step, "score": score, "val_R@1": score / 3, **found, "pid": 17, "config": trial.config}
    recorder.on_trial_result(0, [], trial, result)


def test_every_trial_is_a_row_with_its_best_evaluation(tmp_path: Path) -> None:
    stopped: set[int] = set()
    recorder, trials = started(tmp_path, 3, stopped)
    for step, score in ((2, 5.0), (4, 9.0), (6, 8.0)):
        report(recorder, trials[0], step, score, 0.4)
    report(recorder, trials[1], 2, 1.0, 0.0)
    report(recorder, trials[2], 2, 20.0, 0.1)
    (tmp_path / "trials" / "000").mkdir(parents=True)
    lines = "".join(f'{{"step": {i}, "step_seconds": {t}}}\n' for i, t in enumerate((9, 2, 2)))
    (tmp_path / "trials" / "000" / "metrics.jsonl").write_text(lines)
    recorder.on_trial_result(0, [], trials[2], {"error": "NonFiniteLossError: the loss of step 3", "config": trials[2].config})
    stopped.add(1)
    for t in trials:  # a trial that fails returns like any other
        recorder.on_trial_complete(0, trials, t)
    rows = read_rows(tmp_path)
    keys = (
        "trial",
        "status",
        "score",
        "loss.w_guide",
        "refinement.weight",
        "best_step",
        "steps",
        "step_seconds",
        "error",
    )
    assert [tuple(row[k] for k in keys) for row in rows] == [
        (0, "finished", 9.0, 0.0, 0.4, 4, 6, 2.0, ""),
        (1, "stopped-early", 1.0, 0.25, 0.0, 2, 2, None, ""),
        (2, "failed", 20.0, 0.5, 0.1, 2, 2, None, "NonFiniteLossError: the loss of step 3"),
    ]
    assert (rows[0]["refinement.kind"], rows[1]["refinement.kind"]) == ("sparse", None), "none where none helped"
    assert [row["pareto"] for row in rows] == [True, False, False]
    table = format_trials(list(recorder.log.trials.values()), ["loss.w_guide"], 6)
    assert "10 steps run, 18 had every trial run to its end (56%)" in table
    assert "sparse 0.4" in table and "trial 2: NonFiniteLossError" in table and "0*" in table


def test_what_the_end_of_its_training_makes_a_stopped_trial_say_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, trials = started(tmp_path, 1, {0})
    report(recorder, trials[0], 2, 5.0, 0.0)

    def complaining(controller: Any) -> None:
        recorder.on_trial_result(0, [], trials[0], {"error": "ActorDiedError: the controller"})

    monkeypatch.setattr(recorder_module, "abort", complaining)
    recorder.on_trial_complete(0, trials, trials[0])
    assert read_rows(tmp_path)[0]["status"] == "stopped-early"


def test_words_and_numbers_of_a_field_share_a_column(tmp_path: Path) -> None:
    recorder, trials = started(tmp_path, 2)
    recorder.names = ["train.lock_image", "train.lr"]
    for trial, locked in zip(recorder.log.trials.values(), (2, "all")):
        trial.values.update({"train.lock_image": locked, "train.lr": 0.1})
    for trial in trials:
        report(recorder, trial, 6, 5.0, 0.0)
        recorder.on_trial_complete(0, trials, trial)
    rows = read_rows(tmp_path)
    assert [row["train.lock_image"] for row in rows] == ["2", "all"] and [row["train.lr"] for row in rows] == [0.1, 0.1]


def test_a_trial_that_ends_early_without_a_word_was_not_stopped(tmp_path: Path) -> None:
    recorder, trials = started(tmp_path, 1)
    report(recorder, trials[0], 2, 5.0, 0.0)
    recorder.on_trial_complete(0, trials, trials[0])
    (row,) = read_rows(tmp_path)
    assert row["status"] == "failed" and "without saying why" in row["error"]


def test_failed_trials_may_be_run_again(tmp_path: Path) -> None:
    recorder, trials = started(tmp_path, 2)
    report(recorder, trials[0], 2, 5.0, 0.0)
    recorder.on_trial_error(0, trials, trials[0])
    recorder.log.reopen(0)
    again = TrialLog(recorder.run).trials[0]
    assert again.running and again.steps == 2 and again.error == ""
    with pytest.raises(ConfigError, match="goes with `--resume DIR`"):
        main(["--retry-failed"])


def test_a_node_that_does_not_see_the_sweep_says_so(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", told.append)
    base = to_dict(make_config({"run_dir": str(tmp_path / "elsewhere")}))
    trial_module.run_trial({"number": 0, "values": {"loss.w_guide": 0.5}}, base)
    assert len(told) == 1 and told[0]["error"].startswith("StorageError: node") and "sweep.json" in told[0]["error"]
    assert not (tmp_path / "elsewhere").exists(), "nothing is written where nobody looks"


def test_values_that_do_not_go_together_are_the_trial_s_failure(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", told.append)
    RunDir(str(tmp_path)).write_text("sweep.json", "{}")
    trial_module.run_trial({"number": 0, "values": {"train.global_batch": 7}}, to_dict(make_config({"run_dir": str(tmp_path)})))
    assert len(told) == 1 and told[0]["error"].startswith("BatchArithmeticError"), told


def test_a_trial_is_prepared_for_its_own_model(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep leaves `auto` as it is, so that each trial settles it by the model that it has."""
    from support.pretrained import save_pretrained

    clip, siglip = (str(save_pretrained(name, tmp_path / name)) for name in ("clip", "siglip"))
    values = to_dict(make_config({"run_dir": str(tmp_path / "sweep")}))
    values["data"] |= dict.fromkeys({**PLAIN, **BEFORE}, AUTO)
    base = with_values(from_dict(values), {"model.dual": clip, "model.vision_config": None, "model.text_config": None})
    checked: list[Config] = []
    monkeypatch.setattr(sweep_module, "check_inputs", checked.append)
    space = parse_space(f"model.dual: {{type: choice, values: [{clip}, {siglip}]}}", "space.yaml")
    run = RunDir(base.run_dir)
    prepared = prepare(base, space, Options(1, scheduler="none"), run)
    assert checked[0].data == settled(base).data and prepared.data == base.data
    told: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", told.append)
    monkeypatch.setattr(trial_module, "Reporter", object)
    trained: list[Config] = []
    monkeypatch.setattr(trial_module, "prepare_run", lambda config, run: trained.append(config))
    monkeypatch.setattr(trial_module, "named_address", contextlib.nullcontext)
    monkeypatch.setattr(trial_module, "fit", lambda *given, **named: None)
    run.write_text("sweep.json", "{}")
    for number, model in enumerate((clip, siglip)):
        trial_module.run_trial({"number": number, "values": {"model.dual": model}}, to_dict(prepared))
        assert trained[-1].data == settled(with_values(base, {"model.dual": model})).data
    assert told == [] and trained[0].data.image_mean != trained[1].data.image_mean


def test_the_table_on_a_terminal_has_what_runs_on_top(tmp_path: Path) -> None:
    from rich.console import Console

    recorder, trials = started(tmp_path, 4, {0, 1})
    for n, score in enumerate((5.0, 7.0, 6.0)):
        report(recorder, trials[n], 2, score, 0.4)
    for n in (0, 1):
        recorder.on_trial_complete(0, trials, trials[n])
    error = "RuntimeError [/src/pair.cc:537] no luck"  # no markup of rich
    recorder.on_trial_result(0, [], trials[2], {"error": error})
    recorder.on_trial_complete(0, trials, trials[2])
    console = Console(width=100)
    with console.capture() as capture:
        console.print(recorder.display.table())
    title, header, *rows = capture.get().splitlines()
    assert title.strip() == "3/4 done, 1 running, best 7.00 (trial 1)" and header.split()[:3] == [
        "trial",
        "status",
        "step",
    ]
    assert [row.split()[0] for row in rows] == ["3", "1", "0", "2"]
    *found, _, name, value = rows[1].split()[1:]  # without its seconds
    assert (*found, name, value) == ("stopped-early", "2/6", "7.00", "sparse", "0.4", "w_guide", "0.25")
    assert error in rows[3]


def test_what_still_runs_at_the_end_was_interrupted(tmp_path: Path) -> None:
    recorder, _ = started(tmp_path, 1)
    recorder.close()
    assert read_rows(tmp_path)[0]["status"] == "interrupted"
    assert TrialLog(recorder.run).trials[0].running


def test_a_process_that_is_lost_too_often_is_a_result_too(tmp_path: Path) -> None:
    recorder, trials = started(tmp_path, 1)
    recorder.on_trial_error(0, trials, trials[0])
    assert "out of memory" in read_rows(tmp_path)[0]["error"]


def test_evaluations_are_told_again_up_to_the_checkpoint(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"step": 1, "loss": 3.0}]
    lines += [{"step": s, "val_R@1": s, "val_mAP": 2.0, "val_refined_R@1": s + 1, "val_refined_mAP": 3.0, "eval_seconds": 1}
              for s in (2, 4, 6)]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run, config = RunDir(str(tmp_path)), make_config({"eval.metric": "R@1+mAP"})
    assert trial_module.evaluations(config, run) == [], "no checkpoint, so all is done again"
    monkeypatch.setattr(trial_module, "latest_checkpoint", lambda run: SimpleNamespace(step=4))
    told = trial_module.evaluations(config, run)
    assert [(r["step"], r["score"]) for r in told] == [(2, 6.0), (4, 8.0)]
    assert set(told[0]) == {"step", "score", "val_R@1", "val_mAP", "val_refined_R@1", "val_refined_mAP"}


def curve(number: int, scores: dict[int, float]) -> Trial:
    return Trial(number, {}, "finished", [{"step": step, "score": score} for step, score in scores.items()])


def test_asha_knows_the_trials_that_ended_before() -> None:
    def stops(ended: list[Trial], score: float) -> bool:
        asha = Asha(12, 2, 2.0, ended)
        new: Any = SimpleNamespace(config={"number": 9})
        asha.on_trial_add(None, new)
        return bool(asha.on_trial_result(None, new, {"step": 2, "score": score}) == "STOP")

    ended = [curve(0, {2: 5.0, 4: 6.0}), curve(1, {2: 3.0})]
    assert stops(ended, 3.9) and not stops(ended, 4.0), "below the upper half of its rung"
    assert not stops([], 0.1), "nobody to be compared with"


def judge(asha: Asha, number: int, step: int, score: float) -> bool:
    """Whether a trial is stopped at an evaluation."""
    trial: Any = SimpleNamespace(config={"number": number})
    asha.on_trial_add(None, trial)
    return asha.on_trial_result(None, trial, {"step": step, "score": score}) == "STOP"


def test_a_trial_that_goes_on_is_not_judged_again_where_it_had_passed() -> None:
    """The first trial passed step 2 with nobody to be compared with; better ones came after it, then the driver was lost."""
    before = [curve(0, {2: 1.0, 4: 2.0}), curve(1, {2: 5.0}), curve(2, {2: 6.0})]
    before[0].status = "interrupted"
    asha = Asha(12, 2, 2.0, before)
    assert not judge(asha, 0, 2, 1.0) and not judge(asha, 0, 4, 2.0) and asha.stopped == set()
    assert judge(asha, 3, 2, 1.0) and asha.stopped == {3}, "a new one is judged"
    assert not judge(asha, 1, 4, 3.0) and judge(asha, 0, 8, 2.5) is False, "nobody was at step 8 before"


def test_nothing_is_stopped_at_its_last_step() -> None:
    asha = Asha(8, 2, 2.0, [curve(n, {2: 5.0, 4: 5.0, 8: 5.0}) for n in (1, 2, 3)])
    assert not judge(asha, 0, 8, 1.0) and asha.stopped == set(), "a rung lies at its end"
    assert judge(asha, 4, 4, 1.0) and asha.stopped == {4}


def test_the_config_itself_is_never_stopped() -> None:
    asha = Asha(12, 2, 2.0, [curve(n, {2: 5.0 + n}) for n in (1, 2, 3)], spared=0)
    assert not judge(asha, 0, 2, 1.0) and asha.stopped == set()
    assert judge(asha, 4, 2, 1.0)
    assert not judge(asha, 5, 2, 6.0), "but it counts among those the others are compared with"


@pytest.mark.parametrize(
    ("steps", "every", "grace", "reduction", "at", "share"),
    [
        (800, 200, 320, 3.0, [400], 0.5 + 0.5 / 3),  # the rung is judged at the next evaluation
        (300, 30, 60, 3.0, [60, 180], 0.2 + 0.4 / 3 + 0.4 / 9),
        (300, 30, 300, 3.0, [], 1.0),
        (80, 0, 20, 2.0, [24, 40], 0.3 + 0.2 / 2 + 0.5 / 4),  # evaluated every 8 steps
    ],
)
def test_what_asha_takes_is_known_before(
    steps: int,
    every: int,
    grace: int,
    reduction: float,
    at: list[int],
    share: float,
    make_config: Callable[..., Config],
) -> None:
    config = make_config({"train.max_steps": steps, "train.eval_every": every})
    assert judged_at(config, grace, reduction) == at
    assert share_of_steps(config, grace, reduction) == pytest.approx(share)


def test_the_benchmark_stops_trials_where_asha_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., Config]
) -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "sweep.py"
    monkeypatch.syspath_prepend(path.parent)  # as for the script itself
    spec = importlib.util.spec_from_file_location("sweep_benchmark", path)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    run = RunDir(str(tmp_path))
    run.write_text("config.yaml", dump_yaml(make_config({"train.eval_every": 2})))
    run.write_text("space.yaml", SPACE)
    run.write_text("sweep.json", json.dumps({"trials": 3, "scheduler": "none", "trial_steps": 8}))
    trials = [
        curve(0, {2: 5.0, 4: 6.0, 8: 7.0}),
        curve(1, {2: 3.0, 4: 9.0, 8: 20.0}),
        curve(2, {2: 6.0, 4: 5.0, 8: 9.0}),
    ]
    found = benchmark.asha(trials, trials[1], run, SimpleNamespace(grace_steps=2, reduction=2.0, orders=30))
    # the second falls behind at step 2, the third at step 4, where the second, by then gone, must not count
    assert found["steps of each trial"] == [8, 2, 4] and found["steps"]["share"] == 14 / 24
    assert found["winner"] == {"all to the end": 1, "ASHA": 0} and found["score"]["ASHA"] == 7.0
    # the second, lowest at step 2, lasts only in orders that let it go on with nobody to be compared with
    orders = found["random orders"]
    assert 0.1 < orders["same winner"] < 0.7 and 0 < orders["points lost"] <= 13 and 0.4 < orders["share of the steps"] < 1


# --- searchers and schedulers, with trials that only report


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with connect(4, 0.2):
        yield


@pytest.fixture
def quick_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials that report score = w_guide x step at steps 2, 4 .. 12 without any training."""

    def report(trial: dict[str, Any], base: dict[str, Any]) -> None:
        from ray import tune

        for step in range(2, base["train"]["max_steps"] + 1, 2):
            tune.report({"step": step, "score": trial["values"]["loss.w_guide"] * step, "val_refine_weight": 0.0})
            time.sleep(0.1)  # time for a decision of the scheduler

    monkeypatch.setattr(sweep_module, "run_trial", report)


@pytest.mark.usefixtures("ray_cluster", "quick_trials")
@pytest.mark.parametrize(("searcher", "scheduler"), [("optuna", "asha"), ("random", "none")])
def test_searchers_and_schedulers(
    searcher: str, scheduler: str, tmp_path: Path, space: Space, make_config: Callable[..., Config]
) -> None:
    config = make_config({"run_dir": str(tmp_path / "sweep"), "loss.w_guide": 0.9, "train.max_steps": 100})
    config.data.root = os.path.relpath(config.data.root)
    best = sweep(config, space, Options(5, searcher, scheduler, max_concurrent=1, trial_steps=12, grace_steps=2, reduction=4))
    rows = read_rows(tmp_path / "sweep")
    guides = [row["loss.w_guide"] for row in rows]
    assert guides[0] == 0.9, "the config's own values come first"
    assert len(set(guides)) == 5
    leader = max(rows, key=lambda row: row["score"])
    assert best.loss.w_guide == leader["loss.w_guide"]
    for i, row in enumerate(rows):
        assert row["status"] == ("finished" if row["steps"] == 12 else "stopped-early")
        assert row["score"] == pytest.approx(guides[i] * row["steps"])
    if scheduler == "none":
        assert all(row["status"] == "finished" for row in rows)
    else:  # one after the other, so that whoever is below all before it at the first rung ends there
        worse = [i for i in range(1, 5) if guides[i] < min(guides[:i])]
        assert worse and all(rows[i]["steps"] == 2 for i in worse)
    loaded = load_config(["--config", str(tmp_path / "sweep" / "best.yaml")])
    assert loaded.train.max_steps == 100 and loaded.run_dir == str(tmp_path / "sweep" / "best")
    assert Path(loaded.data.root).is_absolute() and loaded.data.root == RunDir(str(tmp_path / "sweep")).read_config().data.root


@pytest.mark.usefixtures("ray_cluster")
def test_a_sweep_of_failures_ends_with_the_first_reason(
    tmp_path: Path, space: Space, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trial: dict[str, Any], base: dict[str, Any]) -> None:
        from ray import tune

        tune.report({"error": "RuntimeError: no luck"})

    monkeypatch.setattr(sweep_module, "run_trial", fail)
    with pytest.raises(SweepError, match=r"no trial of .* ended with a score; the first: RuntimeError: no luck"):
        sweep(make_config({"run_dir": str(tmp_path / "sweep")}), space, Options(2, "random", max_concurrent=1))
    rows = read_rows(tmp_path / "sweep")
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert not (tmp_path / "sweep" / "best.yaml").exists()
