"""mmref: fine-grained text-to-image retrieval with multi-modal references, from a laptop to a Ray cluster.

    import mmref
    model = mmref.load("openai/clip-vit-base-patch32")     # encode sentences and images
    mmref.build_index("photos", "openai/clip-vit-base-patch32", "photo-index")
    mmref.Searcher("photo-index").search("a dog on a beach")
    metrics = mmref.train("clip-finetune", {"data.root": "shards/products", "run_dir": "runs/products"})
    metrics = mmref.evaluate("runs/products", split="val")

Each does what the command of its name does, and raises the errors of `mmref.errors`. Importing mmref imports nothing else:
what a call needs is imported by the call.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, Literal

from mmref.version import __version__ as __version__

if TYPE_CHECKING:
    from mmref.evaluate import Evaluate
    from mmref.export.model import Model
    from mmref.retrieval.manifest import Manifest
    from mmref.retrieval.searcher import Searcher as Searcher
    from mmref.train import Train

    evaluate: Evaluate
    train: Train

__all__ = ["Searcher", "build_index", "evaluate", "load", "train"]


def load(path: str | os.PathLike[str], device: str = "auto") -> Model:
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


def build_index(
    images: str | os.PathLike[str],
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    image_column: str = "image",
    object_column: str = "object_id",
    image_root: str | os.PathLike[str] | None = None,
    id_column: str | None = None,
    allow_outside: bool = False,
    config: str | None = None,
    folders: Literal["auto", "objects", "plain"] = "auto",
    kind: Literal["auto", "flat", "ivf", "hnsw", "ivfpq"] = "auto",
    recall: float = 0.95,
    workers: int | None = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> Manifest:
    """Make a search index of images, for `mmref.Searcher`: what `mmref index` does. The same call again goes on after a kill.

    Args:
        images: a folder with all below it, a shard set, a table (CSV, JSONL, Parquet), or a URL prefix of any of them; Parquet
            files that hold images; a dataset of Hugging Face's `datasets`, its folder or `user/name`.
        model: a pretrained model by hub id or folder, a run of `mmref train`, or a folder of `mmref export`.
        out: the index directory; must not exist yet, or be empty.
        split: of a shard set or dataset; by default all of it.
        image_column: of a table, the column with paths or URLs of images.
        object_column: of a table, the column with object ids, where there is one.
        image_root: of a table, what its paths are relative to; by default its own folder.
        id_column: of a table, the column with the items' ids; by default they are relative paths.
        allow_outside: of a table, take images that lie elsewhere than below `image_root`.
        config: of a dataset that has several.
        folders: what the folders in a folder are: objects; plain: nothing; auto: objects where every image lies in object/image.
        kind: exact search (flat) or approximate (ivf, hnsw, and ivfpq in less memory); auto: exact up to a million images.
        recall: share of the ten nearest, 0 to 1, that an approximate search must find.
        workers: Ray actors that embed, None: one a core. 0, the default: in this process, quickest for a few thousand images.
        device: where images are embedded; auto: a GPU where there is one.

    Returns:
        What the index holds: `items` images with `dim` numbers each; `skipped` could not be read, and skipped.jsonl in the
        index says why.

    Raises:
        SearchIndexError: `out` is not free, or there is no image. ModelError: no such model. SourceError, ShardSetError: a
        damaged table or shard set. ExportError: the run has not been evaluated. StorageError: the disk is full.
    """
    from mmref.cluster.resources import workers_that_fit
    from mmref.retrieval import index
    from mmref.retrieval.images import TableColumns
    from mmref.terminal import arguments

    root = None if image_root is None else arguments.place(os.fspath(image_root))
    return index.create(
        arguments.images(os.fspath(images)),
        arguments.model(os.fspath(model)),
        arguments.local_path(os.fspath(out)),
        split,
        TableColumns(image_column, object_column, root, id_column, allow_outside, config, folders),
        kind,
        workers_that_fit(workers),
        recall,
        device,
    )


def __getattr__(name: str) -> Any:
    """What is imported on first use. `train` and `evaluate` are packages that are functions as well."""
    if name == "Searcher":
        return importlib.import_module("mmref.retrieval.searcher").Searcher
    if name in ("train", "evaluate"):
        return importlib.import_module(f"mmref.{name}")
    raise AttributeError(f"module 'mmref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
