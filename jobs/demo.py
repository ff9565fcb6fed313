"""The demo: train on the bundled drawings for a few minutes, and say what to do next. `make demo` runs it; more flags win."""

import sys
from pathlib import Path

from mmref.cli import main
from mmref.config import load_config
from mmref.run.directory import RunDir
from mmref.tuning.trial_log import median_step_seconds

RECIPE = ["--config", str(Path(__file__).parents[1] / "configs" / "emoji.yaml")]
# A schedule of half the length: 40 TFLOP of training, for machines that do not compute in bf16.
DEMO = [*RECIPE, "--run_dir", "runs/demo", "--train.max_steps", "450", "--train.eval_every", "150"]


def demo(flags: list[str]) -> int:
    """Exit status of the training."""
    if status := main(["train", *DEMO, *flags]):
        return status
    step_seconds = median_step_seconds(RunDir(load_config([*DEMO, *flags]).run_dir)) or 0.0
    minutes = step_seconds * load_config(RECIPE).train.max_steps / 60
    print("next, to search the bundled images with this model: make serve")
    print(f"next, the whole recipe, {minutes:.0f} min of training here: .venv/bin/mmref train --config configs/emoji.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(demo(sys.argv[1:]))
