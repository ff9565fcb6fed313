"""mmref: fine-grained text-to-image retrieval with multi-modal references, from a laptop to a Ray cluster."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

from mmref.version import __version__ as __version__

if TYPE_CHECKING:
    from mmref.export.model import Model


def load(path: str | PathLike[str], device: str = "auto") -> Model:
    """A model to encode with: `mmref.export.model.Model`.

    Args:
        path: a pretrained model by hub id ("openai/clip-vit-base-patch32", also with "hf://" before it) or folder, a folder of
            `mmref export` or its hub id, or an evaluated run of `mmref train`.
        device: as PyTorch names it; "auto": the GPU where there is one.

    Raises:
        ModelError: there is no such model, or no such device. ExportError: the run has not been evaluated.
    """
    from mmref.export.loading import load_any

    return load_any(path, device)


def __getattr__(name: str) -> Any:
    """`mmref.Searcher`, loaded on first use: it needs torch."""
    if name == "Searcher":
        from mmref.retrieval.searcher import Searcher

        return Searcher
    raise AttributeError(f"module 'mmref' has no attribute {name!r}")
