"""The model an index was made with travels inside it: `INDEX/model` is an export, and its fingerprint is in the manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from mmref.config import Config
from mmref.data.sample_reader import SampleReader, SplitIndex
from mmref.data.shard_set import ShardSet
from mmref.errors import ModelError, ModelMismatchError, SampleError, ShardSetError, StorageError
from mmref.storage.disk import is_full, sync_files
from mmref.storage.locations import file_stamps, sha256_of
from mmref.terminal.output import printable
from mmref.terminal.progress import say

# These files of an export a search needs; the copy for plain transformers stays behind.
FILES = ("config.json", "config.yaml", "model.safetensors", "references.safetensors", "README.md")
CAPTIONS = "reference_captions.json"
UNREADABLE = (ShardSetError, StorageError, OSError)  # what a set raises that is gone, or whose storage does not answer here


def bundle_model(source: str, target: Path) -> None:
    """Copy an export to `target`, or export a run or a pretrained model there. Raises ModelError, and ExportError for a run."""
    from mmref.export.write import export_pretrained, export_run
    from mmref.run.models import find_model

    found = find_model(source)
    if found.kind == "export":
        _copy(Path(found.place), target)
        return
    if found.kind == "pretrained":
        export_pretrained(found.place, str(target))
        return
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
        _copy(export_run(found.place, f"{folder}/model"), target)


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        for name in FILES:
            shutil.copyfile(source / name, partial / name)
        shutil.copytree(source / "tokenizer", partial / "tokenizer")
        sync_files(partial)
    except OSError as error:
        if is_full(error):  # says nothing of the export
            raise
        raise ModelError(f"{source} is no whole export: {error}. Write it again with `mmref export`.") from None
    os.rename(partial, target)


def fingerprint(model: Path, tokenizer: bool = True) -> str:
    """SHA-256 over the weights, references, configuration and tokenizer of an export: what features and codes depend on.

    Args:
        tokenizer: False for what the indexes of version 0.1 have in their manifests.
    """
    files = ["model.safetensors", "references.safetensors", "config.yaml", "config.json"]
    digest = hashlib.sha256()
    try:
        names = sorted(os.listdir(model / "tokenizer")) if tokenizer else []
        digest.update("".join(f"{name}\0" for name in names).encode())
        for name in (*files, *(f"tokenizer/{name}" for name in names)):
            digest.update(sha256_of(str(model / name)).encode())
    except OSError as error:
        raise ModelError(f"{model} is no whole export: {error}.") from None
    return digest.hexdigest()


def is_of(model: Path, found: str) -> bool:
    """Whether an export is the one with a fingerprint."""
    return found == fingerprint(model) or found == fingerprint(model, tokenizer=False)


def stamp(model: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of every file of an export: where it is the same, the fingerprint need not be taken again."""
    try:
        return file_stamps(model)
    except OSError as error:
        raise ModelError(f"{model} is no whole export: {error}.") from None


def own_training_split(config: Config, without: str) -> SplitIndex | None:
    """The train split of the set that a model was trained on, which may be on another machine. None where it cannot be read,
    which is said with what is done `without` it."""
    try:
        return ShardSet.open(config.data.root).index("train")
    except UNREADABLE as error:
        _say_unreadable(error, without)
        return None


def _say_unreadable(error: Exception, without: str) -> None:
    say(f"{without}, since the set that the model was trained on cannot be read: {printable(error)}")


def write_reference_captions(model: Path, config: Config, object_ids: list[str]) -> None:
    """Keep a caption of each reference's object beside the model, where the training set can still be read."""
    without = "the references get no captions"
    index = own_training_split(config, without) if object_ids else None
    if index is None:
        return
    wanted = set(object_ids)
    rows = [row for row, object_id in enumerate(index.object_ids) if object_id in wanted]
    captions: dict[str, str] = {}
    try:
        for row, meta in zip(rows, SampleReader(index).read_metas(index.object_start[rows].tolist())):
            texts = [] if isinstance(meta, SampleError) else meta["captions"]
            if texts and isinstance(texts[0], str):
                captions[index.object_ids[row]] = texts[0].strip()
    except UNREADABLE as error:
        _say_unreadable(error, without)
        return
    (model / CAPTIONS).write_text(json.dumps(captions, ensure_ascii=False), "utf-8")


def read_reference_captions(model: Path) -> dict[str, str]:
    """Object id -> a caption of it, {} where none were kept."""
    path = model / CAPTIONS
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def check_model(index: Path, wanted: str) -> None:
    """Raise ModelMismatchError when an index's `model/` has not the fingerprint of what its features were made with."""
    if not is_of(index / "model", wanted):
        found = fingerprint(index / "model")
        raise ModelMismatchError(
            f"{index / 'model'} has fingerprint {found[:12]}, the features were made with {wanted[:12]}: the model "
            "was replaced. Make the index again with the new one."
        )
