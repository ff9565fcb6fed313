"""What a user can get wrong, at the command line: a named error that says what was found, where, and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.jobs import write_config

from mmref.cli import main
from mmref.config import Config

MakeConfig = Callable[..., Config]


@pytest.fixture
def attempt(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`mmref train` with a config of the tiny set and some flags; returns what it prints on stderr after failing."""

    def train(*flags: str, root: Path | None = None) -> str:
        config = make_config() if root is None else make_config({}, root)
        path = write_config(config, tmp_path)
        assert main(["train", "--config", str(path), "--run_dir", str(tmp_path / "run"), *flags]) in (1, 2)
        return capsys.readouterr().err

    return train


def test_unknown_key_names_the_nearest(attempt: Callable[..., str]) -> None:
    error = attempt("--train.wrokers", "2")
    assert "ConfigError" in error and "`train.wrokers`" in error and "`train.workers`" in error


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text("reference: {momentun: 0.5}\n")
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "typo.yaml" in error and "`reference.momentun`" in error and "`reference.momentum`" in error


def test_global_batch_shows_the_arithmetic(attempt: Callable[..., str]) -> None:
    error = attempt("--train.workers", "3")
    assert "BatchArithmeticError" in error and "8 / 3 = 2.67" in error


def test_fewer_objects_than_a_step_takes(attempt: Callable[..., str]) -> None:
    error = attempt("--train.global_batch", "64")
    assert "TooFewObjectsError" in error and "14 objects" in error and "32 different" in error and "at most 28" in error


def test_more_workers_than_cpus_would_starve_ray_data(attempt: Callable[..., str]) -> None:
    error = attempt("--train.workers", "4", "--train.cpus_per_worker", "40")
    assert "ClusterTooSmallError" in error and "164 CPUs" in error


def test_missing_set(attempt: Callable[..., str], tmp_path: Path) -> None:
    error = attempt("--data.root", str(tmp_path / "nowhere"))
    assert "ShardSetError" in error and "nowhere" in error


def test_missing_shard(attempt: Callable[..., str], own_set: Path) -> None:
    next(own_set.glob("train/*-000001.tar")).unlink()
    error = attempt(root=own_set)
    assert "ShardSetError" in error and "train-000001.tar" in error and "mmref shards verify" in error


def test_truncated_tar(attempt: Callable[..., str], own_set: Path) -> None:
    tar = next(own_set.glob("train/*-000000.tar"))
    tar.write_bytes(tar.read_bytes()[:-2000])
    error = attempt(root=own_set)
    assert "ShardSetError" in error and "train-000000.tar" in error


def test_manifest_of_other_shards(attempt: Callable[..., str], own_set: Path) -> None:
    manifest = own_set / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples": ', '"samples": 1'))
    error = attempt(root=own_set)
    assert "ShardSetError" in error and "does not match its manifest" in error


def test_unwritable_run_directory(attempt: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    error = attempt("--run_dir", str(tmp_path / "file" / "run"))
    assert "RunDirectoryError" in error and "--run_dir" in error


def test_run_directory_of_another_config(attempt: Callable[..., str], tmp_path: Path, make_config: MakeConfig) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000004-abc"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text('{"step": 4, "world": 1, "files": {}}')
    shutil.copy(write_config(make_config({"train.lr": 0.5}), tmp_path), tmp_path / "run" / "config.yaml")
    error = attempt()
    assert "RunDirectoryError" in error and "train.lr 0.5 -> 0.001" in error


def test_checkpoints_scored_in_another_way(attempt: Callable[..., str], tmp_path: Path, make_config: MakeConfig) -> None:
    folder = tmp_path / "run" / "checkpoints" / "step-00000004-abc"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text('{"step": 4, "world": 1, "files": {}}')
    shutil.copy(write_config(make_config({"eval.metric": "R@1"}), tmp_path), tmp_path / "run" / "config.yaml")
    error = attempt()
    assert "RunDirectoryError" in error and "scored with `eval.metric` R@1, and is to go on with" in error


def test_evaluating_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--checkpoint", str(tmp_path)]) == 1
    assert "ModelError" in (error := capsys.readouterr().err) and "is none of these: a run directory" in error


def test_unknown_backbone(attempt: Callable[..., str]) -> None:
    error = attempt("--model.vision_config.model_type", "convnxt")
    assert "convnxt" in error
