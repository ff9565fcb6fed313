"""What a program calls: `mmref.load`, `build_index`, `Searcher`, `evaluate`, `train`, as their commands do it."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.pretrained import PHOTOGRAPHS, save_pretrained

import mmref
from mmref.config import Config, load_config
from mmref.errors import ConfigError, ExtraMissingError, ModelError, PathError, SearchIndexError, UsageError

LIGHT = """
import sys
before = set(sys.modules)
import mmref
new = set(sys.modules) - before
found = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
assert found == {"mmref"}, found
assert {name for name in new if name.startswith("mmref")} == {"mmref", "mmref.version"}, new
assert set(mmref.__all__) <= set(dir(mmref))
for function in (mmref.load, mmref.build_index, mmref.train, mmref.evaluate):
    assert callable(function)
assert not {"numpy", "torch", "ray", "yaml"} & set(sys.modules), "nor does asking for them import more"
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained("clip", tmp_path_factory.mktemp("hub") / "clip")


def test_importing_mmref_imports_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT], text=True, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_packages_are_functions_whatever_of_them_is_imported() -> None:
    from ray import cloudpickle

    import mmref.evaluate.metrics
    import mmref.train.stop

    for function, package in ((mmref.train, "mmref.train"), (mmref.evaluate, "mmref.evaluate")):
        assert callable(function) and function is sys.modules[package]
        assert pickle.loads(pickle.dumps(function)) is function
        assert pickle.loads(cloudpickle.dumps(lambda function=function: function))() is function
        assert inspect.signature(function).parameters and (function.__call__.__doc__ or "").count("Raises:") == 1
    assert mmref.evaluate.metrics.METRIC_NAMES


def test_an_index_is_made_and_searched(clip: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    for i, data in enumerate(PHOTOGRAPHS):
        (photos / f"{i}.jpg").write_bytes(data)
    (photos / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    made = mmref.build_index(photos, clip, out, device="cpu")
    assert (made.items, made.skipped, made.dim) == (len(PHOTOGRAPHS), 1, 12)
    searcher = mmref.Searcher(out, device="cpu")
    assert searcher.search(image=PHOTOGRAPHS[2], top=1)[0].id == "2.jpg"
    assert mmref.load(clip, "cpu").encode_text(["a bird"]).shape == (1, 12)
    with pytest.raises(SearchIndexError, match="exists already"):
        mmref.build_index(photos, clip, out)
    with pytest.raises(PathError, match="is a URL"):
        mmref.build_index(photos, clip, "s3://bucket/index")


def test_choices_that_there_are_none_of_are_named_before_anything_is_embedded(clip: Path, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"kind": "fancy"}, SearchIndexError, "kind is 'fancy': give one of auto, flat, ivf, hnsw, ivfpq"),
        ({"folders": "some"}, SearchIndexError, "folders is 'some': give one of auto, objects, plain"),
        ({"recall": 95}, SearchIndexError, "recall is 95: give a share"),
        ({"workers": -1}, UsageError, "workers is -1: give a number"),
    ]
    for given, kind, said in wrong:
        with pytest.raises(kind, match=said):
            mmref.build_index(tmp_path, clip, tmp_path / "index", **given)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ModelError, match="the device mps cannot be used"):
        mmref.load(clip, device="mps")


def test_a_model_is_scored(clip: Path, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    run = tmp_path / "run"
    metrics = mmref.evaluate(clip, tiny_set, "val", run_dir=run, out=tmp_path / "copy.json", workers=0, report=False)
    assert metrics["split"] == "val" and metrics["checkpoint_step"] == 0
    assert metrics == json.loads((tmp_path / "copy.json").read_text()) == json.loads((run / "metrics-val.json").read_text())
    assert "initial" in metrics._repr_html_()
    with pytest.raises(ModelError, match="is no run, which would have a shard set of its own"):
        mmref.evaluate(clip)


def test_the_page_of_the_docs_runs_as_it_is(clip: Path, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block in one session; the training is stood in for by a run without steps."""
    from mmref.train import trainer

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.chdir(tmp_path)
    for i, data in enumerate(PHOTOGRAPHS * 2):
        path = tmp_path / "photos" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    for copy in ("photos/dog.jpg", "a.jpg", "b.jpg"):
        shutil.copy(path, tmp_path / copy)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "products").symlink_to(tiny_set)
    monkeypatch.setattr(trainer, "train", lambda config, _: shutil.copytree("runs/zero-shot", config.run_dir))
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 6 and "openai/clip-vit-base-patch32" in blocks[0]
    session: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec("\n".join(blocks).replace("openai/clip-vit-base-patch32", str(clip)), session)
    assert session["scores"].shape == (1, 2) and session["metrics"] == "runs/products"
    assert len(mmref.Searcher("better-index")) == 17
    said = printed.getvalue()
    assert len(re.findall(r"^[123] \w+\.jpg -?[01]\.\d+ ", said, re.MULTILINE)) == 3, said
    assert re.match(r"ModelError \S*nowhere is not there", said.splitlines()[-1]), said


def test_a_training_gets_the_config_of_the_same_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmref.train import trainer

    given: list[tuple[Config, bool]] = []
    monkeypatch.setattr(trainer, "train", lambda *args: given.append(args))
    assert mmref.train("smoke", {"train.workers": 2}, final_evaluation=False) is None
    assert given == [(load_config(["--config", "smoke", "--train.workers", "2"]), False)]
    with pytest.raises(ConfigError, match="unknown config key"):
        mmref.train("smoke", {"train.worker": 2})
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ExtraMissingError, match=r"mmref.train needs the extra `train`, and deepspeed is not installed"):
        mmref.train("smoke")
