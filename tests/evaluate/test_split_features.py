"""Features by Ray's workers: what a person sees meanwhile, and that the death of a worker costs nothing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from support.jobs import Job, lines_of_ray
from support.tiny_run import make_run

from mmref.cluster.connection import connect
from mmref.errors import ShardSetError, WorkerDiedError
from mmref.evaluate import split_features
from mmref.evaluate.evaluation import open_run
from mmref.evaluate.split_features import Portion, embed_splits


@pytest.fixture
def run(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run whose splits take several calls."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_run(make_config({"eval.batch": 4, "eval.bootstrap": 20, "eval.examples": 1}), str(tmp_path / "run"), {})
    return tmp_path / "run"


@pytest.mark.ray
def test_a_sound_evaluation_prints_no_line_of_ray(run: Path) -> None:
    status, output = Job("evaluate.py", "--checkpoint", str(run)).wait()
    assert status == 0, output
    assert "choosing the refinement on val ..." in output and "scoring test ..." in output and "text to image" in output
    assert not lines_of_ray(output)


def test_without_ray_features_are_computed_in_this_process(run: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    opened, config, checkpoint = open_run(str(run))
    config.eval.workers, config.eval.batch = 2, 3
    found = embed_splits(config, opened, checkpoint, config.data.root, ["test", "val"])
    alone = split_features.Embedder(opened.path, checkpoint, config, config.data.root)
    for split, features in found.items():
        images, bad = alone.encode(Portion(split, "image", 0, len(features.index), []))
        np.testing.assert_allclose(features.image, images, atol=1e-5)
        assert not any(bad) and features.image_rows.tolist() == list(range(len(features.index)))
        texts = features.queries.texts
        np.testing.assert_allclose(features.text, alone.encode(Portion(split, "text", 0, len(texts), texts))[0], atol=1e-5)


@pytest.mark.ray
def test_a_worker_that_dies_is_replaced_and_a_named_error_keeps_its_name(run: Path, tmp_path: Path, monkeypatch) -> None:
    died = tmp_path / "died"

    class Mortal(split_features.Embedder):
        """Dies once, and later meets a damaged set."""

        def encode(self, portion, following=None):
            if not died.exists():
                died.touch()
                os._exit(1)
            if portion.split == "val":
                raise ShardSetError("damaged")
            return super().encode(portion, following)

    monkeypatch.setattr(split_features, "Embedder", Mortal)
    opened, config, checkpoint = open_run(str(run))
    config.eval.workers = 1
    with connect(1, 0.1):
        found = embed_splits(config, opened, checkpoint, config.data.root, ["test"])["test"]
        with pytest.raises(ShardSetError, match=r"^damaged$"):
            embed_splits(config, opened, checkpoint, config.data.root, ["val"])
    assert died.exists()

    alone = split_features.Embedder(opened.path, checkpoint, config, config.data.root)
    texts = found.queries.texts
    whole = (
        alone.encode(Portion("test", "image", 0, len(found.index), []))[0],
        alone.encode(Portion("test", "text", 0, len(texts), texts))[0],
    )
    np.testing.assert_allclose(found.image, whole[0], atol=1e-5)
    np.testing.assert_allclose(found.text, whole[1], atol=1e-5)
    assert found.image_rows.tolist() == list(range(len(found.index))) and not found.skipped


@pytest.mark.ray
def test_a_portion_that_ends_every_worker_ends_the_evaluation_with_its_name(run: Path, monkeypatch) -> None:
    class Doomed(split_features.Embedder):
        """Dies whenever it is given images."""

        def encode(self, portion, following=None):
            if portion.kind == "image":
                os._exit(1)
            return super().encode(portion, following)

    monkeypatch.setattr(split_features, "Embedder", Doomed)
    monkeypatch.setattr(split_features, "RETRIES", 1)
    opened, config, checkpoint = open_run(str(run))
    config.eval.workers = 1
    with connect(1, 0.1), pytest.raises(WorkerDiedError, match=r"dies of images 0 to 3 of test, 2 times.*eval\.batch"):
        embed_splits(config, opened, checkpoint, config.data.root, ["test"])
