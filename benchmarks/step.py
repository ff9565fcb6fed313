"""Time of a training step: align-only, MMRef, and MMRef with reconstruction, in turns in one process, without Ray.

    python benchmarks/step.py --config configs/emoji.yaml --device cpu --threads 1 --out step.json

The samples are the run's own, read before the clock starts. Rounds alternate between the variants, so that noise of the
machine meets all alike; the median of the rounds' ratios is reported.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

from mmref.config import Config, from_dict, load_config, to_dict
from mmref.data.reader import StepReader
from mmref.model.mmref import build_model
from mmref.train.bank import ReferenceBank
from mmref.train.engine import parameter_groups
from mmref.train.step import StepRunner

VARIANTS: dict[str, dict[str, float]] = {
    "align-only": {"w_guide": 0.0, "w_fuse": 0.0, "w_rec": 0.0},
    "MMRef": {"w_rec": 0.0},
    "MMRef + reconstruction": {"w_rec": 0.2},
}


def variant(config: Config, losses: dict[str, float]) -> Config:
    """The config with other loss weights, guidance on from the first step."""
    values = to_dict(config)
    values["loss"] |= {**losses, "guide_from": 0.0, "guide_full": 0.0}
    return from_dict(values)


def build(config: Config, reader: StepReader, device: torch.device) -> Any:
    """A function that runs one step of a variant with AdamW."""
    model = build_model(config, reader.tokens.vocab_size, reader.index.n_objects).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.train))
    bank = ReferenceBank(reader.index.n_objects, model.embed_dim, config.reference, config.train.seed, device)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    runner = StepRunner(config, model, lambda loss: loss.backward(), update, bank, reader.tokens, device)
    return runner.run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/emoji.yaml")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="steps of a variant in a round")
    parser.add_argument("--out", help="JSON file")
    args, passed = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = load_config(["--config", args.config, "--train.gpu", str(args.device == "cuda").lower(), *passed])
    reader = StepReader(config)
    batches = [reader.read_step(s) for s in range(args.steps)]
    runs = {name: build(variant(config, losses), reader, device) for name, losses in VARIANTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(args.rounds + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            for step, batch in enumerate(batches):
                values = run(step, batch)
            values.cpu()  # waits for the device
            if round_:  # the first round warms up
                seconds[name].append((time.perf_counter() - began) / args.steps)
    base = np.array(seconds["align-only"])
    result = {
        name: {
            "step_ms": float(np.median(s) * 1e3),
            "images_per_second": config.train.global_batch / float(np.median(s)),
            "ratio": float(np.median(np.array(s) / base)),
        }
        for name, s in seconds.items()
    }
    print(f"{'variant':<24}{'step ms':>10}{'images/s':>10}{'ratio':>8}")
    for name, r in result.items():
        print(f"{name:<24}{r['step_ms']:>10.0f}{r['images_per_second']:>10.0f}{r['ratio']:>8.2f}")
    if args.out:
        with open(args.out, "w") as file:
            json.dump({"device": args.device, "threads": args.threads, "config": args.config, **result}, file, indent=1)


if __name__ == "__main__":
    main()
