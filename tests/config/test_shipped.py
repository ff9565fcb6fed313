"""Files that come with mmref, by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmref.config import load_config
from mmref.config.shipped import file_or_name, shipped
from mmref.data.shard_set import ShardSet
from mmref.errors import ConfigError, ShardSetError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory is no checkout."""
    monkeypatch.chdir(tmp_path)


def test_a_config_is_known_by_its_name() -> None:
    assert load_config(["--config", "smoke"]) == load_config(["--config", shipped("configs/smoke.yaml")])
    assert load_config(["--config=smoke", "--train.max_steps", "7"]).train.max_steps == 7
    assert file_or_name("narrow", "tune/spaces") == shipped("tune/spaces/narrow.yaml")


def test_a_file_goes_before_a_name_and_a_folder_does_not(tmp_path: Path) -> None:
    (tmp_path / "smoke").write_text("run_dir: own\nmodel: {dual: tiny}\n")
    (tmp_path / "emoji").mkdir()
    assert load_config(["--config", "smoke"]).run_dir == "own"
    assert load_config(["--config", "emoji"]).run_dir == "runs/emoji"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("smook", "smook: there is no such file, and none of that name comes with mmref: .*emoji, .*smoke"),
        ("configs/smoke.yaml", "configs/smoke.yaml cannot be read: No such file or directory. `smoke` alone is"),
        ("smook.yaml", "smook.yaml cannot be read"),
        ("/nowhere/smook", "/nowhere/smook cannot be read"),
    ],
)
def test_what_is_neither_is_named(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(["--config", given])


def test_the_bundled_set_says_where_it_comes_from() -> None:
    with pytest.raises(
        ShardSetError, match=r"come with a checkout.*'mmref\[emoji\]'.*mmref shards build emoji --out data_shards/emoji"
    ):
        ShardSet.open("data_shards/emoji")
    with pytest.raises(ShardSetError, match="Build one with `mmref shards build SOURCE"):
        ShardSet.open("data_shards/other")
