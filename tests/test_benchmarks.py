"""The benchmark scripts run, and write what their tables are made of."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.tiny_run import run_of

from mmref.retrieval import index

ROOT = Path(__file__).parents[1]


SMOKE = ("--config", "configs/smoke.yaml")


def call(script: str, *argv: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, script, *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def run(tmp_path: Path, script: str, *argv: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    call(f"benchmarks/{script}", *argv, "--out", str(out))
    return json.loads(out.read_text())


@pytest.mark.slow
def test_step(tmp_path: Path) -> None:
    found = run(tmp_path, "step.py", *SMOKE, "--rounds", "2", "--steps", "2", "--with-ray")
    align, full, words = (found[name] for name in ("align-only", "MMRef", "MMRef + reconstruction"))
    assert align["ratio"] == 1
    assert align["tflop"] < full["tflop"] < words["tflop"], "references cost products, reconstruction a text pass"
    for row in (align, full, words):
        assert row["images_per_second"] == pytest.approx(32 * 1e3 / row["step_ms"])
        assert row["mfu"] == pytest.approx(row["tflop"] * 1e15 / row["step_ms"] / found["peak_flops"])
    ray = found["with Ray"]
    assert ray["ratio"] == pytest.approx(ray["images_per_second"] / ray["bare_images_per_second"])


@pytest.mark.slow
def test_evaluation(tmp_path: Path) -> None:
    found = run(tmp_path, "evaluation.py", "--queries", "40", "--gallery", "60")
    for case in ("few_hits", "many_hits"):
        assert max(found[case]["largest_difference"][name] for name in ("literal", "argsort_per_query")) < 1e-9
        assert found[case]["times_faster"]["literal"] == pytest.approx(
            found[case]["seconds"]["literal"] / found[case]["seconds"]["mmref"]
        )
    large = run(tmp_path, "evaluation.py", "--large", "400", "--before", str(ROOT))
    assert large["metrics"]["now"] == large["metrics"]["before"] and 0 < large["metrics"]["now"]["R@1"] < 100
    assert set(large["ratio"]) == {"now", "before", "one of four"} and large["ratio"]["now"] == 1


@pytest.mark.slow
def test_references(tmp_path: Path) -> None:
    found = run(tmp_path, "references.py", "--objects", "50000", "--dim", "64", "--ranks", "1", "3", "--before", str(ROOT))
    assert found["bank_gb"] == 4 * 50_000 * 4 * 64 / 1e9
    assert [(row["ranks"], row["what"]) for row in found["rows"]] == [
        (n, what) for n in (1, 3) for what in ("evaluate", "export")
    ]
    for row in found["rows"]:
        assert 0.9 < row["now"]["anonymous"] <= row["now"]["resident"], "the space has a copy"


def test_ledger(tmp_path: Path) -> None:
    rows = run(tmp_path, "ledger.py", "--ranks", "8", "512", "--steps", "200", "--broken", "0.01")["rows"]
    assert [row["ranks"] for row in rows] == [8, 512]
    for row in rows:
        assert row["every_sample_mb"] == 24 * row["ranks"] * 64 * 200 / 1e6
        assert 0 < row["written_mb"] < row["gathered_mb"] < row["every_sample_mb"] / 10


@pytest.mark.slow
def test_syncs(tmp_path: Path) -> None:
    found = run(tmp_path, "syncs.py", "--only", "clip_vit_b16", "cuhk_pedes")["rows"]
    assert [row["config"] for row in found] == ["clip_vit_b16", "cuhk_pedes"]
    assert all(row["sync_ops"] == row["pageable_copies"] == 0 for row in found)


def rehearsed(out: Path, *parts: str) -> dict[str, Any]:
    """Figures of some parts of benchmarks/gpu.py with tiny sizes, each of which came to its end."""
    call("benchmarks/gpu.py", "--tiny", "--minutes", "20", "--only", *parts, "--out", str(out))
    found = json.loads((out / "gpu.json").read_text())["parts"]
    assert list(found) == list(parts) and {entry["status"] for entry in found.values()} == {"ok"}
    return found


@pytest.mark.slow
def test_gpu_rehearses_steps(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "steps", "cache", "profile")
    steps = {(row["variant"], row["batch"]): row for row in found["steps"]["rows"]}
    assert len(steps) == 7 and all(row["finite"] and row["pairs_per_second"] > 0 for row in steps.values())
    for (variant, batch), row in steps.items():
        plain = steps["plain loop", batch]
        assert row["ratio_to_plain"] == pytest.approx(row["pairs_per_second"] / plain["pairs_per_second"]), variant
    flops = {name: steps[name, 16]["tflops"] / steps[name, 16]["pairs_per_second"] for name, _ in steps}
    assert flops["plain loop"] == pytest.approx(flops["align-only"]) and flops["MMRef + reconstruction"] > flops["MMRef"]
    assert [row["batch"] for row in found["cache"]["rows"]] == [32, 8]
    assert found["profile"]["waits_per_step"] and (tmp_path / "profile" / "trace.json.gz").exists()
    page = (tmp_path / "gpu.md").read_text()
    assert "A rehearsal" in page and "| MMRef + reconstruction | 16 |" in page


@pytest.mark.slow
def test_gpu_rehearses_the_rest(tmp_path: Path) -> None:
    """But what compiles, and what starts Ray. The tests marked `gpu` are among it."""
    found = rehearsed(tmp_path, "tests", "bank", "ranking")
    assert "passed" in found["tests"]["outcome"] and not found["tests"]["failures"]
    assert [(row["rows_on"], row["objects"]) for row in found["bank"]["rows"]] == [
        ("device", 20), ("device", 2000), ("host", 20), ("host", 2000)
    ]  # fmt: skip
    ranking = found["ranking"]
    assert ranking["mmref_r1"] == pytest.approx(ranking["bare_r1"]) and 0 < ranking["bare_r1"] < 100


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


def test_a_part_of_gpu_that_fails_or_takes_too_long_is_written_down(gpu: Any, tmp_path: Path) -> None:
    for folder in ("parts", "logs"):
        (tmp_path / folder).mkdir()
    failed = gpu.run_part("ranking", 120, ["--tiny", "--nonsense"], tmp_path)
    assert failed["status"] == "failed" and "--nonsense" in failed["printed_last"]
    assert gpu.run_part("ranking", 0.2, ["--tiny"], tmp_path)["status"] == "ended after its 0 s"


def test_what_a_trace_says_of_a_gpu(gpu: Any) -> None:
    kernels = [
        {"cat": "kernel", "name": "gemm", "ts": ts, "dur": dur} for ts, dur in ((100, 50), (120, 10), (140, 20), (180, 20))
    ]
    others = ("aten::_local_scalar_dense", "Memcpy HtoD (Pageable -> Device)", "Memcpy HtoD (Pinned -> Device)", "aten::mm")
    found = gpu.of_trace([*kernels, *({"name": name} for name in others)], 2)
    assert found["waits_per_step"] == {"aten::_local_scalar_dense": 0.5} and found["pageable_copies_per_step"] == 0.5
    assert found["kernels_per_step"] == 2 and found["gpu_busy"] == pytest.approx(0.8), "80 of 100, where two overlap once"


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    found = run(tmp_path, "scaling.py", *SMOKE, "--workers", "1", "2", "--batch", "16", "--windows", "1", "--steps", "2")
    one, two = found["rows"]
    assert (one["workers"], two["workers"]) == (1, 2) and one["efficiency"] == 1
    assert two["efficiency"] == pytest.approx(two["images_per_second"] / one["images_per_second"] / 2)
    assert two["most_by_cores"] == min(1, found["cores"] / 2)
    assert 0 <= two["data_wait"] <= 1


@pytest.mark.slow
def test_caption_weights(tmp_path: Path) -> None:
    noisy = str(tmp_path / "noisy")
    call("jobs/train.py", *SMOKE, "--run_dir", noisy, "--data.caption_noise", "0.5")
    found = run(tmp_path, "caption_weights.py", noisy)[noisy]
    assert found["wrong captions"] == pytest.approx(50, abs=2)
    for references in ("mean image", "mean image and caption", "learned"):
        for weights in ("share x 20", "cosine x 4", "cosine x 8"):
            assert all(0 < value <= 100.01 for value in found[references][weights].values())
    kept = found["mean image"]["share x 20"]["weight of the wrong"]
    assert kept < found["wrong captions"], "even 20 steps of a tiny model tell some"


@pytest.mark.slow
def test_division(tmp_path: Path) -> None:
    noisy, rde = str(tmp_path / "noisy"), ("--loss.align", "rde", "--loss.rde_from", "0.5")
    call("jobs/train.py", *SMOKE, "--run_dir", noisy, "--data.caption_noise", "0.5", *rde)
    found = run(tmp_path, "division.py", noisy)[noisy]
    assert found["wrong"] == pytest.approx(50, abs=6) and 0 < found["pairs seen"] < 5, "20 steps of 32 pairs"
    assert 0 < found["left out"] < 100 and 0 < found["precision"] < 100 and 0 < found["recall"] < 100


@pytest.mark.slow
def test_tables(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    call("benchmarks/tables.py", "--out", str(out), "build", "--rows", "50", "200", "--before", str(ROOT))
    found = json.loads(out.read_text())
    assert list(found)[:3] == ["rows, 50, now", "rows, 50, before", "set, 50, now"] and len(found) == 8
    assert all(each["rows_per_second"] > 0 and each["peak_mb"] >= 0 for each in found.values())


@pytest.mark.slow
def test_decode(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(pixels).resize((200 + i, 150)).save(tmp_path / f"{i}.jpg")
    options = ("--photos", str(tmp_path), "--side", "512", "--targets", "64", "300", "--rounds", "2")
    found = run(tmp_path, "decode.py", *options)
    assert 0 < found["512 to 64"]["largest difference"] < 64
    assert found["512 to 300"]["largest difference"] == 0, "not small enough"


@pytest.mark.slow
def test_first_batch(tmp_path: Path) -> None:
    rows = run(tmp_path, "data.py", *SMOKE, "--first-batch", "40", "4000", "--steps", "5", "--pause-ms", "10")["rows"]
    assert [row["steps"] for row in rows] == [40, 4000]
    assert all(row["seconds"] > 0 and row["hand_over_ms_p99"] >= row["hand_over_ms"] > 0 for row in rows)


@pytest.mark.slow
def test_remote_evaluation(tmp_path: Path) -> None:
    rows = run(tmp_path, "remote_evaluation.py", "--images", "64", "--sample", "4", "--delay-ms", "1")["rows"]
    assert [row["how"] for row in rows] == ["one by one", "byte ranges", "cache"]
    one, ranges, cache = (row["requests"] / row["images"] for row in rows)
    assert one >= 3 and ranges < 0.5 and cache <= ranges


def test_window(tmp_path: Path) -> None:
    small = ("--nodes", "2", "4", "--shards", "64", "--objects-per-shard", "20", "--node-batch", "64", "--steps-per-window", "5")
    rows = run(tmp_path, "window.py", *small, "--cache-gb", "5")["rows"]
    assert [(row["nodes"], row["window_shards"]) for row in rows] == [(2, 16), (4, 32)]
    assert all(0.5 < row["reads_per_epoch"] < row["reads_per_epoch_drawn"] <= row["nodes"] for row in rows), rows


def test_duplicates(tiny_set: Path, tmp_path: Path) -> None:
    model = run_of(tiny_set, tmp_path / "run")
    index.create(str(tiny_set), str(model), str(tmp_path / "index"), split="train", workers=0)
    found = run(tmp_path, "duplicates.py", str(tmp_path / "index"))
    rows = found["thresholds"]
    assert rows[0]["above"] == 1 and rows[0]["groups"] == 0 and rows[0]["copies"] is None
    assert [row["not_kept"] for row in rows] == sorted(row["not_kept"] for row in rows), "a lower threshold joins more"
    assert all(row["not_kept"] == row["images"] - row["groups"] for row in rows)


@pytest.mark.slow
def test_agreement(tiny_set: Path, tmp_path: Path) -> None:
    model = str(run_of(tiny_set, tmp_path / "run"))
    call("jobs/evaluate.py", "--model", model, "--workers", "0")  # chooses the refinement
    found = run(tmp_path, "agreement.py", model, "--split", "train")
    assert len(found["rows"]) == 12 and found["equal"] and found["queries"] >= found["sentences"] > 10
    assert {row["served"] for row in found["rows"]} != {100.0}, "or nothing was told apart"


@pytest.mark.slow
def test_in_place(tmp_path: Path) -> None:
    size = ("--tars", "3", "--images", "40", "--workers", "0", "--folder", str(tmp_path / "tars"))
    found = run(tmp_path, "in_place.py", "index", *size, "--rounds", "1")
    best = {name: max(rates) for name, rates in found["images_per_second"].items()}
    assert found["images"] == 120 and found["ratio"] == pytest.approx(best["mmref"] / best["webdataset"])
    found = run(tmp_path, "in_place.py", "train", *size)
    assert found["largest_difference"] < 1e-5 and 0 < found["resumed_at"] < found["steps"] == 20
