"""Environments of the wheel and of what an install of it brings, no more: links to what is installed here, without a network."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "mmref", "configs", "tune")
SOURCES += ("data_shards/emoji/LICENSES", "data_shards/icons/LICENSES")


def build_wheel(folder: Path) -> Path:
    """The wheel of a copy of the sources: a build leaves files among them."""
    copy = folder / "sources"
    for name in SOURCES:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy])
    (wheel,) = folder.glob("*.whl")
    return wheel


def make_environment(folder: Path, wheel: Path, extras: Sequence[str] = ()) -> Path:
    """A virtual environment with the wheel and the distributions that it asks for, linked; its `mmref`."""
    venv.create(folder, symlinks=True, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in sorted(brought(extras)):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            target = Path(os.path.abspath(distribution.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    python = str(folder / "bin" / "python")
    _run([sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel])
    return folder / "bin" / "mmref"


def brought(extras: Sequence[str]) -> set[str]:
    """Names of the distributions that an install of mmref with these extras brings, itself left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    direct = [*project["dependencies"], *(text for extra in extras for text in project["optional-dependencies"][extra])]
    waiting, found, seen = [Requirement(text) for text in direct], set[str](), set[str]()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found.add(canonicalize_name(requirement.name))
        for text in importlib.metadata.requires(requirement.name) or []:
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in requirement.extras or {""}):
                waiting.append(needed)
    return {name for name in found if _is_installed(name)}  # torch names libraries of CUDA that a build for CPUs is without


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _run(words: Sequence[object]) -> None:
    done = subprocess.run([str(word) for word in words], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
