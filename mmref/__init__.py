"""mmref: fine-grained text-to-image retrieval with multi-modal references, from a laptop to a Ray cluster."""

__version__ = "0.1.0"


def load(path, device="cpu"):  # type: ignore[no-untyped-def]
    """The model of a folder written by `mmref export`: `mmref.inference.Model`. Raises ModelError."""
    from mmref.inference import load

    return load(path, device)


def __getattr__(name):  # type: ignore[no-untyped-def]
    """`mmref.Searcher`, loaded on first use: it needs torch."""
    if name == "Searcher":
        from mmref.retrieval.searcher import Searcher

        return Searcher
    raise AttributeError(f"module 'mmref' has no attribute {name!r}")
