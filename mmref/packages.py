"""What a config names inside installed packages: a folder (`package://name/path`) or a function (`module:function`)."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

from mmref.errors import ModelError

SCHEME = "package://"


def local_name(name: str) -> str:
    """`package://PACKAGE/path` as the folder on this machine; any other name as it is. Raises ModelError.

    The package is found without being imported: what it would import itself need not be there.
    """
    if not name.startswith(SCHEME):
        return name
    package, _, path = name.removeprefix(SCHEME).partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"{name}: there is no package `{package}` here. Install it with pip (on every node).")
    folder = os.path.join(next(iter(spec.submodule_search_locations)), *path.split("/"))
    if not os.path.isdir(folder):
        raise ModelError(f"{name}: the package `{package}` has no folder {path!r}; looked at {folder}.")
    return folder


def imported(path: str, what: str) -> Callable[..., Any]:
    """The function that `package.module:function` names. Raises ModelError that says what is missing."""
    module, _, name = str(path).partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{what}: import {path!r} fails: {error}. Give `package.module:function` of an installed package."
        ) from error
    if not callable(found):
        raise ModelError(f"{what}: import {path!r} is a {type(found).__name__}, not a function that makes a tower.")
    return found
