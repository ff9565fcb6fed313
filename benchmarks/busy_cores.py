"""What a search pays where other programs want the cores: sentences are encoded, alone and beside a process for each core.

Threads of PyTorch wait for each other by spinning. `mmref` has them spin shortly (GOMP_SPINCOUNT, mmref/cli.py); "as PyTorch
does" is without it. Each row is a process of its own, in turns, so that noise of the machine meets all alike.

    python benchmarks/busy_cores.py --index INDEX --out busy_cores.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
from output import write_figures

WAYS = ("as PyTorch does", "as mmref does")
BATCHES = (1, 8, 32)
BUSY = "while True: sum(range(1_000_000))"


def encode(index: str, rounds: int, way: str) -> dict[str, float]:
    """Median milliseconds of sentences by their number, in this process."""
    if way == "as mmref does":
        import mmref.cli  # noqa: F401  # which sets it, before PyTorch is imported
    import torch

    from mmref.cluster.resources import cores
    from mmref.retrieval.searcher import Searcher

    searcher = Searcher(index)
    torch.set_num_threads(cores())
    captions = sorted({c for c in searcher.items["caption"].to_pylist() if c})
    found = {}
    for count in BATCHES:
        searcher.model.encode_text(captions[:count])
        took = []
        for n in range(rounds):
            began = time.perf_counter()
            searcher.model.encode_text(captions[n : n + count])
            took.append(1000 * (time.perf_counter() - began))
        found[str(count)] = float(np.median(took))
    return found


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other programs that compute meanwhile."""
    started = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True, help="directory of `mmref index`, of a set with captions")
    parser.add_argument("--rounds", type=int, default=15, help="of each number of sentences")
    parser.add_argument("--turns", type=int, default=2, help="of each way to wait; the median is reported")
    parser.add_argument("--out", help="also write the figures to this file")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(encode(args.index, args.rounds, args.worker)))
        return
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, __file__, "--index", args.index, "--rounds", str(args.rounds)]
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for others in (0, os.cpu_count() or 1):
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        with busy(others):
            for _ in range(args.turns):
                for name in WAYS:
                    done = subprocess.run([*command, "--worker", name], env=plain, text=True, stdout=subprocess.PIPE, check=True)
                    runs[name].append(json.loads(done.stdout.splitlines()[-1]))
        figures[f"{others} others"] = {
            name: {f"{n} sentences, ms": float(np.median([run[str(n)] for run in found])) for n in BATCHES}
            for name, found in runs.items()
        }
    write_figures({"cores": os.cpu_count(), "encoding": figures}, args.out)


if __name__ == "__main__":
    main()
