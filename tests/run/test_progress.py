"""What a person reads while a run goes on: each line once, and where workers begin said by the workers alone."""

from __future__ import annotations

from mmref.run.directory import JsonLines, RunDir
from mmref.run.progress import Progress

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
