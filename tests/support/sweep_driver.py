"""A sweep of trials that only pretend to train, as a process of its own that can be killed.

`python sweep_driver.py CONFIG SPACE RUN_DIR TRIALS` starts it, `python sweep_driver.py --resume RUN_DIR` goes on. A trial
takes a step every 0.3 s, keeps the last one as its checkpoint, and notes each in `steps.log` of its folder.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from mmref.config import load_config
from mmref.terminal.run_command import run_command
from mmref.tuning import sweep as module
from mmref.tuning.options import Options
from mmref.tuning.space import read_space
from mmref.tuning.trial_log import folder

STEPS, STEP_S = 6, 0.3


def pretend(trial: dict[str, Any], base: dict[str, Any]) -> None:
    """Score = w_guide x step, at every step that is not in the log yet; all those in it are reported first."""
    from ray import tune

    place = Path(base["run_dir"]) / folder(trial["number"])
    place.mkdir(parents=True, exist_ok=True)
    log = place / "steps.log"
    done = [int(line) for line in log.read_text().split()] if log.exists() else []
    for step in [*done, *range(len(done) + 1, STEPS + 1)]:
        if step not in done:
            time.sleep(STEP_S)
            with log.open("a") as file:
                file.write(f"{step}\n")
        tune.report({"step": step, "score": trial["values"]["loss.w_guide"] * step, "val_refine_weight": 0.0})


def main(argv: list[str]) -> int:
    module.run_trial = pretend
    if argv[0] == "--resume":
        module.resume(argv[1])
        return 0
    config, space, run_dir, trials = argv
    base = load_config(["--config", config, "--run_dir", run_dir, "--train.max_steps", str(STEPS)])
    module.sweep(base, read_space(space), Options(int(trials), max_concurrent=2, grace_steps=2, reduction=2.0))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda: main(sys.argv[1:])))
