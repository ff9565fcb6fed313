"""A run of the real trainer (Ray, Ray Data, DeepSpeed), for the benchmarks that compare with it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from mmref.config import Config, from_dict, to_dict
from mmref.train.trainer import train


def run_trainer(config: Config, windows: int, window_steps: int) -> dict[str, Any]:
    """Medians of the log windows of a run of `mmref train` without its final evaluation; the first window warms up."""
    with tempfile.TemporaryDirectory(prefix="mmref-benchmark-") as folder:
        values = to_dict(config)
        steps = (windows + 1) * window_steps
        values["run_dir"] = folder
        values["train"] |= {"max_steps": steps, "log_every": window_steps, "eval_every": steps}
        train(from_dict(values), final_evaluation=False)
        records = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    records = [r for r in records if "images_per_second" in r][1:]
    names = ("images_per_second", "step_seconds", "data_wait", "memory_gb")
    return {name: float(np.median([r[name] for r in records])) for name in names}
