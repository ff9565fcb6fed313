"""What several tests need: a tiny shard set with a tokenizer, and tiny configs on it. Helpers lie in tests/support/."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks a hub is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import pytest

from mmref.config import Config


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of the whole start Ray, or something that does; elsewhere one that starts it takes `ray_cluster`, or is marked."""
    for item in items:
        if "integration" in item.path.parts or "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard set that tests only read: 14 train objects of one to five 16 px images, 4 val and 4 test objects."""
    from support.tiny_set import build_tiny_set

    return build_tiny_set(tmp_path_factory.mktemp("tiny") / "set")


@pytest.fixture
def own_set(tiny_set: Path, tmp_path: Path) -> Path:
    """A copy of the tiny set that a test may damage."""
    return Path(shutil.copytree(tiny_set, tmp_path / "set"))


@pytest.fixture
def make_config(tiny_set: Path) -> Callable[..., Config]:
    """Config of a tiny model on the tiny set; overrides as dotted names: make_config({"loss.w_rec": 0.3})."""
    from support.tiny_set import tiny_config

    def make(overrides: dict[str, Any] | None = None, root: Path = tiny_set) -> Config:
        return tiny_config(root, overrides or {})

    return make


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """s3:// URL of a bucket on a server of this test session; take a prefix of your own inside."""
    from support.s3 import s3_server

    with s3_server() as url:
        yield url


@pytest.fixture
def foreign_towers(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Overrides of a config whose towers lie in packages outside the project, frozen, with an adapter on each."""
    from support.towers import FROZEN, install

    folder = tmp_path / "site"
    folder.mkdir()
    install(folder, tiny_set / "tokenizer")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("MMREF_TRUST_MODULES", "tiny_towers, tiny_words")
    yield FROZEN
    sys.modules.pop("tiny_towers", None)
