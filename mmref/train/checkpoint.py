"""Checkpoints: complete or absent, independent of ZeRO stage and number of workers.

A checkpoint is a folder `checkpoints/step-<steps done>-<tag>/` into which every rank writes
    model-<rank>.safetensors       full fp32 weights of the parameters this rank writes, by name
    optimizer-<rank>.safetensors   Adam's moments of the same parameters
    references-<rank>.safetensors  this rank's rows of the bank; metadata: first global row
    rank-<rank>.json               names and sizes of the files above
and rank 0 meta.json. It is complete when meta.json, every rank's list and every listed file are there at full size; a
folder that is not is never loaded. Parameters are shared out over writers by size, so no rank writes a whole model.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmref import __version__
from mmref.errors import CheckpointError
from mmref.rundir import RunDir
from mmref.train import collectives
from mmref.train.bank import ReferenceBank
from mmref.train.engine import MOMENTS, iterate_state, load_state

FOLDER = "checkpoints"


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


def list_checkpoints(run: RunDir) -> list[CheckpointInfo]:
    """Complete checkpoints of a run by step; half-written ones are passed over."""
    found = []
    for name in run.list(FOLDER):
        if name.startswith("step-") and (info := _complete(run, f"{FOLDER}/{name}")):
            found.append(info)
    return sorted(found, key=lambda info: info.step)


def _complete(run: RunDir, folder: str) -> CheckpointInfo | None:
    try:
        meta = json.loads(run.read_text(f"{folder}/meta.json"))
        for rank in range(meta["world"]):
            for name, size in json.loads(run.read_text(f"{folder}/rank-{rank}.json")).items():
                if run.size(f"{folder}/{name}") != size:
                    return None
    except (OSError, json.JSONDecodeError, KeyError):
        return None
    return CheckpointInfo(folder, meta)


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


def save(folder: str, engine: Any, bank: ReferenceBank, meta: dict[str, Any]) -> None:
    """Write this rank's part into a local folder (collective: every rank takes part)."""
    rank, world = collectives.rank(), collectives.world_size()
    owner = share_out({n: p.ds_numel if hasattr(p, "ds_numel") else p.numel() for n, p in _parameters(engine)}, world)
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, state in iterate_state(engine):
        if owner[name] != rank:
            continue
        weights[name] = state["weight"].cpu().contiguous()
        for key in MOMENTS:
            if key in state:
                moments[f"{name}/{key}"] = state[key].cpu().contiguous()
    if rank == 0:
        weights |= {f"buffer:{n}": b.detach().cpu().contiguous() for n, b in _buffers(engine)}
    os.makedirs(folder, exist_ok=True)
    files = {
        f"model-{rank}.safetensors": weights,
        f"optimizer-{rank}.safetensors": moments,
        f"references-{rank}.safetensors": {k: v.cpu().contiguous() for k, v in bank.state_dict().items()},
    }
    for name, tensors in files.items():
        save_file(tensors, f"{folder}/{name}", metadata={"first": str(bank.first)})
    sizes = {name: os.path.getsize(f"{folder}/{name}") for name in files}
    with open(f"{folder}/rank-{rank}.json", "w") as file:
        json.dump(sizes, file)
    if rank == 0:
        with open(f"{folder}/meta.json", "w") as file:
            json.dump({**meta, "world": world, "version": __version__, "bank": bank.describe()}, file, indent=1)


def share_out(sizes: dict[str, int], writers: int) -> dict[str, int]:
    """Writer of each name, balanced by size, the same on every rank."""
    load = [0] * writers
    owner = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


def load(folder: str, engine: Any, bank: ReferenceBank, meta: dict[str, Any]) -> None:
    """Restore engine and bank from a local folder, whatever number of workers wrote it. Raises CheckpointError."""
    tensors = TensorFolder(folder, "model", "optimizer")
    check_fits(tensors, {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in _parameters(engine)}, folder)
    load_state(engine, tensors.state_of, int(meta["step"]))
    for name, buffer in _buffers(engine):
        buffer.copy_(tensors.get(f"buffer:{name}"))
    load_bank(folder, bank, meta)


def load_bank(folder: str, bank: ReferenceBank, meta: dict[str, Any]) -> None:
    """Restore this rank's rows of the bank. Raises CheckpointError when the bank has another shape."""
    if meta["bank"] != bank.describe():
        raise CheckpointError(
            f"checkpoint {folder} holds references {meta['bank']}, this run needs {bank.describe()}: "
            "the shard set, `reference.per_object` or the embedding width differ."
        )
    for rank in range(int(meta["world"])):
        with safe_open(f"{folder}/references-{rank}.safetensors", "pt") as file:
            first = int(file.metadata()["first"])
            bank.load_rows(first, {k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118 (a safetensors file is no mapping)


def load_model(folder: str, model: torch.nn.Module) -> None:
    """Restore the weights alone into a plain module, for evaluation. Raises CheckpointError."""
    tensors = TensorFolder(folder, "model")
    check_fits(tensors, {n: tuple(p.shape) for n, p in model.named_parameters()}, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors.get(name))
        for name, buffer in _persistent_buffers(model):
            buffer.copy_(tensors.get(f"buffer:{name}"))


def load_references(folder: str, meta: dict[str, Any]) -> Tensor:
    """All references (m, K, d) of a checkpoint on this process."""
    parts = {}
    for rank in range(int(meta["world"])):
        with safe_open(f"{folder}/references-{rank}.safetensors", "pt") as file:
            parts[int(file.metadata()["first"])] = file.get_tensor("rows")
    return torch.cat([parts[first] for first in sorted(parts)])


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
        moments = {key: self.get(f"{name}/{key}") for key in MOMENTS if f"{name}/{key}" in self.files}
        return {"weight": self.get(name), **moments}


def check_fits(tensors: TensorFolder, shapes: dict[str, tuple[int, ...]], folder: str) -> None:
    """Raise CheckpointError that names the first parameters that are missing, unknown or of another shape."""
    saved = {n for n in tensors.files if not n.startswith("buffer:") and "/" not in n}
    wrong = [f"missing {n}" for n in shapes if n not in saved] + [f"unknown {n}" for n in saved if n not in shapes]
    for name in sorted(saved & set(shapes)):
        found = tuple(tensors.files[name].get_slice(name).get_shape())
        if found != shapes[name]:
            wrong.append(f"{name} has shape {found}, the model needs {shapes[name]}")
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder} belongs to another model ({len(wrong)} differences): {'; '.join(wrong[:3])}. "
            "Use the config it was trained with (config.yaml in its run directory) or another run directory."
        )


def _parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return list(engine.module.named_parameters())


def _buffers(engine: Any) -> list[tuple[str, Tensor]]:
    return _persistent_buffers(engine.module)


def _persistent_buffers(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True)
    return [(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def repair_snapshot(run: RunDir) -> None:
    """Remove Ray Train's list of checkpoints when it cannot be read or names folders that are gone.

    Ray writes the list in place (a crash can cut it) and refuses to start when a folder in it was deleted. Nothing is
    lost: mmref looks for complete checkpoints itself.
    """
    name = f"{FOLDER}/checkpoint_manager_snapshot.json"
    if not run.exists(name):
        return
    try:
        results = json.loads(run.read_text(name))["checkpoint_results"]
        gone = [r for r in results if not run.exists(f"{FOLDER}/{r['checkpoint_dir_name']}")]
    except (json.JSONDecodeError, KeyError, TypeError):
        gone = [None]
    if gone:
        run.remove(name)
