"""What an evaluation reports and on what its refinement was chosen, whatever splits a set has. Features are stood in for."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.tiny_run import make_run, random_features
from support.tiny_set import TinySource, build_tiny_set, damage_image, replace_json, tiny_config
from support.web_tars import picture

from mmref.data.sample_reader import RawSample
from mmref.data.shard_set import ShardSet
from mmref.errors import EvaluationError, RunDirectoryError, StorageError
from mmref.evaluate import evaluation as module
from mmref.evaluate.evaluation import evaluate_run, reported_split, view_of
from mmref.evaluate.split_features import SplitFeatures
from mmref.run.directory import RunDir

CHOSEN = {"kind": "sparse", "weight": 0.4, "top_r": 4, "tau": 0.05}


class Without(TinySource):
    """A set that lacks a split."""

    def __init__(self, name: str, lacking: str) -> None:
        super().__init__(name)
        self.lacking = lacking

    def objects(self):
        return (o for o in super().objects() if o.split != self.lacking)


@pytest.fixture
def run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run whose own set is this one; its features are random."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")

    monkeypatch.setattr(module, "run_features", random_features)

    def make(root: Path) -> str:
        path = str(tmp_path / "run")
        make_run(tiny_config(root, {"eval.bootstrap": 20, "eval.examples": 1}), path, {})
        return path

    return make


def test_without_val_nothing_is_chosen_on_the_split_reported(run_on, tmp_path):
    root = build_tiny_set(tmp_path / "set", Without("no-val", "val"))
    metrics = evaluate_run(run_on(root))
    assert metrics["refinement"]["chosen_on"] == "" and metrics["refinement"]["weight"] == 0
    assert metrics["refined"] == metrics["initial"] and metrics["refinement"]["tried"] == []
    assert "no val split to choose it on" in (tmp_path / "run" / "report.html").read_text()


def test_another_set_without_val_takes_what_the_own_val_chose(run_on, tiny_set, tmp_path):
    other = build_tiny_set(tmp_path / "other", Without("no-val", "val"))
    path = run_on(tiny_set)
    found = evaluate_run(path, data=str(other))["refinement"]
    assert {k: found[k] for k in CHOSEN} == CHOSEN and found["chosen_on"] == "val of tiny"
    Path(path, "metrics.json").unlink()
    found = evaluate_run(path, data=str(other))["refinement"]
    assert (found["weight"], found["chosen_on"]) == (0.0, "")
    own = evaluate_run(path)["refinement"]
    assert own["chosen_on"] == "val" and len(own["tried"]) > 1


def test_without_test_val_is_reported_and_kept(run_on, tmp_path):
    root = build_tiny_set(tmp_path / "set", Without("no-test", "test"))
    path = run_on(root)
    assert reported_split(ShardSet.open(str(root))) == "val"
    evaluate_run(path, split="val")
    assert json.loads(Path(path, "metrics.json").read_text())["split"] == "val"
    evaluate_run(path, split="train", report=False)
    assert json.loads(Path(path, "metrics.json").read_text())["split"] == "val"


def test_an_evaluation_of_another_split_or_set_has_files_of_its_own(run_on, tiny_set, tmp_path):
    path = run_on(tiny_set)
    files = {
        ("test", ""): "", ("val", ""): "-val", ("test", "other"): "-other", ("val", "other"): "-other-val"
    }  # fmt: skip
    other = build_tiny_set(tmp_path / "other", TinySource("other"))
    for split, name in files:
        evaluate_run(path, str(other) if name else None, split)
    for (split, name), view in files.items():
        metrics = json.loads(Path(path, f"metrics{view}.json").read_text())
        assert (metrics["split"], metrics["data"]) == (split, name or "tiny")
        page = Path(path, f"report{view}.html").read_text()
        assert f"{split}: {metrics['n_queries']}" in page and ("optimistic" in page) == (split == "val")


def test_sets_that_are_called_by_their_source_have_the_names_of_their_folders(tiny_set, tmp_path):
    """Every set that is built of a table is called `table`."""
    config = tiny_config(tiny_set, {})
    given = {"a": "table", "b": "table", "c": "folder", "d": None, "e": "../../etc", "f": "birds"}
    views = []
    for folder, name in given.items():
        root = build_tiny_set(tmp_path / folder, TinySource("other"))
        manifest = json.loads((root / "manifest.json").read_text()) | {"name": name}
        (root / "manifest.json").write_text(json.dumps(manifest))
        views.append(view_of(config, ShardSet.open(str(root)), "test"))
    assert views == ["a", "b", "c", "d", "e", "birds"]
    called_val = build_tiny_set(tmp_path / "val", TinySource("val"))
    assert view_of(config, ShardSet.open(str(called_val)), "test") == "set-val"
    assert view_of(config, ShardSet.open(str(tiny_set)), "val") == "val"


def test_the_run_s_own_set_is_that_by_a_link_too(run_on, tiny_set, tmp_path):
    """As where a set was moved to a larger disk."""
    (tmp_path / "link").symlink_to(tiny_set)
    path = run_on(tmp_path / "link")
    evaluate_run(path, data=str(tiny_set), report=False)
    assert Path(path, "metrics.json").exists() and not list(Path(path).glob("metrics-*.json"))


def test_a_run_that_cannot_be_written_is_evaluated_into_a_copy(run_on, tiny_set, tmp_path, monkeypatch, capsys):
    path = run_on(tiny_set)
    before = Path(path, "metrics.json").read_bytes()

    def refused(run: RunDir) -> None:
        if run.path == path:
            raise RunDirectoryError(f"run directory {path} cannot be written: Permission denied.")

    monkeypatch.setattr(RunDir, "check_writable", refused)
    metrics = evaluate_run(path, out=str(tmp_path / "mine.json"))
    assert json.loads((tmp_path / "mine.json").read_text())["initial"] == metrics["initial"]
    assert Path(path, "metrics.json").read_bytes() == before and not Path(path, "report.html").exists()
    assert f"the metrics are in {tmp_path / 'mine.json'} alone" in capsys.readouterr().err
    monkeypatch.setattr(module, "run_features", None)
    with pytest.raises(RunDirectoryError, match=r"cannot be written.*--out FILE"):
        evaluate_run(path)


def test_photos_are_small_in_a_report():
    photo = picture(0, side=400)
    assert len(photo) > module.TILE_BYTES
    shown, ending = module.tile(RawSample(photo, "jpg", {}))
    assert Image.open(io.BytesIO(shown)).size == (320, 320) and ending == "webp" and len(shown) < len(photo)
    for data in (picture(0, side=12), bytes(40_000)):  # one that cannot be decoded was told of before
        assert module.tile(RawSample(data, "jpg", {})) == (data, "jpg")


def test_a_split_without_captions_or_images_is_named(run_on, tiny_set, tmp_path, monkeypatch):
    path = run_on(tiny_set)
    monkeypatch.undo()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for kind, said in (("json", "no sample of val has a caption that can be used, the first: "),
                       ("image", r"none of the \d+ images of val can be used, the first: ")):  # fmt: skip
        other = build_tiny_set(tmp_path / kind, TinySource("other"))
        for i in range(len(ShardSet.open(str(other)).index("val"))):
            if kind == "image":
                damage_image(other, i, "val")
            else:
                replace_json(other, i, "{}", "val")
        with pytest.raises(EvaluationError, match=said):
            evaluate_run(path, data=str(other), workers=0)


def test_a_kind_whose_images_cannot_be_read_is_left_out(run_on, tiny_set, monkeypatch):
    features = module.run_features

    def with_a_lost_kind(*args: Any):
        found, space = features(*args)
        f = found["test"]
        lost = f.queries.objects == f.queries.objects[0]
        f.queries.kinds[lost] = "lost"
        kept = np.flatnonzero(f.image_objects != f.queries.objects[0])
        found["test"] = SplitFeatures(f.index, f.queries, f.image[kept], kept, f.text, ["one"])
        return found, space

    monkeypatch.setattr(module, "run_features", with_a_lost_kind)
    metrics = evaluate_run(run_on(tiny_set))
    assert set(metrics["by_caption_kind"]) == {"name", "sentence"} and metrics["n_excluded"] > 0
    assert metrics["n_excluded"] + sum(k["n_queries"] for k in metrics["by_caption_kind"].values()) == metrics["n_queries"]


def test_a_copy_that_cannot_be_written_is_named_before_anything_is_computed(run_on, tiny_set, tmp_path, monkeypatch):
    path, computed = run_on(tiny_set), tmp_path / "deep" / "metrics.json"
    evaluate_run(path, out=str(computed), report=False)
    assert json.loads(computed.read_text())["split"] == "test"
    monkeypatch.setattr(module, "run_features", None)
    for out, message in [(tmp_path, "it is a folder"), (f"{computed}/below.json", "Not a directory|File exists")]:
        with pytest.raises(StorageError, match=f"--out .* cannot be written: .*({message})"):
            evaluate_run(path, out=str(out))


def test_a_checkpoint_that_goes_while_images_are_encoded_is_enough(run_on, tiny_set, tmp_path, monkeypatch):
    """As where a training that goes on finds a better one."""
    path = run_on(tiny_set)
    monkeypatch.undo()
    run, config, checkpoint = module.open_run(path)

    def references() -> np.ndarray:
        _, space = module.run_features(run, config, checkpoint, str(tiny_set), [])
        return space.similarities(np.eye(space.dim, dtype=np.float32))

    def replaced(*_: object) -> dict[str, SplitFeatures]:
        shutil.rmtree(Path(path, checkpoint.folder))
        return {}

    monkeypatch.setattr(module, "embed_splits", lambda *_: {})
    expected = references()
    monkeypatch.setattr(module, "embed_splits", replaced)
    np.testing.assert_array_equal(references(), expected)
