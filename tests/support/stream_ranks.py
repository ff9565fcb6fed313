"""Ranks that take their samples from the real Ray Data stream, late now and then, with readers that are late or killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from mmref.config import Config, from_dict, to_dict
from mmref.data import stream
from mmref.data.reader import Batch, StepReader, TaskReader, concatenate

COLUMNS = ("step", "position", "object", "image_index", "ids", "mask")


def ledger(batch: Batch) -> dict[str, Any]:
    """What is compared of a batch: the columns that name its samples, and a checksum of each image."""
    pixels = np.array([zlib.crc32(np.ascontiguousarray(image)) for image in batch["image"]])
    return {name: batch[name] for name in COLUMNS} | {"pixels": pixels}


def planned(config: Config, first: int, end: int) -> dict[str, Any]:
    """Steps first .. end - 1 read in this process by one rank, without Ray."""
    reader = StepReader(config)
    return concatenate([ledger(reader.read_step(step)) for step in range(first, end)])


class SlowReader(TaskReader):
    """A reader that is late at random and leaves `<node>-<process>` in the folder that MMREF_TEST_READERS names."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        node = ray.get_runtime_context().get_node_id()
        (Path(os.environ["MMREF_TEST_READERS"]) / f"{node}-{os.getpid()}").touch()

    def __call__(self, rows: dict[str, Any]) -> Batch:
        time.sleep(random.uniform(0, 0.15))
        return super().__call__(rows)


class Rank:
    """One rank: takes its steps, late at random."""

    def __init__(self, values: dict[str, Any], rank: int, world: int, start: int) -> None:
        setattr(stream, "TaskReader", SlowReader)  # noqa: B010
        self.stream = stream.Stream(from_dict(values), rank, world, start)

    def take(self, steps: int) -> dict[str, Any]:
        batches = []
        for _ in range(steps):
            time.sleep(random.uniform(0, 0.05))
            batches.append(ledger(next(self.stream)))
        return concatenate(batches)


def streamed(config: Config, world: int, first: int, end: int, spread: bool = False) -> dict[str, Any]:
    """Steps first .. end - 1 as `world` ranks got them, in order of (step, position)."""
    options = {"num_cpus": 1, **({"scheduling_strategy": "SPREAD"} if spread else {})}
    actor = ray.remote(**options)(Rank)  # type: ignore[call-overload]
    ranks = [actor.remote(to_dict(config), rank, world, first) for rank in range(world)]
    try:
        whole = concatenate(ray.get([rank.take.remote(end - first) for rank in ranks]))
    finally:
        for rank in ranks:
            ray.kill(rank)
    order = np.lexsort((whole["position"], whole["step"]))
    return {name: column[order] for name, column in whole.items()}


class Killer:
    """Kills a reader now and then, from the moment the first one is there, `kills` in all."""

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.kills, self.random = folder, kills, random.Random(seed)
        self.killed: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Killer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while len(self.killed) < self.kills and not self._stop.wait(self.random.uniform(0.3, 1.5)):
            named = {int(path.name.split("-")[1]) for path in self.folder.iterdir()}
            family = {process.pid for process in psutil.Process().children(recursive=True)}  # a number may be used again
            alive = sorted((named & family) - set(self.killed))
            if alive:
                self.killed.append(self.random.choice(alive))
                os.kill(self.killed[-1], signal.SIGKILL)
