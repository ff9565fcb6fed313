"""mmref: fine-grained text-to-image retrieval with multi-modal references, from a laptop to a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmref.version import __version__ as __version__

if TYPE_CHECKING:
    from mmref.export.model import Model


def load(path: str, device: str = "cpu") -> Model:
    """The model of a folder written by `mmref export`: `mmref.export.model.Model`. Raises ModelError."""
    from mmref.export.model import load

    return load(path, device)


def __getattr__(name: str) -> Any:
    """`mmref.Searcher`, loaded on first use: it needs torch."""
    if name == "Searcher":
        from mmref.retrieval.searcher import Searcher

        return Searcher
    raise AttributeError(f"module 'mmref' has no attribute {name!r}")
