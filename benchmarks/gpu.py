"""What one GPU makes of mmref, in eight minutes: `benchmarks/gpu.sh --out DIR` (docs/benchmarks.md).

    benchmarks/gpu.sh --out gpu                 # on an H100 or H200
    benchmarks/gpu.sh --tiny --out gpu          # a rehearsal of every part on the CPU, with tiny sizes: no figures

Each part runs in a process of its own, within a time of its own and what is left of `--minutes`. Those that tell most come
first. A part that fails or takes too long is written down, with the figures that it had by then, and the next one begins.
Models have random weights and the samples are the bundled ones, so nothing is fetched. Parts need neither Ray nor DeepSpeed,
but for `whole`, which is left out without them.

DIR/gpu.json and DIR/gpu.md hold all figures, after each part anew; DIR/logs/ what each part printed, DIR/profile/ a trace.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bank
import numpy as np
import torch
from step import VARIANTS, build, variant, with_lengths

from mmref.config import Config, from_dict
from mmref.config.inputs import settled
from mmref.data.reader import StepReader
from mmref.evaluate.metrics import evaluate_features, summarize
from mmref.evaluate.shares import QueryShare
from mmref.extras import missing
from mmref.run.directory import RunDir
from mmref.sizing.estimate import flops_of_a_pair
from mmref.sizing.peaks import multiplied_in, peak_flops
from mmref.train.profiler import WARM_UP, StepProfiler

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 29  # of a caption on average, as people's descriptions have (docs/benchmarks.md)
WARM_UP_STEPS = 3
PLAIN, ALIGN, FULL, WORDS = "plain loop", "align-only", "MMRef", "MMRef + reconstruction"
LEAST_S = 8.0  # a part is not begun with less time left
GRACE_S = 3.0  # for a part that is told to end
REHEARSAL_S = 4.0  # times the time of a part: a CPU may be busy, and compiling is slow there


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    dual: dict[str, Any]
    height: int
    width: int
    max_tokens: int
    batches: tuple[int, ...]  # the first has all variants, is compiled, and traced
    cached: tuple[int, int]  # pairs of a step under gradient caching, and of a micro-batch
    objects: int
    dim: int
    ranked: int  # captions, and images
    seconds: float  # of a measurement


VIT_B16 = {  # openai/clip-vit-base-patch16, but for the end token: the largest id of a caption, whatever the tokenizer
    "model_type": "clip", "projection_dim": 512, "vision_config": {"patch_size": 16},
    "text_config": {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2},
}  # fmt: skip
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TINY_CLIP = {
    "model_type": "clip", "projection_dim": 16, "vision_config": {**SMALL, "image_size": 32, "patch_size": 16},
    "text_config": {**SMALL, "vocab_size": 4000, "bos_token_id": 0, "eos_token_id": 2},
}  # fmt: skip
WHOLE = Sizes(VIT_B16, 384, 128, 77, (256, 512, 128, 64), (4096, 256), 1_000_000, 512, 19_848, 2.0)
TINY = Sizes(TINY_CLIP, 48, 16, 16, (16, 8), (32, 8), 2_000, 16, 200, 0.05)


@dataclass
class Part:
    """What a part is given: sizes, the device, and where its figures go."""

    sizes: Sizes
    device: torch.device
    file: Path

    def __post_init__(self) -> None:
        self.found: dict[str, Any] = {}

    def put(self, **figures: Any) -> None:
        """Add figures, and write all so far: a part that is ended keeps them. Lists grow."""
        for name, value in figures.items():
            self.found[name] = [*self.found.get(name, []), *value] if isinstance(value, list) else value
        self.file.write_text(json.dumps(self.found, indent=1))

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


# -- steps of training ---------------------------------------------------------------------------------------------------------


def config_of(part: Part, batch: int, losses: dict[str, float], **train: Any) -> Config:
    """The recipe of configs/clip_vit_b16.yaml with random weights on the bundled set; bf16 on a GPU."""
    sizes = part.sizes
    values = {
        "data": {
            "root": str(ROOT / "data_shards/emoji"), "image_height": sizes.height, "image_width": sizes.width,
            "max_tokens": sizes.max_tokens, "crop_padding": 10, "erase": 0.5, "readers": 8 if part.on_gpu else 1,
        },
        "model": {"dual_config": sizes.dual, "vision_config": None, "text_config": None},
        "loss": {"tau": 0.02},
        "train": {
            "gpu": part.on_gpu, "precision": "bf16" if part.on_gpu else "fp32", "global_batch": batch, "max_steps": 1000,
            "warmup_steps": 0, "lr": 1e-5, "lr_new": 5.0, "weight_decay": 4e-5, **train,
        },
    }  # fmt: skip
    return variant(settled(from_dict(values)), losses)


def batches_of(config: Config, steps: int) -> tuple[StepReader, list[Any]]:
    """Samples as a reader delivers them, with captions of TOKENS on average."""
    reader = StepReader(config)
    tokens = min(TOKENS, config.data.max_tokens // 2)
    return reader, [with_lengths(reader.read_step(step), tokens, reader.tokens.vocab_size) for step in range(steps)]


def plain_loop(config: Config, device: torch.device) -> Callable[[int, Any], torch.Tensor]:
    """The loop that others write: transformers' CLIP, InfoNCE over the batch, autocast, fused AdamW. No mmref in it.

    Captions are cut to the longest of the batch, as here, so that both compute the same.
    """
    from torch.nn import functional as F
    from transformers import AutoConfig, AutoModel

    model: Any = AutoModel.from_config(AutoConfig.for_model(**config.model.dual_config)).to(device).train()
    t, data = config.train, config.data
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=t.lr, betas=(0.9, t.beta2), eps=t.eps, weight_decay=t.weight_decay, fused=device.type == "cuda"
    )
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) * 255 for x in (data.image_mean, data.image_std))
    if t.compile:
        model.vision_model.compile()
        model.text_model.compile(dynamic=True)

    def run(step: int, batch: Any) -> torch.Tensor:
        longest = int(batch["mask"].sum(1).max())
        images = torch.from_numpy(batch["image"]).to(device, non_blocking=True)
        ids = torch.from_numpy(batch["ids"][:, :longest]).to(device, non_blocking=True).long()
        pixels = (images.permute(0, 3, 1, 2).float() - mean) / std
        with torch.autocast(device.type, torch.bfloat16, enabled=t.precision == "bf16"):
            seen = model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
            read = model.get_text_features(input_ids=ids)
        image, text = (F.normalize(getattr(x, "pooler_output", x).float(), dim=-1) for x in (seen, read))
        logits = model.logit_scale.exp() * image @ text.T
        labels = torch.arange(len(logits), device=device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def measured(part: Part, run: Callable[[int, Any], torch.Tensor], batches: Sequence[Any], flops: float) -> dict[str, Any]:
    """Time of a step, what it computes, and its largest memory; `flops` of a pair. The first steps warm up."""
    if part.on_gpu:
        gc.collect()  # the model before this one
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    run(0, batches[0])
    part.synchronize()
    first = time.perf_counter() - began
    for step in range(1, WARM_UP_STEPS):
        run(step, batches[step % len(batches)])
    part.synchronize()
    began, steps = time.perf_counter(), 0
    while steps < 3 or time.perf_counter() - began < part.sizes.seconds:
        loss = run(WARM_UP_STEPS + steps, batches[steps % len(batches)])
        steps += 1
        if steps % 4 == 0:
            part.synchronize()  # or the host would run ahead, and the clock say nothing
    part.synchronize()
    seconds = (time.perf_counter() - began) / steps
    pairs = len(batches[0]["ids"]) / seconds
    row = {
        "step_ms": 1e3 * seconds, "pairs_per_second": pairs, "tflops": pairs * flops / 1e12, "first_step_s": first,
        "finite": bool(torch.isfinite(loss).all()), **memory_of(part),
    }  # fmt: skip
    return row | share_of_peak(part, row["tflops"])


def memory_of(part: Part) -> dict[str, float]:
    return {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9} if part.on_gpu else {}


def share_of_peak(part: Part, tflops: float) -> dict[str, float]:
    peak = peak_flops(torch.cuda.get_device_name(part.device), multiplied_in(True)) if part.on_gpu else None
    return {"mfu": tflops * 1e12 / peak} if peak else {}


def time_variants(part: Part, names: Iterable[str], batch: int, steps: int, counted: dict[str, float], **train: Any) -> None:
    """A row for each variant at one batch; `counted` keeps FLOPs of a pair. A variant without memory has a row that says so."""
    plain = None
    reader, batches = batches_of(config_of(part, batch, VARIANTS[ALIGN], **train), steps)  # the same for all losses
    for name in names:
        config = config_of(part, batch, VARIANTS.get(name, VARIANTS[ALIGN]), **train)
        key = ALIGN if name == PLAIN else name
        if key not in counted:
            tokens = round(float(np.mean([b["mask"].sum(1).mean() for b in batches])))
            counted[key] = flops_of_a_pair(config, tokens, reader.index.n_objects)
        row: dict[str, Any] = {"variant": name, "batch": batch, "compiled": config.train.compile}
        try:
            run = plain_loop(config, part.device) if name == PLAIN else build(config, reader, part.device)[0]
            row |= measured(part, run, batches, counted[key])
        except torch.OutOfMemoryError as error:
            row["error"] = str(error).splitlines()[0]
        run = None  # its memory is the next one's
        if name == PLAIN:
            plain = row.get("pairs_per_second")
        if plain and "pairs_per_second" in row:
            row["ratio_to_plain"] = row["pairs_per_second"] / plain
        part.put(rows=[row])


def steps_part(part: Part) -> None:
    """Eager steps beside the plain loop, from the batch that tells most to the others."""
    counted: dict[str, float] = {}
    for batch in part.sizes.batches:
        names = (PLAIN, ALIGN, FULL, WORDS) if batch == part.sizes.batches[0] else (PLAIN, ALIGN, FULL)
        time_variants(part, names, batch, 3, counted)


def compiled_part(part: Part) -> None:
    time_variants(part, (FULL, PLAIN, ALIGN), part.sizes.batches[0], 3, {}, compile=True)


def cache_part(part: Part) -> None:
    """A batch that no memory holds, in micro-batches, and one micro-batch alone."""
    pairs, micro = part.sizes.cached
    counted: dict[str, float] = {}
    time_variants(part, (FULL,), pairs, 1, counted, accumulation=pairs // micro)
    time_variants(part, (FULL,), micro, 1, counted)


def profile_part(part: Part) -> None:
    config = config_of(part, part.sizes.batches[0], VARIANTS[FULL])
    reader, batches = batches_of(config, 2)
    run, _ = build(config, reader, part.device)
    folder = part.file.parent.parent
    with StepProfiler(RunDir(str(folder)), 3, part.device) as profiler:
        for step in range(WARM_UP + 3):
            run(step, batches[step % len(batches)])
            profiler.step()
    part.put(**of_trace(json.loads(gzip.decompress((folder / "profile/trace.json.gz").read_bytes()))["traceEvents"], 3))


WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def of_trace(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Of a trace of some steps: how often each the host waits, copies of pageable memory, and the share of time kernels run."""
    names = [event.get("name", "") for event in events]
    waits = {name: names.count(name) / steps for name in WAITS if name in names}
    found: dict[str, Any] = {"waits_per_step": waits, "pageable_copies_per_step": sum("Pageable" in n for n in names) / steps}
    kernels = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") == "kernel")
    if kernels:
        busy = end = 0.0
        for start, stop in kernels:
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        found |= {"kernels_per_step": len(kernels) / steps, "gpu_busy": busy / (end - kernels[0][0])}
    return found


# -- references, ranking, tests, the whole path --------------------------------------------------------------------------------


def bank_part(part: Part) -> None:
    sizes = part.sizes
    for place in ("device", "host"):
        args = argparse.Namespace(
            objects=[sizes.objects // 100, sizes.objects], dim=sizes.dim, batch=sizes.batches[0], negatives=4096, rounds=5,
            steps=3, update="moving_average", row_dtype="fp32", rows_on=place, encoder_layers=12, tokens=16,
        )  # fmt: skip
        if part.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        entries = bank.measure(args, part.device)
        keys = ("objects", "step_ms", "bank_ms", "step_ratio", "bytes_per_worker")
        part.put(rows=[{"rows_on": place, **{key: entry[key] for key in keys}, **memory_of(part)} for entry in entries])


def ranking_part(part: Part) -> None:
    """As many captions as images, two of an object: mmref's ranking, and products and counts alone on the device."""
    count, rng = part.sizes.ranked, np.random.default_rng(0)
    labels = rng.permutation(np.arange(count) // 2)
    centers = rng.standard_normal((count // 2 + 1, part.sizes.dim), dtype=np.float32)
    text, image = (centers[labels] + 3 * rng.standard_normal((count, part.sizes.dim), dtype=np.float32) for _ in range(2))
    text, image = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (text, image))
    bare_ranks(part, text, image, labels)  # warms up
    began = time.perf_counter()
    first = bare_ranks(part, text, image, labels)
    part.put(
        captions=count, bare_on_device_s=time.perf_counter() - began, bare_r1=100 * float((first == 1).mean()), **memory_of(part)
    )
    began = time.perf_counter()
    found = summarize(evaluate_features(text, image, labels, labels, share=QueryShare(device=part.device)))
    part.put(mmref_s=time.perf_counter() - began, mmref_r1=found["R@1"])


def bare_ranks(part: Part, text: np.ndarray, image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of the first hit of each caption, by products and one comparison of every score, 1,024 captions at a time."""
    queries, gallery, owners = (torch.from_numpy(x).to(part.device) for x in (text, image, labels))
    found = []
    for some, own in zip(queries.split(1024), owners.split(1024)):
        scores = some @ gallery.T
        best = scores.masked_fill(own[:, None] != owners, -2.0).amax(1, keepdim=True)
        found.append(1 + (scores > best).sum(1))
    return torch.cat(found).cpu().numpy()


def tests_part(part: Part) -> None:
    """Tests marked `gpu`; on a CPU they are rehearsed."""
    environment = {**os.environ, **({} if part.on_gpu else {"MMREF_GPU_TESTS_ON": "cpu"})}
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    print(done.stdout, done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    part.put(outcome=lines[-1] if lines else done.stderr[-500:], failures=[line for line in lines if line.startswith("FAILED")])
    if done.returncode:
        raise SystemExit(done.returncode)


def whole_part(part: Part) -> None:
    """`mmref train` with Ray, Ray Data and DeepSpeed, beside the bare step of the same config."""
    if absent := missing("train"):
        part.put(left_out=f"{', '.join(absent)} not installed")
        return
    from whole_run import run_trainer

    config = config_of(part, part.sizes.batches[0], VARIANTS[FULL])
    reader, batches = batches_of(config, 3)
    run, _ = build(config, reader, part.device)
    bare = measured(part, run, batches, flops_of_a_pair(config, TOKENS, reader.index.n_objects))["pairs_per_second"]
    run = None
    part.put(bare_pairs_per_second=bare)
    found = run_trainer(config, windows=2, window_steps=10 if part.on_gpu else 2)
    part.put(**found, ratio=found["images_per_second"] / bare)


PARTS: dict[str, tuple[Callable[[Part], None], float, str]] = {  # what runs, its seconds at most, its heading; by what they tell
    "steps": (steps_part, 150, "Steps, eager"),
    "tests": (tests_part, 75, "Tests marked `gpu`"),
    "compiled": (compiled_part, 110, "Steps, compiled"),
    "cache": (cache_part, 50, "Gradient caching"),
    "bank": (bank_part, 45, "The reference bank"),
    "ranking": (ranking_part, 45, "Ranking"),
    "profile": (profile_part, 45, "A trace of three steps"),
    "whole": (whole_part, 90, "The whole path of `mmref train`"),
}


# -- all parts -----------------------------------------------------------------------------------------------------------------


def run_part(name: str, limit: float, arguments: Sequence[str], out: Path) -> dict[str, Any]:
    """One part in a process of its own: what became of it, and the figures it has written."""
    file, log = out / "parts" / f"{name}.json", out / "logs" / f"{name}.txt"
    file.unlink(missing_ok=True)
    began = time.perf_counter()
    with log.open("w") as printed:
        command = [sys.executable, __file__, "--part", name, "--out", str(out), *arguments]
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = "ok" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = f"ended after its {limit:.0f} s"
            with contextlib.suppress(subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(GRACE_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it has started too
            process.wait()
    entry: dict[str, Any] = {"status": status, "seconds": time.perf_counter() - began}
    if status != "ok":
        entry["printed_last"] = log.read_text(errors="replace")[-1500:]
    return entry | (json.loads(file.read_text()) if file.exists() else {})


def run_all(args: argparse.Namespace, out: Path) -> int:
    """Every part that there is time for, one after the other; 1 where one did not end well."""
    began = time.perf_counter()
    for folder in ("parts", "logs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"machine": machine(args.tiny), "minutes": args.minutes, "parts": {}}
    arguments = ["--tiny"] if args.tiny else []
    for name in args.only or PARTS:
        left = 60 * args.minutes - (time.perf_counter() - began)
        if left < LEAST_S:
            found["parts"][name] = {"status": "no time left", "seconds": 0.0}
        else:
            print(f"{name} ...", flush=True)
            limit = PARTS[name][1] * (REHEARSAL_S if args.tiny else 1)
            found["parts"][name] = run_part(name, min(left - GRACE_S, limit), arguments, out)
        entry = found["parts"][name]
        print(f"{name}: {entry['status']}, {entry['seconds']:.0f} s", flush=True)
        found["seconds"] = time.perf_counter() - began
        (out / "gpu.json").write_text(json.dumps(found, indent=1))
        (out / "gpu.md").write_text(as_markdown(found))
    print((out / "gpu.md").read_text())
    return int(any(entry["status"] != "ok" for entry in found["parts"].values()))


def machine(tiny: bool) -> dict[str, Any]:
    import platform

    import transformers

    on_gpu = torch.cuda.is_available() and not tiny
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    return {
        "device": device, "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9 if on_gpu else None,
        "peak_tflops_bf16": (peak_flops(device, "bf16") or 0) / 1e12 or None if on_gpu else None, "cores": os.cpu_count(),
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d %H:%M"), "rehearsal": tiny,
    }  # fmt: skip


def as_markdown(found: dict[str, Any]) -> str:
    """All figures as tables, a section for each part."""
    about = found["machine"]
    lines = [f"# {about['device']}, {about['date']}", ""]
    if about["rehearsal"]:
        lines += ["A rehearsal with tiny sizes: every number below says only that its part runs.", ""]
    lines += [
        f"Python {about['python']}, torch {about['torch']}, transformers {about['transformers']}, {found['seconds']:.0f} s.",
        "",
    ]
    for name, entry in found["parts"].items():
        lines += [f"## {PARTS[name][2]}", "", f"`{name}`: {entry['status']}, {entry['seconds']:.0f} s.", ""]
        if rows := entry.get("rows"):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
            lines += [f"| {' | '.join(shown(row.get(column)) for column in columns)} |" for row in rows]
            lines.append("")
        others = {key: value for key, value in entry.items() if key not in ("rows", "status", "seconds", "printed_last")}
        lines += [f"- {key}: {shown(value)}" for key, value in others.items()]
        lines += [""] if others else []
        if last := entry.get("printed_last"):
            lines += ["```", last.strip(), "```", ""]
    return "\n".join(lines)


def shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(inner)}" for key, inner in value.items()) or "none"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for figures, logs and the trace")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts together (default: 8)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal with tiny sizes on the CPU")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what each process is started with
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny rehearses the parts on the CPU")
    out = args.out.absolute()
    if args.part is None:
        return run_all(args, out)
    device = torch.device("cpu" if args.tiny else "cuda")
    PARTS[args.part][0](Part(TINY if args.tiny else WHOLE, device, out / "parts" / f"{args.part}.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
