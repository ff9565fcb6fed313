"""Files that come with mmref without being modules: they lie beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def shipped(name: str) -> str:
    """Path of a file that comes with mmref: `shipped("tune/rows/default.yaml")`."""
    packed = PACKAGE / "shipped" / name  # setup.py puts it there when it builds a wheel
    return str(packed if packed.exists() else PACKAGE.parent / name)
