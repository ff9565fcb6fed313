"""What a checkpoint costs the step loop: blocking, in the background, and torch.save; to local disk and to S3 on the loopback.

    python benchmarks/checkpoint.py --device cpu --out checkpoint.json

The model is a stack of transformer feed-forward layers (768 -> 3072 -> 768) with AdamW's moments, 150 M parameters by default:
as many as CLIP ViT-B/16. In turns a loop of the same steps runs without a checkpoint, with a blocking one and with one in
the background, in one process and without Ray. `stall` is the time the loop took more than without a checkpoint; it includes
what writing in the background takes from the steps. Seconds are the best of all rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from mmref.config import ReferenceConfig
from mmref.run import checkpoints
from mmref.run.directory import RunDir
from mmref.train import checkpoint_files
from mmref.train.bank import ReferenceBank

WIDTH = 768
OBJECTS = 11_003  # those of CUHK-PEDES


class Stack(nn.Module):
    """Residual feed-forward layers with about so many parameters."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        layers = max(1, round(parameters / (8 * WIDTH * WIDTH)))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Loop:
    """Training steps, with a checkpoint after the first third of them."""

    def __init__(self, parameters: int, batch: int, steps: int, device: torch.device) -> None:
        torch.manual_seed(0)
        model = Stack(parameters).to(device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self.engine = SimpleNamespace(module=model, optimizer=self.optimizer)
        self.bank = ReferenceBank(OBJECTS, 512, ReferenceConfig(), 0, device)
        self.x = torch.randn(batch, WIDTH, device=device)
        self.steps, self.device = steps, device
        self.parameters = sum(p.numel() for p in model.parameters())
        self.step()

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.engine.module(self.x).square().mean().backward()
        self.optimizer.step()

    def run(self, save: Callable[[], None] | None) -> float:
        """Seconds of all steps, and of `save` after the first third."""
        began = time.perf_counter()
        for step in range(self.steps):
            if save and step == self.steps // 3:
                save()
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


class Target:
    """A place that checkpoints are written to."""

    def __init__(self, name: str, url: str, loop: Loop) -> None:
        self.name, self.run, self.loop = name, RunDir(url), loop
        self.seconds: dict[str, list[float]] = {}
        self.bytes = 0
        self.thread: threading.Thread | None = None

    def note(self, name: str, seconds: float) -> None:
        self.seconds.setdefault(name, []).append(seconds)

    def _write(self, folder: str, state: checkpoint_files.Snapshot, began: float, name: str) -> None:
        self.bytes = state.bytes
        writing = time.perf_counter()
        checkpoint_files.write(self.run, folder, state, 0)
        checkpoint_files.commit(self.run, folder, state.meta)
        self.note(f"{name}_writing", time.perf_counter() - writing)
        self.note(name, time.perf_counter() - began)

    def blocking(self) -> None:
        began = time.perf_counter()
        state = checkpoint_files.snapshot(self.loop.engine, self.loop.bank, {"step": 1})
        self._write(self._folder(), state, began, "blocking")

    def background(self) -> None:
        began = time.perf_counter()
        state = checkpoint_files.snapshot(self.loop.engine, self.loop.bank, {"step": 1})
        self.note("background_blocking", time.perf_counter() - began)
        self.thread = threading.Thread(target=self._write, args=(self._folder(), state, began, "background_total"))
        self.thread.start()

    def torch_save(self) -> None:
        began = time.perf_counter()
        state = {"model": self.loop.engine.module.state_dict(), "optimizer": self.loop.optimizer.state_dict()}
        with open(self.run.inner("checkpoint.pt"), "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        self.note("torch_save", time.perf_counter() - began)

    def load(self) -> None:
        (info,) = checkpoints.list_checkpoints(self.run)
        began = time.perf_counter()
        with checkpoints.fetched(self.run, info, *checkpoints.KINDS) as folder:
            self.note("verify", time.perf_counter() - began)
            checkpoint_files.load(folder, self.loop.engine, self.loop.bank, info.meta)
        self.note("load", time.perf_counter() - began)

    def _folder(self) -> str:
        return f"{checkpoints.FOLDER}/step-00000001-{uuid.uuid4().hex[:6]}"

    def round(self) -> None:
        """One loop of each kind."""
        for name, save in (("without", None), ("blocking", self.blocking), ("background", self.background)):
            self.note(f"loop_{name}", self.loop.run(save))
            if self.thread:
                self.thread.join()
                self.thread = None
        self.run.remove(checkpoints.FOLDER)
        self.blocking()
        self.load()
        self.run.remove(checkpoints.FOLDER)
        if self.run.local:
            self.torch_save()
            self.run.remove("checkpoint.pt")

    def result(self) -> dict[str, float]:
        # the best of all rounds: noise of the machine only ever adds
        s = {name: min(values) for name, values in self.seconds.items()}
        found = {
            "blocking_seconds": s["blocking"],
            "async_blocking_seconds": s["background_blocking"],
            "async_total_seconds": s["background_total"],
            "stall_blocking_seconds": s["loop_blocking"] - s["loop_without"],
            "stall_async_seconds": s["loop_background"] - s["loop_without"],
            "mb_per_second": self.bytes / 1e6 / s["blocking_writing"],
            "verify_seconds": s["verify"],
            "load_seconds": s["load"],
        }
        if "torch_save" in s:
            found["torch_save_seconds"] = s["torch_save"]
        return found


@contextmanager
def s3_server() -> Iterator[str]:
    """A moto server in a process of its own; URL of its bucket."""
    import fsspec

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        fsspec.filesystem("s3").mkdir("benchmark")
        yield "s3://benchmark/run"
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parameters", type=float, default=150e6)
    parser.add_argument("--threads", type=int, default=1, help="torch threads on CPU; leave a core for the writing")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step")
    parser.add_argument("--steps", type=int, default=24, help="steps of a loop; they should outlast the writing")
    parser.add_argument("--rounds", type=int, default=5, help="the best of so many is reported")
    parser.add_argument("--targets", nargs="+", choices=["local", "s3"], default=["local", "s3"])
    parser.add_argument("--folder", help="folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--out", help="also write the result as JSON to this file")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(args.threads)
    loop = Loop(int(args.parameters), args.batch, args.steps, torch.device(args.device))
    result: dict[str, Any] = {
        "device": args.device, "threads": args.threads, "parameters": loop.parameters, "steps": args.steps, "targets": {},
    }  # fmt: skip
    folder = tempfile.mkdtemp(prefix="mmref-benchmark-", dir=args.folder)
    try:
        for name in args.targets:
            with _place(name, folder) as url:
                target = Target(name, url, loop)
                for _ in range(args.rounds):
                    target.round()
            result["targets"][name] = target.result()
            result["bytes"] = target.bytes
            result["loop_seconds"] = min(target.seconds["loop_without"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{loop.parameters / 1e6:.0f} M parameters, {result['bytes'] / 1e6:.0f} MB with moments and references, {args.device}")
    for name, found in result["targets"].items():
        print(f"{name}:")
        for key, value in found.items():
            print(f"  {key:<24} {value:8.2f}")
    if args.out:
        with open(args.out, "w") as file:
            json.dump(result, file, indent=1)


@contextmanager
def _place(name: str, folder: str) -> Iterator[str]:
    if name == "local":
        yield folder
        return
    with s3_server() as url:
        yield url


if __name__ == "__main__":
    main()
