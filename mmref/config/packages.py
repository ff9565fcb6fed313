"""What a config names inside installed packages: a folder (`package://name/path`) or a class of towers (`module:class`).

Importing a module runs its code, so a config that came from elsewhere, in an export, an index or a run, must not choose it:
only modules that somebody here has vouched for are imported. A config that is trained with vouches for its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable
from typing import Any

from mmref.config.tree import ModelConfig
from mmref.errors import ModelError

SCHEME = "package://"
IMPORT = "import"  # key of a `*_config` that names the class which makes the tower
TRUST = "MMREF_TRUST_MODULES"  # variable: modules separated by commas; child processes have it too

_trusted = {"mmref"}


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


def trust(modules: Iterable[str]) -> None:
    """Let configs import from these modules, and from those below them, in this process."""
    _trusted.update(modules)


def trust_own(model: ModelConfig) -> None:
    """Let a config of one's own, or one that `check_imports` has passed elsewhere, import what it names."""
    trust(path.partition(":")[0] for path, _ in _imports(model))


def check_imports(model: ModelConfig) -> None:
    """Raise ModelError where a config that came from elsewhere would import what nobody vouches for."""
    for path, what in _imports(model):
        _check_trusted(path, what)


def _imports(model: ModelConfig) -> list[tuple[str, str]]:
    """(import path, config field) of each tower that has one."""
    towers = {name: getattr(model, f"{name}_config") or {} for name in ("dual", "vision", "text")}
    return [(str(values[IMPORT]), f"model.{name}") for name, values in towers.items() if IMPORT in values]


def _check_trusted(path: str, what: str) -> None:
    module = path.partition(":")[0]
    names = _trusted | {name.strip() for name in os.environ.get(TRUST, "").split(",") if name.strip()}
    if not any(module == name or module.startswith(f"{name}.") for name in names):
        raise ModelError(
            f"{what}: the config wants to import {path!r}, which runs code of the module {module!r}. If you know whose it is, "
            f"set {TRUST}={module}, and start the same command."
        )


def imported(path: str, what: str) -> Any:
    """The class of torch modules that `package.module:class` names. Raises ModelError that says what is missing."""
    from torch import nn

    _check_trusted(str(path), what)
    module, _, name = str(path).partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{what}: import {path!r} fails: {error}. Give `package.module:class` of an installed package."
        ) from error
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ModelError(f"{what}: import {path!r} is no class of torch modules, which makes a tower: {found!r:.100}.")
    return found
