"""Checkpoints of a run as they are read: complete ones found, verified, brought to this machine, their tensors loaded.

How they are laid out and written: mmref/train/checkpoint_files.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mmref.errors import CheckpointError
from mmref.model.lora import below_adapters
from mmref.model.mmref import TRAINING_ONLY
from mmref.run.directory import RunDir
from mmref.run.row_file import StoredReferences, row_files
from mmref.storage.tensor_file import Hashing, sha256_of_rest

FOLDER = "checkpoints"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, in a file of the optimizer
AVERAGE = "ema"  # of the weights: with `train.ema` a file of the model has it, and one of the optimizer the weights of training
TRAINED = "weight"
BUFFER = "buffer:"  # begins its name in a file of the model
PAIRS = "pairs"  # losses and labels of `loss.align: rde`, in a file of the optimizer
KINDS = ("model", "optimizer", "references")
DOWNLOADS = 4  # files that a process downloads at a time


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint of a run: its folder inside the run directory, and meta.json."""

    folder: str
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def score(self) -> float:
        return float(self.meta.get("score") or 0.0)

    def files(self, kinds: tuple[str, ...] = KINDS) -> dict[str, dict[str, Any]]:
        """{name: {"bytes", "sha256"}} of the files of some kinds."""
        return {name: found for name, found in self.meta["files"].items() if name.split("-")[0] in kinds}


# -- finding ---------------------------------------------------------------------------------------------------------


def checkpoint_folders(run: RunDir) -> list[str]:
    """Names of the folders of a run's checkpoints, finished or not. A file beside them, such as an archive, is somebody's own."""
    return [name for name in run.list(FOLDER) if name.startswith("step-") and run.is_folder(f"{FOLDER}/{name}")]


def list_checkpoints(run: RunDir) -> list[CheckpointInfo]:
    """Complete checkpoints of a run by step; half-written ones are passed over."""
    return [info for info, problems in inspect_checkpoints(run) if not problems]


def inspect_checkpoints(run: RunDir) -> list[tuple[CheckpointInfo, list[str]]]:
    """Checkpoints of a run by step, each with what is wrong with its files by their sizes; `fetched` reads them too.

    A folder without meta.json was never finished, and is left out.
    """
    found = [one for name in checkpoint_folders(run) if (one := _inspect(run, f"{FOLDER}/{name}"))]
    return sorted(found, key=lambda one: one[0].step)


def _inspect(run: RunDir, folder: str) -> tuple[CheckpointInfo, list[str]] | None:
    where = f"{folder}/meta.json"
    try:
        text = run.read_bytes(where)
    except FileNotFoundError:
        return None
    try:
        meta = {**(found := json.loads(text)), "step": int(found["step"])}
        expected = {name: file["bytes"] for name, file in meta["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, no UTF-8, or other fields
        step = folder.rpartition("step-")[2].partition("-")[0]
        meta = {"step": int(step) if step.isdigit() else 0, "files": {}}
        return CheckpointInfo(folder, meta), [f"{run.join(where)} is damaged: it is no list of a checkpoint's files"]
    there = run.sizes(folder)
    problems = []
    for name, size in expected.items():
        if name not in there:
            problems.append(f"{run.join(folder, name)} is gone")
        elif there[name] != size:
            problems.append(f"{run.join(folder, name)} is damaged: it has {there[name]:,} bytes, {size:,} were written")
    return CheckpointInfo(folder, meta), problems


def has_checkpoints(run: RunDir) -> bool:
    """Whether a checkpoint of a run was ever complete, though it may be damaged by now: then its training is not begun anew."""
    return bool(inspect_checkpoints(run))


def latest_checkpoint(run: RunDir) -> CheckpointInfo | None:
    """The last complete checkpoint, None where there is none."""
    found = list_checkpoints(run)
    return found[-1] if found else None


def best_checkpoint(run: RunDir) -> CheckpointInfo:
    """The complete checkpoint with the best val score, the later one on a tie. Raises CheckpointError."""
    found = list_checkpoints(run)
    if not found:
        raise CheckpointError(
            f"no complete checkpoint in {run.join(FOLDER)}: found {run.list(FOLDER) or 'nothing'}. "
            "Give the run directory of a finished or running `mmref train`."
        )
    return max(found, key=lambda info: (info.score, info.step))


# -- reading ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def fetched(run: RunDir, info: CheckpointInfo, *kinds: str) -> Iterator[str]:
    """A local folder with a checkpoint's files of some kinds, verified. Raises CheckpointError for a damaged one."""
    with local_folder(run, info) as folder:
        if problems := bring(run, info, folder, info.files(kinds)):
            raise CheckpointError(
                f"{problems[0]} ({len(problems)} damaged files in {info.folder}). Remove that folder to use the "
                "checkpoint before it."
            )
        yield folder


@contextlib.contextmanager
def local_folder(run: RunDir, info: CheckpointInfo) -> Iterator[str]:
    if run.local:
        yield run.inner(info.folder)
        return
    folder = tempfile.mkdtemp(prefix="mmref-checkpoint-")
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def bring(run: RunDir, info: CheckpointInfo, folder: str, names: Iterable[str]) -> list[str]:
    """Verify files of a checkpoint and, behind a URL, download them, some at a time; what is wrong."""

    def one(name: str) -> str:
        where, expected = f"{info.folder}/{name}", info.meta["files"][name]["sha256"]
        try:
            found = run.read_stream(where, sha256_of_rest if run.local else _downloader(f"{folder}/{name}"))
        except FileNotFoundError:
            return f"{run.join(where)} is gone"
        return "" if found == expected else (
            f"{run.join(where)} is damaged: its SHA-256 is {found}, {expected} was written"
        )  # fmt: skip

    with ThreadPoolExecutor(1 if run.local else DOWNLOADS, thread_name_prefix="mmref-download") as pool:
        return [problem for problem in pool.map(one, names) if problem]


def _downloader(path: str) -> Callable[[Any], str]:
    def download(source: Any) -> str:
        with open(path, "wb") as target:
            hashing = Hashing(target)
            while piece := source.read(1 << 26):
                hashing.write(piece)
        return hashing.sha256

    return download


def load_model(folder: str, model: torch.nn.Module) -> None:
    """Restore the weights alone into a plain module, for evaluation: without those of training alone. Raises CheckpointError."""
    tensors, left_out = TensorFolder(folder, "model"), below_adapters(model)
    saved: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if n not in left_out}
    saved |= saved_buffers(model)
    check_fits(tensors, {n: tuple(t.shape) for n, t in saved.items()}, folder, TRAINING_ONLY)
    with torch.no_grad():
        for name, tensor in saved.items():
            tensor.copy_(tensors.get(name))


def load_references(folder: str, meta: dict[str, Any]) -> Tensor:
    """All references (m, K, d) of a checkpoint in fp32: mapped, or read once, as of `StoredReferences.array`."""
    return torch.from_numpy(StoredReferences(folder, meta).array())


def load_object_ids(folder: str, meta: dict[str, Any]) -> list[str]:
    """Ids of the objects behind `load_references`' rows."""
    with row_files(folder, meta) as files:
        return [object_id for file in files for object_id in file.object_ids.to_pylist()]


class TensorFolder:
    """Tensors by name over the safetensors files of all ranks, read one at a time."""

    def __init__(self, folder: str, *kinds: str) -> None:
        self.files: dict[str, Any] = {}
        for name in sorted(os.listdir(folder)):
            if name.endswith(".safetensors") and name.split("-")[0] in kinds:
                handle = safe_open(f"{folder}/{name}", "pt")
                self.files |= dict.fromkeys(handle.keys(), handle)

    def get(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def state_of(self, name: str) -> dict[str, Tensor]:
        """What training goes on with: {"weight"}, Adam's moments, and the average of the weight where one was kept."""
        moments = {key: self.get(f"{name}/{key}") for key in MOMENTS if f"{name}/{key}" in self.files}
        if f"{name}/{TRAINED}" in self.files:
            return {"weight": self.get(f"{name}/{TRAINED}"), AVERAGE: self.get(name), **moments}
        return {"weight": self.get(name), **moments}


def check_fits(tensors: TensorFolder, shapes: dict[str, tuple[int, ...]], folder: str, spare: tuple[str, ...] = ()) -> None:
    """Raise CheckpointError that names the first tensors that are missing or of another shape, or parameters that are unknown.

    Parameters whose names begin with one of `spare` may be saved without being wanted; so may buffers.
    """
    wrong = [f"missing {n}" for n in shapes if n not in tensors.files]
    wrong += [
        f"unknown {n}" for n in sorted(tensors.files) if n not in shapes and "/" not in n and not n.startswith((BUFFER, *spare))
    ]
    for name in sorted(tensors.files.keys() & shapes):
        found = tuple(tensors.files[name].get_slice(name).get_shape())
        if found != shapes[name]:
            wrong.append(f"{name} has shape {found}, the model needs {shapes[name]}")
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder} belongs to another model ({len(wrong)} differences): {'; '.join(wrong[:3])}. "
            "Use the config it was trained with (config.yaml in its run directory) or another run directory."
        )


def persistent_buffers(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def saved_buffers(model: torch.nn.Module) -> dict[str, Tensor]:
    """A model's persistent buffers by their names in a checkpoint."""
    return {f"{BUFFER}{name}": buffer for name, buffer in persistent_buffers(model)}
