"""Files that come with mmref without being modules: they lie beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

import os
from pathlib import Path

from mmref.errors import ConfigError
from mmref.storage.locations import expanded, is_url

PACKAGE = Path(__file__).parents[1]


def shipped(name: str) -> str:
    """Path of a file that comes with mmref: `shipped("tune/rows/default.yaml")`."""
    packed = PACKAGE / "shipped" / name  # setup.py puts it there when it builds a wheel
    return str(packed if packed.exists() else PACKAGE.parent / name)


def file_or_name(given: str, folder: str) -> str:
    """The file that is meant by a path, a URL, or the name of one that comes with mmref: `file_or_name("emoji", "configs")`.

    Raises ConfigError where a name is none of those, and where one of those is looked for at a path that does not exist.
    """
    path = expanded(given)
    if is_url(path) or (os.path.exists(path) and not os.path.isdir(path)):
        return path
    names = sorted(file.stem for file in Path(shipped(folder)).glob("*.yaml"))
    if path in names:
        return shipped(f"{folder}/{path}.yaml")
    name = Path(path).stem
    if os.path.basename(path) == path.removesuffix(".yaml"):
        raise ConfigError(f"{given}: there is no such file, and none of that name comes with mmref: {', '.join(names)}.")
    if name in names:
        raise ConfigError(f"{given} cannot be read: No such file or directory. `{name}` alone is the one that comes with mmref.")
    return path
