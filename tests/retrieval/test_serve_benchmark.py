"""benchmarks/serve.py runs, and holds the service to what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(index: Path, out: Path, part: str, *argv: str) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/serve.py", part, "--index", str(index), "--replicas", "0", "--out", str(out)]
    done = subprocess.run([*command, *argv], cwd=ROOT, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_load(split_index, tmp_path):
    found = run(split_index, tmp_path / "out.json", "load", "--items", "500", "--clients", "2", "--seconds", "1")
    assert found["items"] == 500
    assert set(found["stages_ms"]) == {"tokenise", "encode", "codes", "search", "refine", "describe", "thumbnails"}
    for kind in ("new", "repeated"):
        row = found[f"{kind}, 2 clients"]
        assert row["errors"] == 0 and row["per_s"] > 0 and row["p50_ms"] <= row["p95_ms"]


@pytest.mark.slow
def test_soak(split_index, tmp_path):
    found = run(split_index, tmp_path / "out.json", "soak", "--minutes", "0.3")
    answers = found["answers"]
    assert found["wrong"] == [] and not any(name.startswith("valid") and name != "valid 200" for name in answers)
    assert answers["valid 200"] > 0 and sum(n for name, n in answers.items() if name.startswith("hostile 4")) > 0
