"""A benchmark is two commands: the shards, then the training by the benchmark's own config."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.jobs import ROOT, Job

from mmref.cli import main

CLIP = {
    "model_type": "clip", "projection_dim": 16,
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "image_size": 32, "patch_size": 16},
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "vocab_size": 90, "max_position_embeddings": 77, "eos_token_id": 2},
}  # fmt: skip


@pytest.fixture
def cuhk(tmp_path: Path) -> Path:
    """CUHK-PEDES in its own format, with 24 persons of two photographs each."""
    entries, rng = [], np.random.default_rng(0)
    for number in range(1, 25):
        for i in range(2):
            name = f"CUHK01/{number:04d}{i:03d}.png"
            path = tmp_path / "CUHK-PEDES" / "imgs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (60, 24, 3), dtype=np.uint8)).save(path)
            split = "train" if number <= 16 else "val" if number <= 20 else "test"
            entries.append({"split": split, "captions": [f"person {number}", f"view {i} of {number}"], "file_path": name,
                            "processed_tokens": [], "id": number})  # fmt: skip
    (tmp_path / "CUHK-PEDES" / "reid_raw.json").write_text(json.dumps(entries))
    return tmp_path / "CUHK-PEDES"


@pytest.mark.slow
def test_cuhk_pedes_in_two_commands(cuhk: Path, tmp_path: Path) -> None:
    """At 384 x 128, with a CLIP small enough for two cores."""
    shards, run = tmp_path / "cuhk_pedes", tmp_path / "run"
    build = ["shards", "build", "cuhk", "--root", str(cuhk), "--out", str(shards), "--workers", "0"]
    assert main([*build, "--tokenizer-vocab", "90", "--min-shards", "2"]) == 0
    smaller = {
        "data.root": shards, "data.readers": 1, "model.dual": "", "model.dual_config": json.dumps(CLIP), "train.gpu": "false",
        "train.precision": "fp32", "train.global_batch": 8, "train.max_steps": 10, "train.warmup_steps": 2,
        "train.storage_gb": 0.3, "eval.bootstrap": 50, "eval.examples": 1,
    }  # fmt: skip
    flags = [word for name, value in smaller.items() for word in (f"--{name}", str(value))]
    config = str(ROOT / "configs" / "cuhk_pedes.yaml")
    status, output = Job("train.py", "--config", config, "--run_dir", str(run), *flags).wait()
    assert status == 0, output
    assert "best on test, chosen on test" in output
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["n_queries"], metrics["n_gallery"], metrics["n_objects"]) == (16, 8, 4)
    assert metrics["refinement"]["chosen_on"] == "val" and metrics["best_on_test"]["chosen_on"] == "test"
