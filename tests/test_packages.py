"""Folders and functions of installed packages by name."""

from __future__ import annotations

import pytest

from mmref.errors import ModelError
from mmref.packages import imported, local_name


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
    ("no_such_package:lite0", "No module named 'no_such_package'"), ("tiny_towers:else_", "no attribute 'else_'"),
    ("tiny_towers", "package.module:function"), ("tiny_towers:number", "is a int, not a function"),
    ("tiny_words:anything", "found without being imported"),
])  # fmt: skip
def test_what_cannot_be_imported_is_said(foreign_towers, path, said):
    with pytest.raises(ModelError, match=rf"model\.vision: import .*{said}"):
        imported(path, "model.vision")
