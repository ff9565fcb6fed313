"""Two workers of the training loop without Ray, whose gradients or weights stop being finite on purpose.

`outcomes(folder, shard_set)` runs every one of SCENARIOS and gives what became of each run.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from support.tiny_set import tiny_config

WORLD = 2
LEARNED = {"reference.update": "gradient"}
# name -> (what is spoilt on the last rank alone, the step that is to be named, overrides of the config)
SCENARIOS: dict[str, tuple[str, int, dict[str, Any]]] = {
    **{f"gradient at stage {stage}": ("gradient", 2, {"train.zero_stage": stage}) for stage in range(4)},
    "gradient in the last step before a checkpoint": ("gradient", 3, {"train.accumulation": 2}),
    "gradient where nothing is clipped": ("gradient", 2, {"train.zero_stage": 0, "train.clip_norm": 0.0}),
    "gradient of the references": ("references", 2, LEARNED),
    "weights": ("weights", 3, {}),
    "weights that are partitioned": ("weights", 3, {"train.zero_stage": 3}),
    "references": ("rows", 3, {}),
    "nothing": ("", 0, {}),
    "nothing at stage 3": ("", 0, {"train.zero_stage": 3}),
}


class Batches:
    """The stream of one rank, read in process."""

    def __init__(self, config: Any, rank: int, world: int, start: int) -> None:
        from mmref.data.reader import StepReader

        reader = StepReader(config, rank, world)
        self._batches = (reader.read_step(step) for step in range(start, config.train.max_steps))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._batches)


def _spoil(worker: Any, what: str, at: int) -> None:
    """From step `at` on numbers of this rank are not finite: in a gradient, or in what a step has made of weights or rows."""
    run, apply, now = worker.runner.run, worker.bank.apply_gradient, [-1]
    weight: Any = next(p for name, p in worker.engine.module.named_parameters() if name.endswith("weight"))

    def spoilt_run(step: int, inputs: Any) -> torch.Tensor:
        now[0] = step
        losses = run(step, inputs)
        if step >= at and what == "weights":
            getattr(weight, "ds_tensor", weight).data.view(-1)[0] = torch.nan
        if step >= at and what == "rows":
            worker.bank.rows[0] = torch.inf
        return losses

    def spoilt_apply(rows: Any, grad: torch.Tensor, lr: float) -> torch.Tensor:
        if now[0] >= at and what == "references":
            grad[0] = torch.inf
        return apply(rows, grad, lr)

    worker.runner.run, worker.bank.apply_gradient = spoilt_run, spoilt_apply
    if what == "gradient":
        weight.register_hook(lambda g: torch.full_like(g, torch.nan) if now[0] >= at else g)


def _train(root: str, folder: str, rank: int, what: str, at: int, overrides: dict[str, Any]) -> str:
    """What ended a run of six steps, with a checkpoint due after every second one."""
    from mmref.errors import MMRefError
    from mmref.run.directory import RunDir
    from mmref.train.loop import Worker

    every = {"train.max_steps": 6, "train.eval_every": 2, "train.log_every": 100, "train.workers": WORLD}
    config = tiny_config(root, {"run_dir": folder, "train.async_checkpoints": False, **every, **overrides})
    worker = Worker(config, RunDir(folder))
    if rank == WORLD - 1:
        _spoil(worker, what, at)
    try:
        worker.train()
    except MMRefError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _process(rank: int, folder: str, root: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_WORLD_SIZE=str(WORLD),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29513", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=300))
    import ray.train

    from mmref.train import loop, stop

    storage = SimpleNamespace(storage_filesystem=None, build_checkpoint_path_from_name=lambda n: f"{folder}/{n}")
    context = SimpleNamespace(
        get_world_size=lambda: WORLD, get_world_rank=lambda: rank, get_local_world_size=lambda: WORLD, get_storage=lambda: storage
    )

    def report(_: Any, target: Any, *, checkpoint_dir_name: str, checkpoint_upload_fn: Any, **__: Any) -> None:
        name = [checkpoint_dir_name]
        dist.broadcast_object_list(name)
        checkpoint_upload_fn(target, name[0])
        dist.barrier()

    found = {}
    with (
        mock.patch.object(ray.train, "get_context", lambda: context),
        mock.patch.object(ray.train, "report", report),
        mock.patch.object(loop, "Stream", Batches),
        mock.patch.object(stop, "_requested", lambda _: 0),
        mock.patch.object(stop, "node_is_drained", lambda: False),
    ):
        for name, (what, at, overrides) in SCENARIOS.items():
            run = f"{folder}/{name}"
            found[name] = _train(root, run, rank, what, at, overrides)
            dist.barrier()
    Path(folder, f"errors-{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # ZeRO-3 leaves threads of gloo behind that abort the interpreter when it ends in order


def outcomes(folder: Path, root: Path) -> dict[str, list[str]]:
    """Errors of the ranks of each scenario, "" for a run that came to its end; its run directory is `folder/<name>`."""
    for name in SCENARIOS:
        (folder / name).mkdir()
        (folder / name / "config.yaml").touch()  # the driver's
    mp.start_processes(_process, (str(folder), str(root)), nprocs=WORLD, start_method="spawn", join=True)
    errors = [json.loads((folder / f"errors-{rank}.json").read_text()) for rank in range(WORLD)]
    return {name: [of_rank[name] for of_rank in errors] for name in SCENARIOS}
