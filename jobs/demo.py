"""The demo: train on the bundled drawings for a few minutes, and say what to do next. `make demo` runs it; flags win over both
of its configs."""

import sys
from pathlib import Path
from statistics import median

from mmref.cli import main
from mmref.config import load_config
from mmref.run.directory import RunDir, read_jsonl

CONFIGS = Path(__file__).parents[1] / "configs"


def demo(flags: list[str]) -> int:
    """Exit status of the training."""
    recipe, shorter = ["--config", str(CONFIGS / "emoji.yaml")], ["--config", str(CONFIGS / "demo.yaml")]
    if status := main(["train", *recipe, *shorter, *flags]):
        return status
    run_dir = load_config([*recipe, *shorter, *flags]).run_dir
    steps = [record["step_seconds"] for record in read_jsonl(RunDir(run_dir)) if "step_seconds" in record]
    minutes = median(steps) * load_config(recipe).train.max_steps / 60
    print("next, to search the bundled images with this model: make serve")
    print(
        f"next, the recipe of the README's results, {minutes:.0f} min of training here: mmref train --config configs/emoji.yaml"
    )
    return 0


if __name__ == "__main__":
    sys.exit(demo(sys.argv[1:]))
