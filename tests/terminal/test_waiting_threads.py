"""A command's threads do not spin while they wait, unless its user has said how they are to wait."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = "import os, sys, mmref.cli; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"


@pytest.mark.parametrize("given, expected", [
    ({}, "1000 False"), ({"GOMP_SPINCOUNT": "5"}, "5 False"), ({"OMP_WAIT_POLICY": "active"}, "None False"),
])  # fmt: skip
def test_set_before_torch_reads_it(given: dict[str, str], expected: str) -> None:
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=plain | given, text=True, capture_output=True, timeout=60)
    assert done.stdout.strip() == expected, done.stderr
