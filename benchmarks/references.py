"""Memory that the references of a checkpoint take where a run is evaluated or exported, over the size of the bank in fp32.

    python benchmarks/references.py --objects 200000 --before OTHER_CHECKOUT --out references.json

A checkpoint's files of references are written, of one and of several ranks. A process of its own makes of them what is measured:
`evaluate` the space of codes, `export` also the file of an export. Its memory beyond the start is sampled: `anonymous` is what it
owns, `resident` also has pages of mapped files, which the system takes back when it needs them. With `--before` another checkout
of mmref does the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from output import write_figures

from mmref.run.row_file import pack_ids
from mmref.storage.tensor_file import Pieces, write_tensors

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = 10_000  # rows of the checkpoint at a time
IN_PROCESS = """
import json, pathlib, sys, threading, time
from types import SimpleNamespace
from mmref.evaluate.choose import trained_space
from mmref.export import write
from mmref.run import checkpoints, row_file
folder, what = sys.argv[1], sys.argv[2]
meta = json.loads(pathlib.Path(folder, "meta.json").read_text())
config = SimpleNamespace(loss=SimpleNamespace(uses_references=True))
ids = checkpoints.load_object_ids(folder, meta)
def now():
    lines = dict(line.split(":") for line in pathlib.Path("/proc/self/status").read_text().splitlines())
    return [1024 * int(lines[name].split()[0]) for name in ("RssAnon", "VmRSS")]
start, most, done = now(), [0, 0], threading.Event()
def sample():
    while not done.wait(0.002):
        most[:] = [max(a, b) for a, b in zip(most, now())]
thread = threading.Thread(target=sample, daemon=True)
thread.start()
if hasattr(row_file, "StoredReferences"):
    references = row_file.StoredReferences(folder, meta)
else:
    references = checkpoints.load_references(folder, meta).numpy()
space = trained_space(config, references)
if what == "export":
    write._write_references(pathlib.Path(sys.argv[3]), references, ids)
done.set()
thread.join()
print(json.dumps({name: high - low for name, low, high in zip(("anonymous", "resident"), start, most)}))
"""


def write_checkpoint(folder: Path, objects: int, per_object: int, dim: int, ranks: int) -> None:
    """Files of references of a checkpoint by `ranks` ranks, and what is needed of its meta.json."""
    g, files = torch.Generator().manual_seed(0), {}
    for rank in range(ranks):
        first, end = (objects * at // ranks for at in (rank, rank + 1))
        parts = [min(WRITTEN, end - at) for at in range(first, end, WRITTEN)]
        rows = (torch.nn.functional.normalize(torch.randn(n, per_object, dim, generator=g), dim=-1) for n in parts)
        tensors: dict[str, Any] = {"rows": Pieces((end - first, per_object, dim), torch.float32, rows)}
        tensors |= pack_ids(pa.array([f"object {i}" for i in range(first, end)], pa.large_string()))
        name = f"references-{rank}.safetensors"
        with open(folder / name, "wb") as file:
            write_tensors(file, tensors, {"first": str(first)})
        files[name] = {}
    (folder / "meta.json").write_text(json.dumps({"files": files}))


def measure(checkout: Path, folder: Path, what: str, size: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", IN_PROCESS, str(folder), what, out]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        done = subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, text=True)
    return {name: found / size for name, found in json.loads(done.stdout.splitlines()[-1]).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=int, default=200_000)
    parser.add_argument("--per-object", type=int, default=4)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--before", type=Path, help="another checkout of mmref")
    parser.add_argument("--out", help="write the figures here as JSON")
    args = parser.parse_args()
    size = 4 * args.objects * args.per_object * args.dim
    checkouts = {"now": ROOT, **({"before": args.before.resolve()} if args.before else {})}
    rows = []
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(Path(folder), args.objects, args.per_object, args.dim, ranks)
            for what in ("evaluate", "export"):
                found = {name: measure(checkout, Path(folder), what, size) for name, checkout in checkouts.items()}
                rows.append({"ranks": ranks, "what": what, **found})
    write_figures({"bank_gb": size / 1e9, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
