"""Folders and functions of installed packages by name."""

from __future__ import annotations

import sys

import pytest
import yaml
from PIL import Image
from support.tiny_run import make_run

import mmref
from mmref.config import packages
from mmref.config.packages import check_imports, imported, local_name
from mmref.errors import ModelError
from mmref.evaluate.evaluation import open_run
from mmref.explain.explained_run import ExplainedRun
from mmref.export.write import export_run
from mmref.retrieval import index
from mmref.train.trainer import check_inputs


def test_other_names_stay():
    for name in ("openai/clip-vit-base-patch16", "/a/b", "s3://bucket/set"):
        assert local_name(name) == name


def test_a_folder_of_a_package_is_found_without_importing_it(foreign_towers, tmp_path):
    assert local_name("package://tiny_words/weights/bert") == str(tmp_path / "site" / "tiny_words" / "weights" / "bert")


@pytest.mark.parametrize("name, said", [
    ("package://no_such_package/model", "no package `no_such_package`"), ("package://tiny_words/else", "no folder 'else'"),
    ("package://tiny_towers/model", "no package `tiny_towers`"), ("package://../model", "no package `..`"),
])  # fmt: skip
def test_what_is_missing_is_said(foreign_towers, name, said):
    with pytest.raises(ModelError, match=said):
        local_name(name)


@pytest.mark.parametrize("path, said", [
    ("tiny_towers.no_such:lite0", "No module named 'tiny_towers.no_such'"), ("tiny_towers:else_", "no attribute 'else_'"),
    ("tiny_towers", "package.module:class"), ("tiny_towers:number", "is no class of torch modules.*: 3"),
    ("tiny_words:anything", "found without being imported"),
])  # fmt: skip
def test_what_cannot_be_imported_is_said(foreign_towers, path, said):
    with pytest.raises(ModelError, match=rf"model\.vision: import .*{said}"):
        imported(path, "model.vision")


EVIL = """
import pathlib, torch
pathlib.Path(__file__).with_name("ran").touch()
class Tower(torch.nn.Module):
    pass
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch, make_config):
    """A run and an export whose configs somebody has made import a module of theirs; (run, export, what its import leaves)."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_towers.py").write_text(EVIL)
    run = tmp_path / "run"
    make_run(make_config({}), str(run), {})
    export = export_run(str(run), str(tmp_path / "export"))
    yield run, export, tmp_path / "ran"
    sys.modules.pop("evil_towers", None)


def poison(folder, tower):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["vision_config"] = tower
    path.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("tower", [
    {"import": "evil_towers:Tower"}, {"import": "subprocess:check_output", "args": ["touch", "ran"]},
    {"import": "mmref.cli:main"}, {"import": "mmrefs:Tower"},
], ids=lambda tower: tower["import"])  # fmt: skip
def test_a_model_of_somebody_else_runs_no_code_when_it_is_opened(stranger, tower, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run, export, ran = stranger
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    poison(run, tower)
    poison(export, tower)
    module = tower["import"].partition(":")[0]
    said = "no class of torch modules" if module.startswith("mmref.") else f"runs code of .*MMREF_TRUST_MODULES={module},"
    for act in (
        lambda: mmref.load(export),
        lambda: index.create(str(tmp_path), str(export), str(tmp_path / "index"), workers=0),
        lambda: export_run(str(run), str(tmp_path / "again")),
        lambda: ExplainedRun(str(run)),
    ):
        with pytest.raises(ModelError, match=rf"model\.vision: .*{said}"):
            act()
    if not module.startswith("mmref."):
        with pytest.raises(ModelError, match=said):
            open_run(str(run))
    assert not ran.exists()


def test_who_vouches_for_a_module_may_use_it(stranger, monkeypatch):
    _, export, ran = stranger
    poison(export, {"import": "evil_towers:Tower"})
    monkeypatch.setenv("MMREF_TRUST_MODULES", "else,evil_towers")
    with pytest.raises(ModelError, match="has no `config`"):  # it is no tower, but it was asked
        mmref.load(export)
    assert ran.exists()


def test_a_config_that_is_trained_with_vouches_for_itself(foreign_towers, make_config, monkeypatch):
    monkeypatch.delenv("MMREF_TRUST_MODULES")
    monkeypatch.setattr(packages, "_trusted", {"mmref"})
    config = make_config(foreign_towers)
    with pytest.raises(ModelError, match="runs code of"):
        check_imports(config.model)
    check_inputs(config)
    check_imports(config.model)


def test_an_export_does_not_reach_for_models_elsewhere(stranger):
    _, export, _ = stranger
    path = export / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"] |= {"vision": "somebody/model", "vision_config": None}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ModelError, match="somebody/model from elsewhere"):
        mmref.load(export)
