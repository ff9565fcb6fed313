"""Ray's private names: a version of Ray that has lost one is told here, with what mmref can no longer do."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest
import ray

from mmref.cluster import ray_private

PACKAGE = Path(ray_private.__file__).parents[1]
PRIVATE = re.compile(r"ray(\.\w+)*\._\w|^_internal_kv")


@pytest.mark.parametrize("path", ray_private.NAMES)
def test_the_name_is_there(path):
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"Ray {ray.__version__} has no {path}: mmref cannot {ray_private.NAMES[path]} ({error})")
    assert found is not None


def test_derived_classes_are_found_by_name_and_others_are_not():
    assert ray_private.ExecutionCallback.__name__ == "ExecutionCallback"
    with pytest.raises(AttributeError, match="no_such_name"):
        ray_private.no_such_name  # noqa: B018


def private_names(source: str) -> set[str]:
    """Dotted names of a module that are private to Ray."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "ray":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import" in node.value:
            found |= set(re.findall(r"ray[\w.]*", node.value))
    return {name for name in found if PRIVATE.search(name)}


def test_no_other_module_knows_them():
    assert private_names("from ray._raylet import GcsClient") and private_names("ray._private.state.jobs()")
    assert private_names("from ray.experimental.internal_kv import _internal_kv_get")
    others = [p for p in PACKAGE.rglob("*.py") if p.name != "ray_private.py"]
    found = {str(p.relative_to(PACKAGE)): names for p in others if (names := private_names(p.read_text("utf-8")))}
    assert len(others) > 100 and not found
