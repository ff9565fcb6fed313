"""Peak of a rank's tensors over two steps inside DeepSpeed: `run(folder, config, world)`, processes and all."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmref.config import from_dict
from mmref.config.inputs import settled


def _process(rank: int, world: int, folder: str, values: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29513"), DS_ACCELERATOR="cpu",
    )  # fmt: skip
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=300))

    from mmref.data.reader import StepReader
    from mmref.model.mmref import build_model
    from mmref.sizing.live_bytes import LiveBytes
    from mmref.train.bank import ReferenceBank
    from mmref.train.engine import build_engine, set_learning_rate
    from mmref.train.step import StepRunner

    config = settled(from_dict(values))
    reader = StepReader(config, rank, world)
    batches = [reader.read_step(step) for step in range(2)]
    with LiveBytes() as memory:
        engine = build_engine(build_model(config, reader.tokens.vocab_size), config, world)
        bank = ReferenceBank(reader.index.n_objects, engine.module.embed_dim, config.reference, config.train.seed)
        runner = StepRunner(
            config, engine, lambda loss: engine.backward(loss, scale_wrt_gas=False), engine.step, bank, reader.tokens,
            torch.device("cpu"),
        )  # fmt: skip
        engine.train()
        memory.peak = memory.live  # what building took for a moment is freed before the activations are there
        for step, batch in enumerate(batches):
            set_learning_rate(engine, step, config.train)
            runner.run(step, runner.prepare(step, batch))
    if rank == 0:
        Path(folder, "peak.json").write_text(json.dumps({"peak": memory.peak, "objects": reader.index.n_objects}))
    dist.barrier()
    os._exit(0)  # as in parity.py


def run(folder: Path, values: dict[str, Any], world: int) -> tuple[int, int]:
    """(peak bytes of rank 0, objects)"""
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(_process, (world, str(folder), values), nprocs=world, start_method="spawn", join=True)
    found = json.loads((folder / "peak.json").read_text())
    return found["peak"], found["objects"]
