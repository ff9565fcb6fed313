"""Images per second of the real trainer on 1, 2 and 4 workers, with the same batch for each worker.

    python benchmarks/scaling.py --config configs/emoji.yaml --device cpu --batch 48 --out scaling.json

Efficiency is images/s over (workers x images/s of the first row). Workers share a machine's cores: on a CPU it cannot be more
than cores / (workers x threads), which is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import time

from whole_run import run_trainer

from mmref.cluster.resources import torch_threads
from mmref.config import from_dict, load_config, to_dict
from mmref.config.inputs import settled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/emoji.yaml")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=48, help="pairs of one worker in a step")
    parser.add_argument("--windows", type=int, default=3, help="log windows that are timed, after one that warms up")
    parser.add_argument("--steps", type=int, default=5, help="steps of a window")
    parser.add_argument("--out", help="JSON file")
    args, passed = parser.parse_known_args()
    gpu = args.device == "cuda"
    config = load_config(
        ["--config", args.config, "--train.gpu", str(gpu).lower(), *([] if gpu else ["--train.threads", "1"]), *passed]
    )
    config = settled(config)
    cores = os.cpu_count() or 1
    rows = []
    for workers in args.workers:
        values = to_dict(config)
        values["train"] |= {"workers": workers, "global_batch": workers * args.batch}
        began = time.perf_counter()
        row = {"workers": workers, **run_trainer(from_dict(values), args.windows, args.steps)}
        first = rows[0] if rows else row
        row["efficiency"] = row["images_per_second"] / first["images_per_second"] * first["workers"] / workers
        row["most_by_cores"] = 1.0 if gpu else min(1.0, cores / (workers * torch_threads(config.train.threads, workers)))
        row["wall_seconds"] = time.perf_counter() - began
        rows.append(row)
    print(f"{'workers':>8}{'images/s':>10}{'step ms':>10}{'data wait %':>13}{'efficiency':>12}{'most by cores':>15}")
    for r in rows:
        print(
            f"{r['workers']:>8}{r['images_per_second']:>10.0f}{1e3 * r['step_seconds']:>10.0f}{100 * r['data_wait']:>13.1f}"
            f"{r['efficiency']:>12.2f}{r['most_by_cores']:>15.2f}"
        )
    if args.out:
        with open(args.out, "w") as file:
            json.dump(
                {"device": args.device, "config": args.config, "batch": args.batch, "cores": cores, "rows": rows},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
