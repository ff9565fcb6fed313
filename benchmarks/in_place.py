"""Images per second of `mmref shards index` against webdataset reading the same tars once, whether a training on the tars is
that on a built set, and how a set of 100 million opens.

    python benchmarks/in_place.py index --tars 1000 --images 1000 --workers 2 --rounds 2 --folder /tmp/tars --out in_place.json
    python benchmarks/in_place.py train --tars 1000 --images 1000 --folder /tmp/tars --out train.json
    python benchmarks/in_place.py open --images 100000000 --readers 4 --folder /tmp/large --out open.json

`index` has webdataset's own writer make tars of tiny images in img2dataset's layout, once for all rounds. In each round mmref
indexes them, and webdataset with torch's DataLoader reads every sample of them as it lies, with as many processes. Neither
decodes. Both are started anew, and their start counts. `--workers 0` has both work in one process, and gives the time of its
CPU too, which other programs on the machine hardly change.

`train` indexes the same tars, and builds a set of a Parquet file with the same samples. A tiny model is trained on the built set
on two workers, 20 steps without a stop; and on the tars on two workers, stopped in its first steps, and resumed on one.
The losses are compared step by step.

`open` makes an index that claims so many images: of 10,000 tars, which are links to one real tar. Readers of one node then open
it at the same moment, plan a step far into the training and read its batch: at first without the node's copy of the index, then
with it, as at every later start.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mmref.shards.in_place import InPlaceOptions, index_tars
from mmref.shards.index_parts import INDEX_SCHEMA, OBJECTS_SCHEMA

SIDE, KINDS = 16, 500  # pixels of an image, different ones
IMAGES_A_SKU = 3  # which do not lie side by side
STEPS, CHECKPOINT_EVERY = 20, 5
TARS_OF_LARGE_SET, IMAGES_AN_OBJECT = 10_000, 10
STEP = 123_456


@functools.cache
def _encoded(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return bytes(cv2.imencode(".jpg", pixels)[1])


def write_tars(folder: Path, tars: int, images: int) -> None:
    """Tars as img2dataset writes them, where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [(folder / f"{tar:05d}.tar", tar, images) for tar in range(tars) if not (folder / f"{tar:05d}.tar").exists()]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(_write_tar, missing)


def _write_tar(path: Path, tar: int, images: int) -> None:
    import webdataset

    with webdataset.TarWriter(f"{path}.part") as writer:
        for key, data, told in _samples(tar, images):
            writer.write({"__key__": key, "jpg": data, "txt": told["caption"], "json": told})
    os.replace(f"{path}.part", path)


def _samples(tar: int, images: int) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Key, image and json of the samples of a tar."""
    for i in range(images):
        key, number = f"{tar:05d}{i:04d}", tar * images + i
        told = {"url": f"https://example.org/{key}.jpg", "key": key, "status": "success", "error_message": None}
        told |= {"caption": f"picture {i} of tar {tar}, of {SIDE} pixels", "width": SIDE, "height": SIDE, "exif": "{}"}
        yield (
            key,
            _encoded(number % KINDS),
            {**told, "sha256": "0" * 64, "sku": f"sku {number // 2 // IMAGES_A_SKU}.{number % 2}"},
        )


def read_by_webdataset(folder: Path, workers: int) -> int:
    """Samples that webdataset yields, its members as bytes."""
    import torch
    import webdataset

    shards = sorted(map(str, folder.glob("*.tar")))
    dataset = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None).map(_sizes)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=64 if workers else None)
    return sum(1 for _ in loader)


def _sizes(sample: dict[str, Any]) -> int:
    """What a sample holds, so that no image travels between processes."""
    return sum(len(value) for value in sample.values() if isinstance(value, bytes))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Both over the rounds in turn."""
    folder, total = Path(args.folder), args.tars * args.images
    write_tars(folder, args.tars, args.images)
    rates: dict[str, list[float]] = {"mmref": [], "webdataset": []}
    cpu: dict[str, list[float]] = {"mmref": [], "webdataset": []}  # microseconds an image, of this process
    for number in range(args.rounds):
        for name in ("mmref", "webdataset") if number % 2 == 0 else ("webdataset", "mmref"):
            began, computed = time.perf_counter(), time.process_time()
            if name == "mmref":
                options = InPlaceOptions(workers=args.workers, overwrite=True, progress=False)
                entries = index_tars([str(folder)], args.folder + ".set", options)["splits"].values()
                found = sum(entry["images"] for entry in entries)
            else:
                found = read_by_webdataset(folder, args.workers)
            rates[name].append(total / (time.perf_counter() - began))
            cpu[name].append(1e6 * (time.process_time() - computed) / total)
            assert found == total, (name, found)
            print(f"round {number}: {name} {rates[name][-1]:,.0f} images/s, {cpu[name][-1]:.0f} us of CPU", flush=True)
    best = {name: max(values) for name, values in rates.items()}
    found = {"images": total, "workers": args.workers, "images_per_second": rates, "ratio": best["mmref"] / best["webdataset"]}
    return found if args.workers else {**found, "cpu_us": cpu, "cpu_ratio": min(cpu["webdataset"]) / min(cpu["mmref"])}


def measure_training(args: argparse.Namespace) -> dict[str, Any]:
    """The largest difference of the losses of the two trainings, relative, and seconds of what led to it."""
    folder, work = Path(args.folder), Path(args.folder + ".train")
    write_tars(folder, args.tars, args.images)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    seconds: dict[str, float] = {}

    def timed(name: str, *argv: str) -> None:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mmref.cli", *argv], check=True)
        seconds[name] = round(time.perf_counter() - began, 1)
        print(f"{name}: {seconds[name]} s", flush=True)

    write_parquet(work / "samples.parquet", args.tars, args.images)
    made = ["--tokenizer-vocab", "200", "--workers", str(args.workers), "--fractions", "train=1"]
    timed("index", "shards", "index", str(folder), "--object-id", "sku", "--out", str(work / "in_place"), *made)
    columns = ["--object-id", "sku", "--captions", "caption"]
    timed("build", "shards", "build", "table", str(work / "samples.parquet"), "--out", str(work / "built"), *columns, *made)

    def training(name: str, workers: int) -> list[str]:
        options = ["--data.root", str(work / name), "--run_dir", str(work / f"run-{name}"), "--train.workers", str(workers)]
        return ["train", "--config", "configs/smoke.yaml", "--train.eval_every", str(CHECKPOINT_EVERY), *options]

    timed("train, built", *training("built", 2))
    _train_a_little(training("in_place", 2), work / "run-in_place")
    timed("train, in place, resumed", *training("in_place", 1))
    expected, resumed = (_losses(work / f"run-{name}") for name in ("built", "in_place"))
    began_at = [record["step"] for record in _records(work / "run-in_place") if "started" in record]
    assert len(began_at) == 2 and 0 < began_at[1] < STEPS, began_at
    assert list(expected) == list(resumed) == list(range(1, STEPS + 1)), (expected, resumed)
    difference = max(abs(resumed[step] / expected[step] - 1) for step in expected)
    found = {"images": args.tars * args.images, "steps": STEPS, "resumed_at": began_at[1], "largest_difference": difference}
    return {**found, "seconds": seconds}


def write_parquet(path: Path, tars: int, images: int) -> None:
    """The samples of the tars, with their images inside, a row group a tar."""
    schema = pa.schema({"id": pa.string(), "image": pa.binary(), "sku": pa.string(), "caption": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for tar in range(tars):
            rows = [(key, data, told["sku"], told["caption"]) for key, data, told in _samples(tar, images)]
            writer.write_table(pa.table(list(map(list, zip(*rows))), schema))


def _train_a_little(argv: list[str], run: Path) -> None:
    """Ask a training to stop in its first steps."""
    process = subprocess.Popen([sys.executable, "-m", "mmref.cli", *argv])
    while not _records(run):
        time.sleep(0.1)
        assert process.poll() is None, "the training ended without a step"
    process.terminate()
    process.wait()


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in _records(run) if "loss" in record}


def write_large_set(folder: Path, images: int) -> None:
    """A set that claims so many images; its tars are links to one."""
    from mmref.storage.locations import sha256_of
    from mmref.storage.tars import Tar

    per_tar = images // TARS_OF_LARGE_SET
    source = folder / "source"
    write_built_tar(source / "00000.tar", per_tar)
    with Tar(str(source / "00000.tar")) as tar:
        found = [(m.offset, m.size) for m in tar.members()]
    image, text = (np.array(found[begin::2]) for begin in (0, 1))
    root = folder / "set"
    (root / "train").mkdir(parents=True)
    files = [f"train/train-{number:06d}.tar" for number in range(TARS_OF_LARGE_SET)]
    for file in files:
        os.link(source / "00000.tar", root / file)
    with (
        pq.ParquetWriter(root / "train/train.index.parquet", INDEX_SCHEMA, compression="zstd") as index,
        pq.ParquetWriter(root / "objects.parquet", OBJECTS_SCHEMA, compression="zstd") as objects,
    ):
        step = per_tar * 100
        for first in range(0, images, step):
            number = np.arange(first, first + step)
            within, row = number % per_tar, (number // IMAGES_AN_OBJECT).astype(np.int32)
            ids, names = _names(number // IMAGES_AN_OBJECT), _names(number)
            columns = {
                "object_row": row, "object_id": ids, "image_id": names, "key": names, "image_ext": ["jpg"] * step,
                "shard": (number // per_tar).astype(np.int32), "image_offset": image[within, 0], "image_size": image[within, 1],
                "json_offset": text[within, 0], "json_size": text[within, 1], "n_captions": np.ones(step, np.int32),
            }  # fmt: skip
            index.write_table(pa.table([columns[name] for name in INDEX_SCHEMA.names], INDEX_SCHEMA))
            mask = pa.array(number % IMAGES_AN_OBJECT == 0)
            objects.write_table(pa.table([ids.filter(mask), row[number % IMAGES_AN_OBJECT == 0]], OBJECTS_SCHEMA))
    size, digest = os.path.getsize(source / "00000.tar"), sha256_of(str(source / "00000.tar"))
    shards = [{"file": file, "samples": per_tar, "bytes": size, "sha256": digest} for file in files]
    entry = {"objects": images // IMAGES_AN_OBJECT, "images": images, "captions": images, "shards": shards}
    manifest = {"version": 1, "name": "large", "licence": "CC0-1.0", "source": "links", "splits": {"train": entry}}
    (root / "manifest.json").write_text(json.dumps(manifest))


def write_built_tar(path: Path, images: int) -> None:
    """A tar as a built set has it: an image and its json, one after the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = json.dumps({"object_id": "0", "image_id": "0", "captions": ["a picture"]}).encode()
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for number in range(images):
            for ending, data in (("jpg", _encoded(number % KINDS)), ("json", meta)):
                member = tarfile.TarInfo(f"{number:09d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _names(numbers: np.ndarray) -> pa.Array:
    """Ids of 24 characters: those of 100 million images are longer than the two gigabytes that offsets of 32 bits reach."""
    return pc.utf8_lpad(pa.array(numbers).cast(pa.large_string()), 24, "0")


def open_large_set(root: str, barrier: Any, results: Any) -> None:
    """What a reader does before its first batch."""
    from mmref.data.plan import Plan
    from mmref.data.sample_reader import SampleReader
    from mmref.data.shard_set import ShardSet

    before = _memory_mb()
    barrier.wait()
    began = time.perf_counter()
    index = ShardSet.open(root).index("train")
    opened = time.perf_counter()
    step = Plan(index.object_start, 128, 2, 0)(STEP)
    planned = time.perf_counter()
    reader = SampleReader(index)
    raw = [reader.read(i) for i in step.images.tolist()]
    ids = {index.object_ids[row] for row in step.objects.tolist()}
    done = time.perf_counter()
    assert len(raw) == 256 and len(ids) == 128
    results.put({"open_s": opened - began, "plan_s": planned - opened, "batch_s": done - planned, "mb": _memory_mb() - before})


def _memory_mb() -> float:
    """Memory of this process alone: what is mapped from files does not count."""
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) / 1024


def measure_opening(args: argparse.Namespace) -> dict[str, Any]:
    """Readers that start together, twice."""
    folder = Path(args.folder)
    os.environ["MMREF_CACHE"] = str(folder / "cache")
    if not (folder / "set" / "manifest.json").exists():
        shutil.rmtree(folder / "set", ignore_errors=True)
        write_large_set(folder, args.images)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"images": args.images, "readers": args.readers}
    for name in ("first start on the node", "later starts"):
        barrier, results = context.Barrier(args.readers), context.Queue()
        given = str(folder / "set"), barrier, results
        processes = [context.Process(target=open_large_set, args=given) for _ in range(args.readers)]
        for process in processes:
            process.start()
        rows = [results.get() for _ in processes]
        for process in processes:
            process.join()
        found[name] = {key: [round(row[key], 3) for row in rows] for key in rows[0]}
        print(name, found[name], flush=True)
    used = subprocess.run(["du", "-sm", str(folder / "cache")], capture_output=True, text=True, check=True).stdout
    parquet = os.path.getsize(folder / "set/train/train.index.parquet") / 1e6
    return {**found, "node_copy_mb": int(used.split()[0]), "index_mb": round(parquet)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("index", "train", "open"))
    parser.add_argument("--tars", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1000, help="of a tar (index, train), of the set (open)")
    parser.add_argument("--workers", type=int, default=2, help="processes of either side")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--folder", required=True, help="where tars are made, and kept")
    parser.add_argument("--out", required=True, help="JSON")
    args = parser.parse_args()
    found = {"index": compare, "train": measure_training, "open": measure_opening}[args.what](args)
    Path(args.out).write_text(json.dumps({"argv": sys.argv[1:], **found}, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
