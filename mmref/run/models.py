"""What stands where a model is asked for: a run, an export, or a pretrained model by hub id or folder.

A model that is no run becomes one without a step, with a checkpoint of its weights and references, where a command keeps
something beside it: metrics, a report, references. So each of them has one kind of thing to work on.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mmref.config import Config, config_hash, dump_yaml, from_dict
from mmref.config.inputs import settled
from mmref.config.packages import check_imports
from mmref.data.shard_set import ShardSet
from mmref.data.tokens import Tokens, load_tokens
from mmref.errors import HubError, ModelError, RunDirectoryError, ShardSetError
from mmref.model.mmref import MMRef, build_model
from mmref.run.checkpoints import FOLDER, best_checkpoint, inspect_checkpoints, list_checkpoints, saved_buffers
from mmref.run.directory import DATA, TOKENIZER, RunDir
from mmref.run.exported import exported_rows, is_export, read_export
from mmref.run.row_file import pack_ids
from mmref.run.tensor_files import write_file
from mmref.storage.hub import SCHEME, hub_file, hub_folder, hub_id
from mmref.storage.locations import absolute, file_stamps, folder_name, is_url
from mmref.version import __version__

START = "start"  # in a run that begins with the weights of a model which is no run: that model as one
SOURCE = "source.json"  # of a run without steps: the model that it was made of
THREE = "a run directory of `mmref train`, a folder of `mmref export`, or a pretrained model (hub id or folder)"


@dataclass(frozen=True)
class ModelSource:
    """A model that was asked for: `place` is the path or URL of a run, the folder of an export, or what transformers loads."""

    kind: Literal["run", "export", "pretrained"]
    place: str


def find_model(given: str) -> ModelSource:
    """What a model's name, path or URL is. Raises ModelError, HubError: none of the three."""
    if is_url(given) and not given.startswith(SCHEME):
        return ModelSource("run", given) if not given.startswith("package://") else ModelSource("pretrained", given)
    if os.path.isdir(given):
        return _of_folder(Path(absolute(given)))
    repository = hub_id(given)
    if repository is None:
        raise ModelError(f"{given} is not there: give {THREE}.")
    card = hub_file(given, "config.json")
    if card is None:
        raise HubError(f"{repository} has no config.json on the hub, so it is no model that transformers or mmref loads.")
    if is_export(_read(Path(card))):
        return ModelSource("export", hub_folder(given))
    # transformers knows no name of a revision
    return ModelSource("pretrained", hub_folder(given) if "@" in repository else repository)


def has_references(source: ModelSource) -> bool:
    """Whether a model brings references, and not just rows that nothing has trained. Raises CheckpointError for a run without a
    checkpoint."""
    if source.kind == "run":
        run = RunDir(source.place)
        return int(best_checkpoint(run).meta["bank"]["objects"]) > 0 and run.read_config().loss.uses_references
    return source.kind == "export" and exported_rows(Path(source.place))


def _of_folder(folder: Path) -> ModelSource:
    card = _read(folder / "config.json")
    if is_export(card):
        return ModelSource("export", str(folder))
    if card and card.get("model_type"):
        return ModelSource("pretrained", str(folder))
    if (folder / "config.yaml").exists():
        return ModelSource("run", str(folder))
    raise ModelError(f"{folder} is none of these: {THREE}.")


def _read(path: Path) -> dict[str, Any] | None:
    """What the config.json of a model holds, None where there is none. Raises ModelError where it is damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds no names and values, but a {type(found).__name__}")
    except OSError:
        return None
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}. Export the run again, or copy or download the model again.") from None
    return found


def pretrained_config(name: str) -> Config:
    """The config of a pretrained dual encoder as it is, with everything as its own files say. Raises ModelError."""
    return settled(from_dict({"model": {"dual": name}, "loss": {"w_guide": 0.0}}, name))


@dataclass(frozen=True)
class Parts:
    """A model in memory, with the references it has so far."""

    config: Config
    module: MMRef
    tokens: Tokens
    references: np.ndarray  # (m, K, d)
    object_ids: list[str]


def load_pretrained(name: str) -> Parts:
    """A pretrained dual encoder, by hub id or folder. Raises ModelError."""
    config = pretrained_config(name)
    tokens = load_tokens(config)
    module = build_model(config, tokens.vocab_size).eval()
    return Parts(config, module, tokens, np.zeros((0, config.reference.per_object, module.embed_dim), np.float32), [])


def load_parts(source: ModelSource) -> Parts:
    """An export or a pretrained model in memory. Raises ModelError."""
    if source.kind == "pretrained":
        return load_pretrained(source.place)
    found = read_export(Path(source.place))
    rows, config = found.references, found.config
    check_imports(config.model)
    if rows is None:
        rows = np.zeros((0, config.reference.per_object, found.module.embed_dim), np.float32)
    return Parts(config, found.module, found.tokens, rows, found.object_ids)


# -- a run without steps -----------------------------------------------------------------------------------------------


def as_run(given: str, data: str | None, run_dir: str | None = None) -> str:
    """The run directory of a model: a run's own, or one without a step that is made of an export or pretrained model.

    Args:
        given: as of `find_model`.
        data: the shard set that the new run is of; a run has its own.
        run_dir: where it is made, by default runs/NAME. One that was made of the same model before is taken as it is, and made
            anew where the model's files have changed since.

    Raises:
        ModelError: there is no such model, or a new run lacks a shard set. RunDirectoryError: another run is in the place, or
            one of the model as it was, whose references were changed.
    """
    found = find_model(given)
    if found.kind == "run":
        return absolute(found.place)
    if data is None:
        raise ModelError(f"{given} is no run, which would have a shard set of its own: give one with `--data`.")
    run = RunDir(run_dir or f"runs/{folder_name(found.place if found.kind == 'pretrained' else given)}")
    source = _source(found, given)
    with run.held():
        if run.exists("config.yaml"):
            _check_same(run, source)
            _drop_changed(run, source)
        run.write_text(SOURCE, json.dumps(source))
        if not list_checkpoints(run):  # what an interrupted call left is written over
            _write_run(run, load_parts(found), data, copies_tokenizer=found.kind == "export", version=source["files"])
    return run.path


def config_on(run: RunDir, data: str | None) -> Config:
    """A run's config, whose shard set is `data` where that is the run's own in another place. Raises as `RunDir.read_config`,
    and ShardSetError for a `data` that is none."""
    config = run.read_config()
    if data and _has_moved(run, config, data):
        config.data.root = absolute(data)
    return config


def _has_moved(run: RunDir, config: Config, data: str) -> bool:
    """Whether a run's shard set has gone from its place, and `data` is that set, as far as the run knows its contents."""
    if run.exists(SOURCE):  # nothing was trained on its set
        return False
    if run.exists(DATA) and run.read_text(DATA).split()[:1] != [ShardSet.open(data).fingerprint]:
        return False
    try:
        ShardSet.open(config.data.root)
    except ShardSetError:
        return True
    return False


def start_of_training(config: Config) -> str:
    """The model whose weights a training of the config starts from; empty where they are random."""
    return config.train.start_from or config.model.dual


def start_of(config: Config, run: RunDir) -> RunDir:
    """The run whose weights a training of `train.start_from` begins with."""
    return RunDir(run.join(START)) if run.exists(f"{START}/{SOURCE}") else RunDir(config.train.start_from)


def source_of(given: str) -> dict[str, str]:
    """What is kept of a model beside what was made of it: its name as `model`, and as `files` what is another text once its
    files are others. Raises as `find_model`, and CheckpointError for a run without a checkpoint."""
    return _source(find_model(given), given)


def is_of(kept: Mapping[str, Any], given: str) -> bool:
    """Whether `source_of` a model, kept before, is of that model as it is now. Raises as `source_of`."""
    now = source_of(given)
    return kept.get("model") in (given, now["model"]) and _same_files(kept, now)


def _source(found: ModelSource, given: str) -> dict[str, str]:
    name = absolute(given) if os.path.isdir(given) else str(hub_id(given) or given)
    return {"model": name, "files": _files(found, given)}


def _files(found: ModelSource, given: str) -> str:
    """A text that changes with the files of a model; empty for one of the hub that transformers fetches by itself."""
    if found.kind == "run":
        return best_checkpoint(RunDir(found.place)).folder
    if not os.path.isdir(found.place):
        return ""
    if not os.path.isdir(given):  # in the cache of the hub, whose folders are named by the commit
        return folder_name(found.place)
    stamps = [stamp for stamp in file_stamps(Path(found.place)) if not stamp[0].endswith(".md")]  # a card may be edited
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()[:12]


def _same_files(kept: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return bool(kept.get("files", now["files"]) == now["files"])  # versions before kept the name alone


def _kept_source(run: RunDir) -> dict[str, Any]:
    return run.read_fields(SOURCE) or {"model": "a training"}


def _check_same(run: RunDir, source: dict[str, str]) -> None:
    before = _kept_source(run)
    if before["model"] != source["model"]:
        raise RunDirectoryError(
            f"{run.path} is a run of {before['model']}, and would become one of {source['model']}: give another `--run_dir`."
        )


def _drop_changed(run: RunDir, source: dict[str, str]) -> None:
    """Remove the copy of a model whose files have changed since. Raises RunDirectoryError where more than that copy would go."""
    if _same_files(_kept_source(run), source):
        return
    # `mmref references` notes in a checkpoint that it was there.
    if any("removed" in info.meta or info.step for info, _ in inspect_checkpoints(run)):
        raise RunDirectoryError(
            f"the files of {source['model']} have changed since {run.path} was made of it, and the references that were added to "
            "that run, or removed from it, would be lost: give another `--run_dir`."
        )
    run.remove(FOLDER)
    run.remove(TOKENIZER)


def _write_run(run: RunDir, parts: Parts, data: str, copies_tokenizer: bool, version: str) -> None:
    """Write config and checkpoint; the list of the checkpoint's files comes last.

    The checkpoint is named by the `version` of the model's files, so that metrics of the model as it was are not taken for
    those of the present one.
    """
    config = parts.config
    config.data.root, config.run_dir = absolute(data), run.path
    if copies_tokenizer:  # an export's is in its own folder
        config.data.tokenizer = run.join(TOKENIZER)
        for name, text in _tokenizer_files(parts.tokens).items():
            run.write_bytes(f"{TOKENIZER}/{name}", text)
    run.write_text("config.yaml", dump_yaml(config))
    folder = f"{FOLDER}/step-{0:08d}-{version or 'source'}"
    weights = {name: p.detach().contiguous() for name, p in parts.module.named_parameters()}
    weights |= {name: buffer.detach().contiguous() for name, buffer in saved_buffers(parts.module).items()}
    rows: dict[str, Tensor] = {"rows": torch.from_numpy(np.ascontiguousarray(parts.references))}
    rows |= pack_ids(pa.array(parts.object_ids, pa.large_string()))
    files = {
        f"{kind}-0.safetensors": write_file(run, f"{folder}/{kind}-0.safetensors", tensors, 0)
        for kind, tensors in (("model", weights), ("references", rows))
    }
    objects, per_object, dim = parts.references.shape
    meta = {
        "step": 0, "score": 0.0, "val": {}, "config_hash": config_hash(config), "seed": config.train.seed, "world": 1,
        "version": __version__, "bank": {"objects": objects, "per_object": per_object, "dim": dim}, "files": files,
    }  # fmt: skip
    run.write_text(f"{folder}/meta.json", json.dumps(meta, indent=1))


def _tokenizer_files(tokens: Tokens) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory(prefix="mmref-") as folder:
        tokens.tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
