"""Images per second from shards to training workers: mmref's stream against webdataset with torch's DataLoader.

    python benchmarks/data.py --config configs/emoji.yaml --workers 2 --out data.json
    python benchmarks/data.py --images jpeg --workers 2 --data.image_height 224 --data.image_width 224 --out data.json

    python benchmarks/data.py --config configs/smoke.yaml --first-batch 400 240000 --out first.json

Both read the same tars and do the same work on a sample (json, caption, decoding, resizing, tokens), and both hand whole
batches to `--workers` consumers in processes of their own, each with `data.readers` reading processes. A consumer only
takes. The two alternate over the rounds; each is started anew in its round, and the clock starts when it has run warm.
mmref also keeps the plan (P x Q, an exact order); webdataset shuffles within a buffer, from shards drawn with replacement.

The last command measures one worker's stream at the beginning of trainings of so many steps, each in a new process: until its
first batch, and what handing over a batch takes that is ready, after the `--pause-ms` that a step takes. The same loop
without a stream tells what the machine does to it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np
import psutil
import torch

from mmref.cluster.connection import connect
from mmref.config import Config, from_dict, load_config, to_dict
from mmref.config.inputs import settled
from mmref.data.captions import usable_captions
from mmref.data.fit import Fit
from mmref.data.shard_set import ShardSet
from mmref.data.stream import Stream, quiet_ray_data
from mmref.data.tokens import load_tokens
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.samples import SourceImage, SourceObject

SHUFFLE_BUFFER = 500  # samples of one webdataset reader, encoded
JPEG_SIDE = (227, 376)  # pixels of a made photograph's sides, at least and below


class JpegSource:
    """Objects with four textured JPEGs of random sizes between 227 and 375 pixels, one caption each."""

    name, licence, origin, min_images = "jpeg", "CC0-1.0", "random numbers", 1

    def __init__(self, objects: int = 300) -> None:
        self.count = objects
        self.skipped: list[str] = []

    def objects(self) -> Iterable[SourceObject]:
        for number in range(self.count):
            caption = f"a texture of colour {number % 17}, grain {number % 5} and number {number}"
            images = [SourceImage(f"{number}-{i}", 4 * number + i, [caption], []) for i in range(4)]
            yield SourceObject("train", f"texture-{number}", images)

    def load(self, ref: int) -> bytes:
        rng = np.random.default_rng(ref)
        height, width = rng.integers(*JPEG_SIDE, 2).tolist()
        coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        pixels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        pixels += rng.integers(-12, 13, pixels.shape, dtype=np.int16)
        done, data = cv2.imencode(".jpg", pixels.clip(0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 85])
        assert done
        return data.tobytes()

    def write_extras(self, root: str) -> None:
        """Nothing."""


class WebDatasetReader:
    """webdataset's side of the work: a stream of tar members -> batches, inside a process of the DataLoader."""

    def __init__(self, config: Config, world: int) -> None:
        self.config, self.batch = config, config.train.global_batch // world
        self.tokens = load_tokens(config)
        self.rng = np.random.default_rng()

    def sample(self, raw: dict[str, Any]) -> tuple[np.ndarray, str]:
        image = next(raw[ending] for ending in ("jpg", "png", "webp") if ending in raw)
        captions = usable_captions(json.loads(raw["json"]), raw["__key__"])
        data = self.config.data
        pixels = Fit.of(data).decode(image, raw["__key__"])
        return pixels, captions[self.rng.integers(len(captions))][0]

    def collate(self, samples: list[tuple[np.ndarray, str]]) -> dict[str, np.ndarray]:
        images, captions = zip(*samples)
        ids, mask = self.tokens(list(captions))
        return {"image": np.stack(images), "ids": ids, "mask": mask}

    def batches(self, rank: int) -> Iterator[dict[str, np.ndarray]]:
        import webdataset

        paths = ShardSet.open(self.config.data.root).shard_paths("train")
        stream = webdataset.WebDataset(paths, resampled=True, shardshuffle=False, seed=rank, empty_check=False)
        stream = stream.shuffle(SHUFFLE_BUFFER).map(self.sample).batched(self.batch, collation_fn=self.collate)
        return iter(torch.utils.data.DataLoader(stream, batch_size=None, num_workers=self.config.data.readers))


class Consumer:
    """A training worker that only takes its samples and puts them on its device."""

    def __init__(self, kind: str, values: dict[str, Any], rank: int, world: int, device: str) -> None:
        torch.set_num_threads(1)
        config = from_dict(values)
        self.device = torch.device(device)
        if kind == "mmref":
            quiet_ray_data()
            self.batches: Iterator[dict[str, Any]] = Stream(config, rank, world, start=0)
        else:
            self.batches = WebDatasetReader(config, world).batches(rank)

    def take(self, steps: int) -> int:
        """Images of that many steps."""
        images = 0
        for _ in range(steps):
            batch = next(self.batches)
            for name in ("image", "ids", "mask"):
                torch.as_tensor(np.ascontiguousarray(batch[name])).to(self.device)
            images += len(batch["image"])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return images


class Opening:
    """A training worker at its start."""

    def __init__(self, values: dict[str, Any], steps: int) -> None:
        torch.set_num_threads(1)
        quiet_ray_data()
        self.config = from_dict(values)
        self.config.train.max_steps = steps

    def first_batch(self) -> dict[str, float]:
        """Seconds and MB of this process until the first batch is there."""
        process = psutil.Process()
        before, began = process.memory_info().rss, time.perf_counter()
        self.stream = Stream(self.config, 0, 1, start=0)
        next(self.stream)
        return {"seconds": time.perf_counter() - began, "mb": (process.memory_info().rss - before) / 1e6}

    def hand_over(self, batches: int, pause_s: float) -> dict[str, float]:
        """Milliseconds of `next` for a batch that is ready, and of one piece of Python and torch with and without a stream."""
        matrix = torch.ones(64, 64)

        def launch() -> float:
            began = time.perf_counter()
            for _ in range(100):
                matrix.add(1)
            return 1e3 * (time.perf_counter() - began)

        taken, beside = [], []
        for _ in range(batches):
            time.sleep(pause_s)
            began = time.perf_counter()
            next(self.stream)
            taken.append(1e3 * (time.perf_counter() - began))
            beside.append(launch())
        del self.stream
        alone = []
        for _ in range(batches):
            time.sleep(pause_s)
            alone.append(launch())
        return {
            "hand_over_ms": float(np.median(taken)), "hand_over_ms_p99": float(np.percentile(taken, 99)),
            "launches_ms": float(np.median(beside)), "launches_ms_p99": float(np.percentile(beside, 99)),
            "launches_alone_ms": float(np.median(alone)), "launches_alone_ms_p99": float(np.percentile(alone, 99)),
        }  # fmt: skip


def openings(config: Config, args: argparse.Namespace) -> list[dict[str, float]]:
    """A row for each length of training."""
    import ray

    rows = []
    for steps in args.first_batch:
        actor = ray.remote(num_cpus=1)(Opening).remote(to_dict(config), steps)
        found = {"steps": steps, **ray.get(actor.first_batch.remote())}
        found |= ray.get(actor.hand_over.remote(args.steps, args.pause_ms / 1e3))
        ray.kill(actor)
        rows.append(found)
        print(
            f"{steps:>9,} steps: first batch after {found['seconds']:.1f} s and {found['mb']:.0f} MB; a ready batch is handed "
            f"over in {found['hand_over_ms']:.2f} ms (p99 {found['hand_over_ms_p99']:.1f}); 100 launches take "
            f"{found['launches_ms']:.2f} ms (p99 {found['launches_ms_p99']:.1f}), without a stream "
            f"{found['launches_alone_ms']:.2f} ms (p99 {found['launches_alone_ms_p99']:.1f})",
            flush=True,
        )
    return rows


def images_per_second(kind: str, config: Config, args: argparse.Namespace) -> float:
    """One round of one pipeline, from its start to its end."""
    import ray

    options = {"num_cpus": 1, "num_gpus": 1 / args.workers if args.device == "cuda" else 0}
    actor = ray.remote(**options)(Consumer)  # type: ignore[call-overload]
    consumers = [actor.remote(kind, to_dict(config), r, args.workers, args.device) for r in range(args.workers)]
    try:
        ray.get([c.take.remote(args.warmup) for c in consumers])
        began = time.perf_counter()
        images = sum(ray.get([c.take.remote(args.steps) for c in consumers]))
        return images / (time.perf_counter() - began)
    finally:
        for consumer in consumers:
            ray.kill(consumer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/emoji.yaml")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="consumers")
    parser.add_argument("--images", choices=["set", "jpeg"], default="set", help="the config's set, or made photographs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="steps under the clock in a round")
    parser.add_argument("--warmup", type=int, default=20, help="steps before the clock starts")
    parser.add_argument("--first-batch", type=int, nargs="+", metavar="STEPS", help="measure the start of such trainings")
    parser.add_argument("--pause-ms", type=float, default=100, help="between two batches, of --first-batch")
    parser.add_argument("--out", help="JSON file")
    args, passed = parser.parse_known_args()
    config = settled(load_config(["--config", args.config, *passed]))
    config.train.workers = args.workers
    config.train.max_steps = args.warmup + args.steps + 1000  # a stream does not end under the clock
    with tempfile.TemporaryDirectory(prefix="mmref-benchmark-") as folder:
        if args.images == "jpeg":
            build_shards(JpegSource(), folder, BuildOptions(tokenizer_vocab=200, overwrite=True, progress=False))
            config.data.root = folder
        config.data.root = ShardSet.open(config.data.root).root
        if args.first_batch:
            with connect(2 + config.data.readers, config.train.storage_gb):
                write(args.out, {"rows": openings(config, args)})
            return
        found: dict[str, list[float]] = {"mmref": [], "webdataset": []}
        with connect(args.workers * (1 + config.data.readers), config.train.storage_gb):
            for _ in range(args.rounds):
                for kind, rates in found.items():
                    rates.append(images_per_second(kind, config, args))
                    print(f"{kind:<12}{rates[-1]:>10.0f} images/s", flush=True)
    result = {
        "device": args.device, "workers": args.workers, "readers": config.data.readers, "images": args.images,
        "image_height": config.data.image_height, "image_width": config.data.image_width,
        "global_batch": config.train.global_batch, "steps_per_task": config.data.steps_per_task,
        "images_per_second": float(np.median(found["mmref"])),
        "webdataset_images_per_second": float(np.median(found["webdataset"])),
        "ratio": float(np.median(np.array(found["mmref"]) / np.array(found["webdataset"]))),
        "rounds": found,
    }  # fmt: skip
    print(f"ratio {result['ratio']:.2f}")
    write(args.out, result)


def write(path: str | None, result: dict[str, Any]) -> None:
    """The JSON file, where one is asked for."""
    if path:
        with open(path, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
