"""Runs what tests/train/test_ranks.py compares on 1, 2 and 4 ranks: python ranks.py SHARD_SET OUT.pt

A process of its own: it imports torch once and forks ranks that talk over gloo and a file.
"""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import zlib
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmref.config import ReferenceConfig
from mmref.data.plan import build_plan
from mmref.data.shard_set import train_index
from mmref.run.directory import RunDir
from mmref.train import collectives, validation
from mmref.train.bank import ReferenceBank
from mmref.train.engine import average_statistics
from mmref.train.ledger import Ledger, audit, read_ledger
from support.plain_training import ACCUMULATED, VARIANTS, train
from support.tiny_set import tiny_config

OBJECTS, DIM, SAMPLES, STEPS = 10, 6, 8, 3


def slice_of(x: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    size = len(x) // world
    return x[rank * size : (rank + 1) * size]


def gathered(rank: int, world: int) -> dict[str, torch.Tensor]:
    """A loss over all samples in which each rank computes its own rows; its gradient as a mean over ranks."""
    x = torch.randn(SAMPLES, DIM, generator=torch.Generator().manual_seed(0))
    own = slice_of(x, rank, world).clone().requires_grad_()
    everyone = collectives.gather_with_gradient(own)
    loss = torch.log_softmax(3 * own @ everyone.T, dim=1).diagonal(offset=rank * len(own)).neg().mean()
    loss.backward()
    return {
        "all": everyone.detach(),
        "loss": collectives.sum_over_ranks(loss.detach()[None]) / world,
        "grad": collectives.gather(own.grad / world),
    }


def bank(rank: int, world: int, update: str, per_object: int) -> dict[str, torch.Tensor]:
    """References after some updates, and what is fetched of them."""
    g = torch.Generator().manual_seed(1)
    made = ReferenceBank(OBJECTS, DIM, ReferenceConfig(update=update, per_object=per_object), seed=3)
    out = {"initial": made.fetch(made.everyone).detach().clone()}
    for step in range(4):
        objects = torch.randint(0, OBJECTS, (SAMPLES,), generator=g)
        features = torch.nn.functional.normalize(torch.randn(2, SAMPLES, DIM, generator=g), dim=-1)
        active = made.rows_of(objects.numpy())
        targets = torch.from_numpy(active.targets(slice_of(objects, rank, world).numpy()))
        if update == "gradient":
            per_sample = torch.randn(SAMPLES, per_object, DIM, generator=g)
            grad = torch.zeros(len(active.numbers), per_object, DIM)  # a rank's gradient is that of the mean over its samples
            own = slice_of(torch.arange(SAMPLES), rank, world)
            grad.index_add_(0, targets, per_sample[own] / len(own))
            made.apply_gradient(active, grad, 0.1)
        else:
            image, text = (slice_of(f, rank, world) for f in features)
            made.follow(image, text, active, targets)
        out[f"some {step}"] = made.fetch(active).detach().clone()
    out["final"] = made.fetch(made.everyone).detach().clone()
    return out


def statistics(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Running statistics of ranks that saw other samples, before and after they are averaged; frozen ones stay."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(DIM, momentum=1.0), torch.nn.BatchNorm1d(DIM, momentum=1.0))
    x = torch.randn(SAMPLES, DIM, generator=torch.Generator().manual_seed(2))
    for module in model:
        module(slice_of(x, rank, world))
    own = model[0].running_mean.clone()
    model[1].eval()
    average_statistics(model)
    return {
        "all": collectives.gather(own[None]),
        "mean": collectives.gather(model[0].running_mean[None]),
        "frozen": collectives.gather(model[1].running_mean[None]),
    }


class Drawn:
    """An encoder whose features are drawn, by what is in an image or a text."""

    device = torch.device("cpu")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass

    def images(self, pixels: np.ndarray) -> np.ndarray:
        return self.drawn([int(image.astype(np.int64).sum()) for image in pixels])

    def texts(self, texts: list[str]) -> np.ndarray:
        return self.drawn([zlib.crc32(text.encode()) for text in texts])

    def drawn(self, seeds: list[int]) -> np.ndarray:
        x = np.stack([np.random.default_rng(seed).normal(size=DIM) for seed in seeds])
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def scores(root: str) -> dict[str, Any]:
    """What an evaluation in training finds, with the search for the refinement. The small split is ranked in many chunks."""
    config = tiny_config(root, {"eval.refine_in_training": True, "eval.refine_top_rs": [2, 4], "eval.batch": 5})
    references = ReferenceBank(OBJECTS, DIM, ReferenceConfig(update="gradient"), seed=3)
    validation.RANKED_AT_ONCE = 3
    return validation.Validation(config)(Drawn(), references)  # type: ignore[arg-type]


def noted(rank: int, world: int, root: str, folder: str) -> list[Any]:
    """The ledger of some steps, in which samples of several ranks were replaced and some lost."""
    plan = build_plan(config := tiny_config(root, {}), train_index(config))
    per_rank = plan.objects_per_step * plan.images_per_object // world
    own = range(rank * per_rank, (rank + 1) * per_rank)
    run = RunDir(f"{folder}/noted")
    ledger = Ledger(run, 0, own)
    for step in range(6):
        images = plan(step).images[own.start : own.stop].copy()
        broken = np.isin(np.array(own), [step, 7] if step % 2 else [])
        images[broken] = step
        kept = ~np.isin(np.array(own), [2, 6]) if step == 4 else np.full(per_rank, True)
        batch = {"step": np.full(per_rank, step), "position": np.array(own), "image_index": images,
                 "bad": np.where(broken, "broken", "")}  # fmt: skip
        ledger.add(step, {name: column[kept] for name, column in batch.items()})
        if step == 3:
            named = ledger.images(3, plan)
            ledger.write(4)
    ledger.write(6)
    dist.barrier()
    return [named, [vars(seen) for seen in read_ledger(run, lambda: plan)], vars(audit(read_ledger(run, lambda: plan), plan, 6))]


def one_rank(rank: int, world: int, root: str, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=300))
    found: dict[str, Any] = {"gather": gathered(rank, world), "statistics": statistics(rank, world)}
    found["scores"], found["ledger"] = scores(root), noted(rank, world, root, folder)
    for update in ("moving_average", "gradient"):
        for per_object in (1, 2):
            found[f"bank {update} {per_object}"] = bank(rank, world, update, per_object)
    for name, overrides in VARIANTS.items():
        for accumulation in (1, 2) if name in ACCUMULATED else (1,):
            config = tiny_config(root, {**overrides, "train.accumulation": accumulation})
            found[f"{name} / {accumulation}"] = vars(train(config, STEPS, rank, world))
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(root: str, out: str) -> None:
    results = {}
    for world in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(one_rank, (world, root, folder), nprocs=world, start_method="fork")
            results[world] = torch.load(os.path.join(folder, "found.pt"))
    torch.save(results, out)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
