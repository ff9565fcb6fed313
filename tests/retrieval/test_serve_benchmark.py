"""benchmarks/serve.py runs, and holds the service to what it says."""

from __future__ import annotations

import asyncio
import importlib
import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.services import listening

ROOT = Path(__file__).parents[2]


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("attacks")


def run(index: Path, out: Path, part: str, *argv: str) -> dict[str, Any]:
    command = [sys.executable, "benchmarks/serve.py", part, "--index", str(index), "--replicas", "0", "--out", str(out)]
    done = subprocess.run([*command, *argv], cwd=ROOT, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


def test_an_attack_is_told_by_its_name(split_index, attacks, monkeypatch):
    monkeypatch.setattr(attacks, "ATTACKS", (attacks.parameters,))
    with listening(split_index) as service:
        target = attacks.Target(service.address[1], "", [], [])
        assert asyncio.run(attacks.attack(target, random.Random(0))) == ("parameters", [400])


def test_errors_of_every_route_are_counted(attacks):
    counters = """
mmref_requests_total{route="/image/{item_id:path}",status="503"} 24.0
mmref_requests_total{route="/explain",status="503"} 4.0
mmref_requests_total{route="/search",status="500"} 1.0
mmref_requests_total{route="/search",status="429"} 500.0
mmref_requests_created{route="/search",status="500"} 1.7e+09
"""
    assert attacks.server_errors(counters) == 29


def test_a_slow_host_ends_without_a_word(attacks, caplog):
    async def ask() -> bytes:
        async with attacks.slow_host() as port:
            reader, _ = await asyncio.open_connection("127.0.0.1", port)
            return await reader.readuntil(b"\r\n\r\nx")

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(ask()).startswith(b"HTTP/1.1 200 OK")
    assert not caplog.records, caplog.text


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
    found = run(split_index, tmp_path / "out.json", "soak", "--minutes", "1")
    answers = found["answers"]
    assert found["wrong"] == [] and not any(name.startswith("valid") and name != "valid 200" for name in answers)
    assert answers["valid 200"] > 0 and sum(n for name, n in answers.items() if name.startswith("hostile 4")) > 0
