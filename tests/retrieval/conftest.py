"""A run of random weights, and an index of its test split; folders of images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.images import write_images

from mmref.retrieval import index


@pytest.fixture(scope="session")
def run(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a sparse refinement of every candidate."""
    from support.tiny_run import run_of

    return run_of(tiny_set, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="session")
def split_index(run: Path, tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Index of the tiny set's test split, only read."""
    path = tmp_path_factory.mktemp("index") / "test"
    index.create(str(tiny_set), str(run), str(path), split="test", workers=0)
    return path


@pytest.fixture
def own_index(split_index: Path, tmp_path: Path) -> Path:
    """A copy of the index that a test may change."""
    return Path(shutil.copytree(split_index, tmp_path / "index"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven images in two levels, a broken one, and files that are none."""
    root = tmp_path / "images"
    write_images(root, range(11))
    (root / "deep" / "broken.jpg").write_bytes(b"no image")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(b"")
    return root
