"""`make setup` and `make test-pythons` say which Pythons they take, before pip says anything. The Pythons are stood in for."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUPPORTED = ["3.11", "3.12", "3.13", "3.14"]
# Answers what its version is, and makes no environment.
PYTHON = """#!/bin/sh
[ "$1" = -c ] && echo {version} && exit 0
echo "asked for: $*" >&2
exit 1
"""


@pytest.fixture
def make(tmp_path: Path):
    """Runs make with Pythons of these versions first on PATH."""

    def run(*argv: str, **pythons: str) -> tuple[int, str]:
        for name, version in pythons.items():
            script = tmp_path / name.replace("_", ".")
            script.write_text(PYTHON.format(version=version))
            script.chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        done = subprocess.run(
            ["make", *argv], cwd=ROOT, env=inherited | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize("version", ["3.10", "3.15", "2.7"])
def test_another_python_gets_one_sentence(make, tmp_path: Path, version: str) -> None:
    status, output = make("setup", f"VENV={tmp_path}/venv", "PYTHON=stand.in", stand_in=version)
    assert status != 0
    said = [line for line in output.splitlines() if not line.startswith("make")]
    assert said == [
        f"mmref: stand.in is Python {version}; mmref runs on Python 3.11, 3.12, 3.13, 3.14. "
        "Name one that is installed: make setup PYTHON=python3.12"
    ]


def test_a_python_that_is_not_there_is_said(make, tmp_path: Path) -> None:
    status, output = make("setup", f"VENV={tmp_path}/venv", "PYTHON=python3.99")
    assert status != 0 and "mmref: python3.99 is no Python that runs here; mmref runs on Python 3.11," in output


@pytest.mark.parametrize("version", SUPPORTED)
def test_a_supported_python_makes_the_environment(make, tmp_path: Path, version: str) -> None:
    _, output = make("setup", f"VENV={tmp_path}/venv", "PYTHON=stand.in", stand_in=version)
    assert "mmref:" not in output and f"asked for: -m venv {tmp_path}/venv" in output


def test_every_python_is_told_of_and_none_is_an_error(make) -> None:
    status, output = make("test-pythons", "PYTHONS=3.98 3.99", python3_98="3.98.1")
    assert status != 0
    assert re.search(r"^3\.98 +3\.98\.1: set-up failed$", output, re.M) and re.search(r"^3\.99 +not installed$", output, re.M)
    status, output = make("test-pythons", "PYTHONS=3.99")
    assert status != 0 and "none of 3.99 is installed" in output


def test_the_package_names_the_pythons_that_set_up_takes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert re.search(r"^SUPPORTED := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split() == SUPPORTED
    prefix = "Programming Language :: Python :: "
    assert [c.removeprefix(prefix) for c in project["classifiers"] if c.startswith(prefix)] == SUPPORTED
    first, last = SUPPORTED[0], int(SUPPORTED[-1].removeprefix("3."))
    assert project["requires-python"] == f">={first},<3.{last + 1}"
