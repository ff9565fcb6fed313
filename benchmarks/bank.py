"""Step time and memory of the reference bank at 10 thousand to 10 million objects, beside a dense table under Adam.

    python benchmarks/bank.py --objects 10000 100000 1000000 --dim 512 --workers 2 --out bank.json

A step is what the bank does in training: the rows of a batch's objects and of the sampled negatives are selected and
fetched, contrasted with the batch's features, and updated by their owners. `bank_ms` is that alone. `step_ms` is a
training step of it all: forward and backward of an encoder (`--encoder-layers` linear layers of width d on `--tokens`
tokens an item, a small stand-in) and the bank. Rounds alternate between the sizes, medians are reported, and every
ratio is to the smallest size of the same run. The dense table is what the bank replaces: torch.nn.Embedding with the same
loss, its full gradient and torch.optim.Adam, without the encoder; sizes whose states exceed --dense-gb are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmref.config import ReferenceConfig
from mmref.losses import reference_loss
from mmref.train import collectives
from mmref.train.bank import ReferenceBank


def rss() -> int:
    return psutil.Process().memory_info().rss


class Step:
    """The bank of one size on this rank, and a step of it on random features of random objects."""

    def __init__(self, args: argparse.Namespace, objects: int, device: torch.device) -> None:
        self.args, self.device, self.objects = args, device, objects
        config = ReferenceConfig(
            update=args.update, negatives="sampled", sampled_negatives=args.negatives, row_dtype=args.row_dtype,
            rows_on=args.rows_on,
        )  # fmt: skip
        before = rss()
        self.bank = ReferenceBank(objects, args.dim, config, seed=0, device=device)
        self.bytes = sum(t.nbytes for t in self.bank.state_dict().values())
        for tensor in self.bank.state_dict().values():
            if not tensor.is_cuda:  # zeros are not backed by memory before they are written to
                tensor.view(-1)[:: 4096 // tensor.element_size()] = 1e-3 if tensor.is_floating_point() else 0
        self.rss = rss() - before
        layers = [torch.nn.Linear(args.dim, args.dim) for _ in range(args.encoder_layers)]
        self.encoder = torch.nn.Sequential(*(x for layer in layers for x in (layer, torch.nn.GELU()))).to(device)
        self.rng = np.random.default_rng(0)

    def run(self, step: int) -> tuple[float, float]:
        """Seconds of the encoder and of the bank."""
        n = self.args.batch // collectives.world_size()
        everyone = self.rng.integers(0, self.objects, self.args.batch)
        objects = everyone[collectives.rank() * n : (collectives.rank() + 1) * n]
        tokens = torch.randn(2 * n, self.args.tokens, self.args.dim, device=self.device)
        began = self._now()
        features = torch.nn.functional.normalize(self.encoder(tokens).mean(1), dim=-1)
        leaf = features.detach().requires_grad_()
        encoded = self._now()
        active = self.bank.select(everyone, step)
        rows = self.bank.fetch(active)
        targets = torch.from_numpy(active.targets(objects)).to(self.device)
        loss = reference_loss(leaf, rows, targets.repeat(2), 1 / 0.07)
        loss.backward()
        if rows.requires_grad:
            self.bank.apply_gradient(active, rows.grad, 0.01)
        else:
            batch = self.bank.rows_of(everyone)
            targets = torch.from_numpy(batch.targets(objects)).to(self.device)
            self.bank.follow(leaf.detach()[:n], leaf.detach()[n:], batch, targets)
        banked = self._now()
        features.backward(leaf.grad)
        return self._now() - banked + encoded - began, banked - encoded

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def dense_step(args: argparse.Namespace, objects: int, device: torch.device) -> Callable[[], float]:
    """Seconds of a step of a full table: every object's logit at the sampled rows' cost, but a dense gradient and Adam."""
    table = torch.nn.Embedding(objects, args.dim, device=device)
    optimizer = torch.optim.Adam(table.parameters(), lr=0.01)
    rng = np.random.default_rng(0)

    def run() -> float:
        active = torch.from_numpy(rng.integers(0, objects, args.batch + args.negatives)).to(device).unique()
        features = torch.nn.functional.normalize(torch.randn(2 * args.batch, args.dim, device=device), dim=-1)
        began = time.perf_counter()
        targets = torch.arange(args.batch, device=device).repeat(2)
        reference_loss(features, table(active)[:, None], targets, 1 / 0.07).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return run


def measure(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """One entry a size, from this rank's clock (collectives keep the ranks together)."""
    steps = {objects: Step(args, objects, device) for objects in args.objects}
    times: dict[int, list[tuple[float, float]]] = {objects: [] for objects in args.objects}
    for round_ in range(args.rounds + 1):
        for objects, step in steps.items():
            for i in range(args.steps):
                seconds = step.run(round_ * args.steps + i)
                if round_:  # the first round warms up
                    times[objects].append(seconds)
    entries = []
    smallest = None
    for objects, step in steps.items():
        whole = float(np.median([sum(t) for t in times[objects]])) * 1000
        smallest = smallest or whole
        entries.append({
            "objects": objects, "dim": args.dim, "workers": collectives.world_size(),
            "step_ms": whole, "bank_ms": float(np.median([t[1] for t in times[objects]])) * 1000,
            "step_ratio": whole / smallest, "bytes_per_worker": step.bytes, "rss_growth_bytes": step.rss,
        })  # fmt: skip
    return entries


def rank_main(rank: int, args: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device, rank) if args.device == "cuda" else torch.device("cpu")
    if args.workers > 1:
        backend = "nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=args.workers)
    entries = measure(args, device)
    if rank == 0:
        with open(f"{folder}/entries.json", "w") as file:
            json.dump(entries, file)
    if args.workers > 1:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--objects", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=128, help="pairs of a global batch")
    parser.add_argument("--negatives", type=int, default=4096)
    parser.add_argument("--update", choices=["moving_average", "gradient"], default="moving_average")
    parser.add_argument("--row-dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rows-on", choices=["device", "host"], default="device")
    parser.add_argument("--encoder-layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps of a size in a round")
    parser.add_argument("--dense-gb", type=float, default=9.0, help="largest dense table with gradient and Adam states")
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(rank_main, (args, folder), nprocs=args.workers, start_method="spawn")
        with open(f"{folder}/entries.json") as file:
            entries = json.load(file)
    torch.set_num_threads(args.threads)
    for entry in entries:
        if 16 * entry["objects"] * args.dim > args.dense_gb * 1e9:  # weight, gradient, two moments
            continue
        run = dense_step(args, entry["objects"], torch.device(args.device))
        entry["dense_adam_ms"] = float(np.median([run() for _ in range(4)][1:])) * 1000
        entry["dense_adam_bytes_per_worker"] = 16 * entry["objects"] * args.dim
        del run
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    result = {"rows": entries, "wall_seconds": time.perf_counter() - began, "settings": settings}
    for e in entries:
        dense = f"  dense Adam {e['dense_adam_ms']:9.1f} ms" if "dense_adam_ms" in e else ""
        print(f"{e['objects']:>11,} objects  step {e['step_ms']:7.1f} ms (x {e['step_ratio']:.2f})  bank {e['bank_ms']:6.1f} ms  "
              f"{e['bytes_per_worker'] / 1e6:9.1f} MB a worker{dense}")  # fmt: skip
    if args.out:
        with open(args.out, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
