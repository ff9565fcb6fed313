"""`mmref sizing`: parses options and prints the table; the arithmetic is in estimate.py."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from mmref.config import AUTO, Config, load_config
from mmref.config.inputs import settled
from mmref.sizing.estimate import compute_sizing, format_table, measure_model, scaled
from mmref.storage.whole_folder import check_output, write_output
from mmref.terminal.arguments import local_path, positive
from mmref.terminal.parser import Parser


def main(argv: Sequence[str]) -> int:
    """`mmref sizing`."""
    parser = Parser(
        prog="mmref sizing",
        description="Memory of a worker, object store, bytes and FLOPs of a step, before a run is started. Flags of "
        "`mmref train` are taken as well: --config, --model.dual, --train.zero_stage, --reference.negatives ...",
    )
    parser.add_argument("--objects", type=positive, required=True, help="training objects, each with its references")
    parser.add_argument(
        "--workers", type=positive, nargs="+", help="numbers of workers, a column for each (default: train.workers)"
    )
    parser.add_argument(
        "--batch", type=positive, help="pairs of one worker in a step (default: train.global_batch / train.workers)"
    )
    parser.add_argument("--out", type=local_path, metavar="FILE", help="also write the numbers as JSON, in bytes")
    args, rest = parser.parse_known_args(argv)
    if args.out:
        check_output("--out", args.out)
    config = on_gpus(settled(load_config(rest)))
    batch = args.batch or config.train.global_batch // config.train.workers
    configs = [scaled(config, workers, batch) for workers in args.workers or [config.train.workers]]
    model = measure_model(configs[0], configs[0].micro_batch, args.objects)
    sizings = [compute_sizing(c, args.objects, model) for c in configs]
    where = "GPUs" if config.train.on_gpu else "CPUs"
    print(
        f"{model.parameters:,} parameters ({model.trained:,} trained), {args.objects:,} objects x "
        f"{config.reference.per_object} x {model.embed_dim}, {batch} pairs a worker, on {where}"
    )
    print(format_table(sizings))
    if args.out:
        numbers = [{**dataclasses.asdict(s), "device": s.device, "sent": s.sent} for s in sizings]
        write_output("--out", args.out, json.dumps(numbers, indent=1))
    return 0


def on_gpus(config: Config) -> Config:
    """A copy of a config for GPUs, which compute in bf16, where its `auto` leaves that open: the machine that is asked may have
    none, and is not the one that is to train."""
    t = config.train
    gpu = True if t.gpu == AUTO else t.gpu
    precision = "bf16" if gpu and t.precision == AUTO else t.precision
    return dataclasses.replace(config, train=dataclasses.replace(t, gpu=gpu, precision=precision))
