"""Checkpoints: complete or absent, verified when read, independent of ZeRO stage and number of workers.

A checkpoint is a folder `checkpoints/step-<steps done>-<tag>/` into which every rank writes
    model-<rank>.safetensors       full fp32 weights of the parameters this rank writes, by name; under `train.ema` their averages
    optimizer-<rank>.safetensors   Adam's moments of the same parameters; under `train.ema` also the weights that training goes on
                                   with: whatever evaluates or exports a checkpoint reads the averages, and need not know of it;
                                   on rank 0 under `loss.align: rde` also losses and labels of all pairs
    references-<rank>.safetensors  this rank's rows of the bank with their objects' ids; metadata: first global row
    rank-<rank>.json               bytes and SHA-256 of the files above; of references also which rows of the bank they are
and rank 0 at last, when every rank's list is there, meta.json with all lists in it. A folder without meta.json, or in which
a listed file is missing or has another size, is never loaded; content is compared with its SHA-256 when it is read.
Parameters are shared out over writers by size, so no rank writes a whole model.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmref.errors import CheckpointError
from mmref.model.lora import below_adapters
from mmref.model.mmref import HEADS, LOGITS, TRAINING_ONLY
from mmref.run.checkpoints import (
    AVERAGE,
    FOLDER,
    KINDS,
    MOMENTS,
    PAIRS,
    TRAINED,
    CheckpointInfo,
    TensorFolder,
    best_checkpoint,
    bring,
    check_fits,
    checkpoint_folders,
    fetched,
    inspect_checkpoints,
    local_folder,
    saved_buffers,
)
from mmref.run.directory import RunDir
from mmref.run.models import ModelSource, has_references
from mmref.run.row_file import CHUNK, pack_ids, row_files
from mmref.run.tensor_files import write_file
from mmref.train import collectives
from mmref.train.bank import ReferenceBank, owned_rows
from mmref.train.division import Division
from mmref.train.engine import iterate_state, load_state
from mmref.version import __version__

log = logging.getLogger("mmref")


# -- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Snapshot:
    """This rank's share of the training state on the host, apart from what training goes on to change."""

    tensors: dict[str, dict[str, Tensor]]  # kind -> name -> tensor
    first: int  # global row of the first reference
    meta: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for tensors in self.tensors.values() for t in tensors.values())


def snapshot(engine: Any, bank: ReferenceBank, meta: dict[str, Any], division: Division | None = None) -> Snapshot:
    """Copy this rank's share to the host (collective: every rank takes part)."""
    rank, world = collectives.rank(), collectives.world_size()
    owner = share_out({n: p.ds_numel if hasattr(p, "ds_numel") else p.numel() for n, p in _parameters(engine)}, world)
    weights: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for name, state in iterate_state(engine, lambda name: owner.get(name) == rank):
        weights[name] = state.get(AVERAGE, state["weight"]).cpu().contiguous()
        kept = (*MOMENTS, TRAINED) if AVERAGE in state else MOMENTS
        moments |= {f"{name}/{key}": state[key].cpu().contiguous() for key in kept if key in state}
    if rank == 0:
        weights |= {name: _copy(buffer) for name, buffer in saved_buffers(engine.module).items()}
        moments |= {f"{PAIRS}/{n}": _copy(t) for n, t in division.state_dict().items()} if division else {}
    references = {k: _copy(v) for k, v in bank.state_dict().items()} | pack_ids(bank.object_ids)
    tensors = {"model": weights, "optimizer": moments, "references": references}
    return Snapshot(tensors, bank.first, {**meta, "world": world, "version": __version__, "bank": bank.describe()})


def _copy(tensor: Tensor) -> Tensor:
    """A host copy even of a tensor that is on the host."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def write(run: RunDir, folder: str, state: Snapshot, rank: int) -> None:
    """Write a rank's files, and its list of them last. Raises StorageError."""
    files = {}
    for kind in KINDS:
        name = f"{kind}-{rank}.safetensors"
        files[name] = write_file(run, f"{folder}/{name}", state.tensors[kind], state.first)
        if kind == "references":
            files[name] |= {"first": state.first, "rows": len(state.tensors[kind]["rows"])}
    run.write_text(f"{folder}/rank-{rank}.json", json.dumps(files, indent=1))


def commit(run: RunDir, folder: str, meta: dict[str, Any]) -> None:
    """Wait until every rank's list of files is in place, then write meta.json: from now on the checkpoint exists."""
    lists = [f"rank-{rank}.json" for rank in range(meta["world"])]
    pause = 0.02
    while not set(lists) <= set(run.list(folder)):
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
    files: dict[str, Any] = {}
    for name in lists:
        files |= json.loads(run.read_text(f"{folder}/{name}"))
    run.write_text(f"{folder}/meta.json", json.dumps({**meta, "files": files}, indent=1))


def save(folder: str, engine: Any, bank: ReferenceBank, meta: dict[str, Any], division: Division | None = None) -> None:
    """Write a checkpoint into a folder of its own and return when this rank's part is in place (collective)."""
    parent, _, name = folder.rpartition("/")
    run, state = RunDir(parent), snapshot(engine, bank, meta, division)
    write(run, name, state, collectives.rank())
    if collectives.rank() == 0:
        commit(run, name, state.meta)


def share_out(sizes: dict[str, int], writers: int) -> dict[str, int]:
    """Writer of each name, balanced by size, the same on every rank."""
    load = [0] * writers
    owner = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        owner[name] = load.index(min(load))
        load[owner[name]] += sizes[name]
    return owner


@contextlib.contextmanager
def resume_point(run: RunDir, objects: int) -> Iterator[ResumePoint]:
    """Where training goes on: the latest sound checkpoint, verified, in a local folder (collective).

    A damaged one is passed over with a warning. Behind a URL the ranks of a node download together what they need: weights and
    moments, and of the references the files with rows of theirs. On a shared file system every rank verifies a share of them.

    Args:
        objects: of the bank. A run is resumed on the same objects alone, so rows are the same as when they were written.

    Raises:
        CheckpointError: there are checkpoints and none is sound. Training does not start again by itself.
    """
    rank = collectives.rank()
    # Rank 0 decides: another listing may see another state of the storage.
    candidates: list[tuple[CheckpointInfo, list[str]]] = collectives.gather_objects(
        inspect_checkpoints(run) if rank == 0 else []
    )[0]
    passed_over: list[str] = []
    for info, problems in reversed(candidates):
        with local_folder(run, info) as own:
            nodes = collectives.gather_objects((socket.gethostname(), own))
            mates = [r for r, (node, _) in enumerate(nodes) if node == nodes[rank][0]]
            sharers = list(range(len(nodes))) if run.local else mates
            folder, names = nodes[mates[0]][1], list(info.files()) if run.local else _needed(info, objects, mates)
            if not problems:
                problems = bring(run, info, folder, names[sharers.index(rank) :: len(sharers)])
                problems = sorted({p for part in collectives.gather_objects(problems) for p in part})
            if problems:
                passed_over += problems
                if rank == 0:
                    log.warning("checkpoint of step %d is not used: %s", info.step, "; ".join(problems))
                continue
            there = {name: info.meta["files"][name] for name in names}
            yield ResumePoint(info.step, folder, {**info.meta, "files": there}, passed_over)
            collectives.gather_objects(None)  # nobody removes what another one still reads
            return
    if candidates:
        raise CheckpointError(
            f"none of the {len(candidates)} checkpoints in {run.join(FOLDER)} is sound: {'; '.join(passed_over[:3])}. "
            "Restore one from a backup, or remove the folder to train from the beginning."
        )
    yield ResumePoint(0, "", {}, [])


def _needed(info: CheckpointInfo, objects: int, ranks: list[int]) -> list[str]:
    """Files of a checkpoint that these ranks need. What does not say which rows it has (of an older version, or added by `mmref
    references add`) is needed by all."""
    own = [owned_rows(objects, collectives.world_size(), rank) for rank in ranks]

    def needed(found: dict[str, Any]) -> bool:
        if "rows" not in found:
            return True
        end = found["first"] + found["rows"]
        return any(found["first"] < first + count and first < end for first, count in own)

    return [name for name, found in info.files().items() if needed(found)]


@dataclass(frozen=True)
class ResumePoint:
    """Steps done, and the local folder with the state after them (`meta` is empty at the beginning of a run)."""

    step: int
    folder: str
    meta: dict[str, Any]
    passed_over: list[str]  # damaged files of newer checkpoints, which were passed over

    def load(self, engine: Any, bank: ReferenceBank, division: Division | None = None) -> None:
        """Restore engine, bank and division (collective); nothing at the beginning of a run. Raises CheckpointError."""
        if self.meta:
            load(self.folder, engine, bank, self.meta, division)


def load(folder: str, engine: Any, bank: ReferenceBank, meta: dict[str, Any], division: Division | None = None) -> None:
    """Restore engine, bank and division from a local folder, whatever number of workers wrote it. Raises CheckpointError."""
    tensors = TensorFolder(folder, "model", "optimizer")
    shapes, buffers = _shapes(engine), saved_buffers(engine.module)
    pairs = {f"{PAIRS}/{name}": tensor for name, tensor in division.state_dict().items()} if division else {}
    check_fits(tensors, shapes | {n: tuple(t.shape) for n, t in (buffers | pairs).items()}, folder)
    load_state(engine, lambda name: tensors.state_of(name) if name in shapes else {}, int(meta["step"]))
    for name, buffer in buffers.items():
        buffer.copy_(tensors.get(name))
    if division:
        division.load_state_dict({name: tensors.get(f"{PAIRS}/{name}") for name in division.state_dict()})
    load_bank(folder, bank, meta)


def start_from(run: RunDir, engine: Any, bank: ReferenceBank) -> None:
    """Begin training with the weights of another run's best checkpoint, and its references of the objects both know
    (collective).

    Optimizer state starts anew; so do the classifier of `loss.w_id`, which has a row for each object, heads that the other run
    had not, the bias of `loss.align: sigmoid` likewise, and a temperature that is not learned: `loss.tau` of this run holds.
    References that the other run never set, or does not use, stay as they are. Raises CheckpointError.
    """
    info = best_checkpoint(run)
    with fetched(run, info, "model", "references") as folder:
        tensors = TensorFolder(folder, "model")
        shapes = _shapes(engine)
        fresh = {n for n in shapes if n.startswith(TRAINING_ONLY) or (n.startswith((*HEADS, *LOGITS)) and n not in tensors.files)}
        wanted = {n: shape for n, shape in shapes.items() if n not in fresh}
        buffers = saved_buffers(engine.module)
        wanted |= {n: tuple(b.shape) for n, b in buffers.items()}
        check_fits(tensors, wanted, folder, (*TRAINING_ONLY, *HEADS, *LOGITS))
        if not engine.module.log_scale.requires_grad:
            fresh.add("log_scale")
        load_state(engine, lambda name: {} if name in fresh else {"weight": tensors.get(name)}, 0)
        for name, buffer in buffers.items():
            buffer.copy_(tensors.get(name))
        if has_references(ModelSource("run", run.path)):
            load_bank(folder, bank, info.meta, ("rows",))


def load_bank(folder: str, bank: ReferenceBank, meta: dict[str, Any], names: tuple[str, ...] = ()) -> None:
    """Restore this rank's rows of the bank (of their tensors `names`, by default all), found by the ids of their objects.

    Objects that the checkpoint does not know keep fresh rows, with a warning; rows of objects that the bank does not have
    are left out. Raises CheckpointError when the bank has rows of another shape.
    """
    saved, own = meta["bank"], bank.describe()
    if any(saved[key] != own[key] for key in ("per_object", "dim")):
        raise CheckpointError(
            f"checkpoint {folder} holds references {saved}, this run needs {own}: `reference.per_object` or the embedding "
            "width differ."
        )
    known = 0
    with row_files(folder, meta) as files:
        for file in files:
            at = bank.find(file.object_ids)
            known += int((at >= 0).sum())
            for start in range(0, len(file), CHUNK):
                mine = at[start : start + CHUNK]
                if (mine >= 0).any():
                    wanted = names or tuple(bank.state_dict())
                    found = {name: file.read(name, start, start + len(mine)) for name in wanted}
                    bank.load_rows(mine, found, keep_unset=bool(names))
    if known < bank.count:
        log.warning("%d of %d objects have no references in %s: theirs start anew", bank.count - known, bank.count, folder)


def _parameters(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    left_out = below_adapters(engine.module)
    return [(name, p) for name, p in engine.module.named_parameters() if name not in left_out]


def _shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Whole shapes of the parameters, also where ZeRO-3 has partitioned them."""
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in _parameters(engine)}


def remove_uncommitted(run: RunDir) -> None:
    """Remove what interrupted checkpoints left behind. For the driver alone, while no worker writes."""
    for name in checkpoint_folders(run):
        if not run.exists(f"{FOLDER}/{name}/meta.json"):
            run.remove(f"{FOLDER}/{name}")


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
    except (ValueError, KeyError, TypeError):
        gone = [None]
    if gone:
        run.remove(name)
