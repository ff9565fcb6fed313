"""What a person reads while a run goes on: each line once, and where workers begin said by the workers alone."""

from __future__ import annotations

import pytest

from mmref.config.tree import TrainConfig
from mmref.model import mmref
from mmref.run.directory import JsonLines, RunDir
from mmref.run.progress import Progress, log_line
from mmref.train.loop import Pace

LOSS = {"loss": 1.0, "images_per_second": 10.0, "data_wait": 0.0, "memory_gb": 1.0, "step_seconds": 1.0}


def start(step: int, at: float, passed_over: tuple[str, ...] = ()) -> dict:
    return {"step": step, "started": at, "workers": 2, "passed_over": list(passed_over)}


def test_each_start_of_the_workers_is_told_once_with_its_step_and_its_reasons(tmp_path, capsys):
    run = RunDir(str(tmp_path / "run"))
    lines = JsonLines(run)
    with Progress(run, 40) as progress:
        lines.append(start(0, 1.0))
        for step in (10, 20):
            lines.append({"step": step, **LOSS})
        lines.flush()
        progress._show()
        lines = JsonLines(run, keep_below_step=11)  # a worker was lost: what comes after step 10 is done again
        lines.append(start(10, 2.0, ("step-20/model-0.safetensors is damaged", "step-20/model-1.safetensors is gone")))
        lines.append({"step": 20, **LOSS})
        lines.flush()
        progress._show()
        lines = JsonLines(run, keep_below_step=11)  # again, from the same checkpoint
        lines.append(start(10, 3.0))
        lines.flush()
        progress._show()
    output = capsys.readouterr().out
    told = [line for line in output.splitlines() if line.startswith("training on")]
    assert told == [
        "training on 2 workers, from the beginning",
        "training on 2 workers, resuming at step 10; newer checkpoints cannot be used: step-20/model-0.safetensors is damaged; "
        "step-20/model-1.safetensors is gone",
        "training on 2 workers, resuming at step 10",
    ]
    assert output.count("resuming") == 2, "nobody else says where a run goes on"
    assert output.count("step     10/40") == 1 and output.count("step     20/40") == 2


def test_threads_precision_and_pace_are_told_within_the_first_steps(tmp_path, capsys):
    run = RunDir(str(tmp_path / "run"))
    lines = JsonLines(run)
    pace = Pace(start=0, batch=96)
    with Progress(run, 800) as progress:
        why = "this processor has no instructions for bf16"
        lines.append({**start(0, 1.0), "threads": 4, "precision": "fp32", "precision_why": why})
        told = [pace(done) for done in range(1, 9)]
        assert [record is not None for record in told] == [done == 4 for done in range(1, 9)]
        assert told[3]["pace"] == pytest.approx(96 / told[3]["pace_seconds"]) and told[3]["pace_seconds"] > 0
        lines.append({**told[3], "pace": 48.2, "pace_seconds": 2.0})
        lines.flush()
        progress._show()
    output = capsys.readouterr().out.splitlines()
    assert output[-2:] == [
        "training on 2 workers of 4 threads in fp32 (this processor has no instructions for bf16), from the beginning",
        "step      4/800  about 48 images/s here, 26:32 to go",
    ]


def test_an_evaluation_says_what_ranking_took():
    record = {"step": 10, "val_R@1": 41.2, "val_mAP": 30.0, "eval_seconds": 12.3, "checkpoint_blocking_seconds": 0.5}
    line = "step     10/40  val R@1 41.2  mAP 30.0  (evaluated in 12.3 s{}, stopped 0.50 s for the checkpoint)"
    assert log_line(record, 40, None) == line.format(""), "of an older version"
    assert log_line({**record, "eval_rank_seconds": 2.2}, 40, None) == line.format(", 2.2 of them to rank")


@pytest.mark.parametrize("asked, native, expected", [
    ("auto", True, (True, "this processor multiplies in it")),
    ("auto", False, (False, "this processor has no instructions for bf16")),
    ("fp32", True, (False, "as `train.precision` says")), ("bf16", False, (True, "as `train.precision` says")),
])  # fmt: skip
def test_the_precision_and_its_reason(monkeypatch, asked, native, expected):
    monkeypatch.setattr(mmref, "computes_in_bf16", lambda gpu: native)
    assert mmref.chosen_precision(TrainConfig(precision=asked)) == expected


def test_a_driver_that_joins_later_tells_what_is_new(tmp_path, capsys):
    run = RunDir(str(tmp_path / "run"))
    lines = JsonLines(run)
    lines.append(start(0, 1.0))
    lines.append({"step": 10, **LOSS})
    lines.flush()
    with Progress(run, 40, 10) as progress:
        progress._show()
        assert "step" not in capsys.readouterr().out.replace("steps", "")
        lines.append(start(10, 2.0))
        lines.flush()
        progress._show()
    assert capsys.readouterr().out == "training on 2 workers, resuming at step 10\n"


def test_the_line_of_a_gpu_has_its_mfu_or_what_it_computes():
    speed = {"tflops_per_worker": 396.04}
    assert "10 images/s  MFU 40.0 %  wait" in log_line({"step": 1, **LOSS, **speed, "mfu": 0.4002}, 2, None)
    assert "10 images/s  396 TFLOP/s  wait" in log_line({"step": 1, **LOSS, **speed, "mfu": None}, 2, None)
    assert "10 images/s  wait" in log_line({"step": 1, **LOSS, **speed}, 2, None), "of a CPU"
