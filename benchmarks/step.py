"""Time of a training step: align-only, MMRef, and MMRef with reconstruction, in turns in one process, without Ray.

    python benchmarks/step.py --config configs/emoji.yaml --device cpu --threads 1 --with-ray --out step.json

The samples are the run's own, read before the clock starts. Rounds alternate between the variants, so that noise of the
machine meets all alike; the median of the rounds' ratios is reported.

MFU is the FLOPs of a step, counted on the step itself, over its time and the peak of the device: NVIDIA's figure for dense
products in the run's precision where the GPU is known, else the fastest of some large matrix products in the run's precision.

`--parts` adds MMRef's step without what makes it cheaper: with every caption padded, with PyTorch's gradient of depthwise
kernels, and with both, as version 0.2.0 had it. `--caption-tokens 29` gives captions lengths around that mean, whatever the
set has. `--compiled` adds MMRef's step with compiled towers, and says how long its first step takes.

`--with-ray` runs the real trainer (Ray Data, Ray Train, DeepSpeed) with the config's own losses between two measurements of
the same step bare, and compares.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from typing import Any
from unittest import mock

import numpy as np
import torch

from mmref.config import Config, from_dict, load_config, to_dict
from mmref.config.inputs import settled
from mmref.data import augment
from mmref.data.augment import normalize
from mmref.data.reader import StepReader
from mmref.model import depthwise
from mmref.model.flops import flop_counter
from mmref.model.mmref import build_model
from mmref.sizing.peaks import multiplied_in, peak_flops
from mmref.train import inputs
from mmref.train.bank import ReferenceBank
from mmref.train.engine import parameter_groups
from mmref.train.step import StepRunner

VARIANTS: dict[str, dict[str, float]] = {
    "align-only": {"w_guide": 0.0, "w_fuse": 0.0, "w_rec": 0.0},
    "MMRef": {"w_rec": 0.0},
    "MMRef + reconstruction": {"w_rec": 0.2},
    "IRRA objective": {"w_guide": 0.0, "w_fuse": 0.0, "w_rec": 0.0, "w_id": 1.0, "w_mlm": 1.0},
}


def planar(images: Any, config: Any) -> Any:
    """Images whose channels lie one behind the other, as they did in version 0.2.0."""
    return normalize(images, config).contiguous()


PADDED = mock.patch.object(inputs, "group_texts", lambda mask, device: None)
KERNELS = mock.patch.object(depthwise, "MOST_CELLS", 0)
PLANAR = mock.patch.object(augment, "normalize", planar)
PARTS = {  # MMRef's step, as it was in version 0.2.0 in some respects
    "captions padded": (PADDED,),
    "PyTorch's depthwise": (KERNELS, PLANAR),
    "both, as in 0.2.0": (PADDED, KERNELS, PLANAR),
}
COMPILED = "MMRef, compiled"


def reachable_flops(device: torch.device, bf16: bool) -> tuple[float, str]:
    """FLOP/s that a device can reach, and where the number comes from."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if peak := peak_flops(name, multiplied_in(bf16)):
            return peak, f"{name}, data sheet"
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best, f"{size} x {size} matrix product in {'bf16' if bf16 else 'fp32'}, measured"


def variant(config: Config, losses: dict[str, float]) -> Config:
    """The config with other loss weights, guidance on from the first step."""
    values = to_dict(config)
    values["loss"] |= {**losses, "guide_from": 0.0, "guide_full": 0.0}
    return from_dict(values)


def build(config: Config, reader: StepReader, device: torch.device) -> Any:
    """A function that runs one step of a variant with AdamW."""
    model = build_model(config, reader.tokens.vocab_size, reader.index.n_objects).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.train), fused=device.type == "cuda")
    bank = ReferenceBank(reader.index.n_objects, model.embed_dim, config.reference, config.train.seed, device)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if config.train.compile:
        model.compile_towers()
    runner = StepRunner(config, model, lambda loss: loss.backward(), update, bank, reader.tokens, device)
    return lambda step, batch: runner.run(step, runner.prepare(step, batch)), model.bf16


def patched_step(patches: tuple[Any, ...], run: Any) -> Any:
    """A step inside patches."""

    def patched(*args: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            return run(*args)

    return patched


def with_lengths(batch: Any, tokens: int, vocabulary: int) -> Any:
    """The batch with captions of other lengths: normally distributed around a mean, a third of it wide, of random words."""
    rng, (count, longest) = np.random.default_rng(int(batch["step"][0])), batch["ids"].shape
    lengths = rng.normal(tokens, tokens / 3, count).round().clip(4, longest).astype(int)
    mask = (np.arange(longest) < lengths[:, None]).astype(batch["mask"].dtype)
    ids = rng.integers(5, vocabulary - 5, batch["ids"].shape).astype(batch["ids"].dtype)
    ids[np.arange(count), lengths - 1] = batch["ids"].max()  # an end token, where CLIP looks for one
    return {**batch, "ids": ids, "mask": mask}


def seconds_of_a_step(run: Any, batches: list[Any]) -> float:
    """Mean over the batches, one step each."""
    began = time.perf_counter()
    for number, batch in enumerate(batches):
        values = run(number, batch)
    values.cpu()  # waits for the device
    return (time.perf_counter() - began) / len(batches)


def compare_with_ray(config: Config, reader: StepReader, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The trainer between two measurements of the bare step; `ratio` is its images/s over the bare step's."""
    from whole_run import run_trainer  # what is behind it needs Ray, and the rest does without

    run, _ = build(config, reader, device)
    batches = [reader.read_step(s) for s in range(args.steps)]

    def bare() -> list[float]:
        seconds_of_a_step(run, batches)
        return [seconds_of_a_step(run, batches) for _ in range(args.rounds)]

    before = bare()
    ray = run_trainer(config, windows=args.rounds, window_steps=args.steps)
    seconds = float(np.median(before + bare()))
    return {"bare_images_per_second": config.train.global_batch / seconds, **ray,
            "ratio": ray["images_per_second"] * seconds / config.train.global_batch}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/emoji.yaml")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="steps of a variant in a round")
    parser.add_argument("--parts", action="store_true", help="also MMRef without what makes a step cheaper")
    parser.add_argument("--compiled", action="store_true", help="also MMRef with `train.compile`")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="these variants; ratios are to the first of them")
    parser.add_argument("--caption-tokens", type=int, help="mean length of captions, in tokens")
    parser.add_argument("--with-ray", action="store_true", help="also compare with the whole path of `mmref train`")
    parser.add_argument("--out", help="JSON file")
    args, passed = parser.parse_known_args()
    if (args.parts or args.compiled) and "MMRef" not in (args.only or VARIANTS):
        parser.error("--parts and --compiled are of MMRef: name it in --only as well")
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    config = settled(load_config(["--config", args.config, "--train.gpu", str(args.device == "cuda").lower(),
                                  "--train.threads", str(args.threads), *passed]))  # fmt: skip
    reader = StepReader(config)
    batches = [reader.read_step(s) for s in range(args.steps)]
    if args.caption_tokens:
        batches = [with_lengths(batch, args.caption_tokens, reader.tokens.vocab_size) for batch in batches]
    built = {name: build(variant(config, VARIANTS[name]), reader, device) for name in args.only or VARIANTS}
    runs = {name: run for name, (run, _) in built.items()}
    if args.parts:
        runs |= {f"MMRef, {name}": patched_step(patches, built["MMRef"][0]) for name, patches in PARTS.items()}
    if args.compiled:
        compiled = variant(config, VARIANTS["MMRef"])
        compiled.train.compile = True
        runs[COMPILED] = build(compiled, reader, device)[0]
    peak, peak_source = reachable_flops(device, next(iter(built.values()))[1])
    result: dict[str, dict[str, float]] = {}
    for name, run in runs.items():  # warms up as well
        began = time.perf_counter()
        run(0, batches[0])
        if name == COMPILED:
            print(f"the first step compiles: {time.perf_counter() - began:.0f} s")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with flop_counter() as counter:
            run(0, batches[0])
        # What the compiler has fused is not seen by the counter; it is the same arithmetic.
        counted = result["MMRef"]["tflop"] if name == COMPILED else counter.get_total_flops() / 1e12
        result[name] = {"tflop": counted}
        if device.type == "cuda":
            result[name]["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_of_a_step(run, batches))
    base = np.array(next(iter(seconds.values())))
    for name, s in seconds.items():
        result[name] |= {
            "step_ms": float(np.median(s) * 1e3),
            "images_per_second": config.train.global_batch / float(np.median(s)),
            "mfu": result[name]["tflop"] * 1e12 / float(np.median(s)) / peak,
            "ratio": float(np.median(np.array(s) / base)),
        }
    print(f"{'variant':<24}{'step ms':>10}{'images/s':>10}{'GFLOP':>9}{'MFU %':>8}{'ratio':>8}")
    for name, r in result.items():
        print(
            f"{name:<24}{r['step_ms']:>10.0f}{r['images_per_second']:>10.0f}{1e3 * r['tflop']:>9.1f}{100 * r['mfu']:>8.1f}"
            f"{r['ratio']:>8.2f}"
        )
    print(f"peak {peak / 1e12:.2f} TFLOP/s ({peak_source})")
    found: dict[str, Any] = {"device": args.device, "threads": args.threads, "config": args.config, "peak_flops": peak,
                             "peak_source": peak_source, **result}  # fmt: skip
    if args.with_ray:
        found["with Ray"] = ray = compare_with_ray(config, reader, device, args)
        print(
            f"whole path: {ray['images_per_second']:.0f} images/s, the bare step {ray['bare_images_per_second']:.0f}: "
            f"ratio {ray['ratio']:.2f}, data wait {100 * ray['data_wait']:.1f} %"
        )
    if args.out:
        with open(args.out, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
