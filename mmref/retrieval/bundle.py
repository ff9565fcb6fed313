"""The model an index was made with travels inside it: `INDEX/model` is an export, and its fingerprint is in the manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from mmref.config import Config
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import ModelError, ModelMismatchError, SampleError, ShardSetError
from mmref.storage.disk import is_full, sync_files
from mmref.storage.locations import file_stamps, sha256_of

# These files of an export a search needs; the copy for plain transformers stays behind.
FILES = ("config.json", "config.yaml", "model.safetensors", "references.safetensors", "README.md")
CAPTIONS = "reference_captions.json"


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


def write_reference_captions(model: Path, config: Config, object_ids: list[str]) -> None:
    """Keep a caption of each reference's object beside the model, where the training set can still be read."""
    captions: dict[str, str] = {}
    try:
        index = ShardSet.open(config.data.root).index("train")
    except ShardSetError:
        return
    reader, wanted = SampleReader(index), set(object_ids)
    for row, object_id in enumerate(index.object_ids):
        if object_id not in wanted:
            continue
        try:
            texts = reader.read_meta(int(index.object_start[row]))["captions"]
        except SampleError:
            continue
        if texts and isinstance(texts[0], str):
            captions[object_id] = texts[0].strip()
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
