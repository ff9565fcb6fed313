"""Builds a shard set from a source, in parallel: one task writes one tar; the manifest, written last, completes it.

Objects lie in the order of a hash of their id: every shard is a fair sample of the split, whatever the source's order.
The same source gives the same tars, byte for byte, for any number of workers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_shards.samples import Source, SourceObject, count_warnings, hash_fraction
from data_shards.tar_writer import ImageOptions, ShardResult, write_shard
from mmref.cluster import connect
from mmref.data.shards import VERSION
from mmref.errors import ShardSetError, SourceError

SOURCES = {  # name on the command line -> what makes the source
    "emoji": "data_shards.sources.emoji:EmojiSource",
    "cub": "data_shards.sources.cub:CubSource",
    "flowers": "data_shards.sources.flowers:FlowersSource",
    "cuhk": "data_shards.sources.persons:cuhk_pedes",
    "icfg": "data_shards.sources.persons:icfg_pedes",
    "rstp": "data_shards.sources.persons:rstpreid",
    "ufine": "data_shards.sources.persons:ufine6926",
    "table": "data_shards.sources.table:TableSource",
}
SPLIT_ORDER = ("train", "val", "test")
NAMED_SKIPS = 100  # of what was left out, the manifest names this many
SIZE_PROBES = 32  # images read to estimate the mean size
HEADER_BYTES = 2048  # headers, padding and json of a sample, for the estimate
INDEX_SCHEMA = pa.schema([
    ("object_row", pa.int32()), ("object_id", pa.string()), ("image_id", pa.string()), ("key", pa.string()),
    ("shard", pa.int32()), ("image_offset", pa.int64()), ("image_size", pa.int64()), ("image_ext", pa.string()),
    ("json_offset", pa.int64()), ("json_size", pa.int64()), ("n_captions", pa.int32()),
])  # fmt: skip


@dataclass(frozen=True)
class BuildOptions:
    """How a set is cut into shards and written."""

    target_mb: float = 128  # size of a shard, MB
    min_shards: int = 4  # shards of a split even when it is small, so that several workers have work
    samples_per_shard: int | None = None  # fixed number of images instead of target_mb
    workers: int = 0  # parallel Ray tasks; 0 writes in this process
    overwrite: bool = False  # replace a complete set
    pack: bool = False  # write .tar.gz beside each tar, for sets that travel
    tokenizer_vocab: int | None = None  # train a WordPiece tokenizer of this size on the train captions
    images: ImageOptions = field(default_factory=ImageOptions)
    progress: bool = True  # show a progress bar when standard error is a terminal


def make_source(name: str, **options: Any) -> Source:
    """Source by its name on the command line. Raises SourceError for an unknown name."""
    if name not in SOURCES:
        raise SourceError(f"There is no source {name!r}. Sources: {', '.join(SOURCES)}. Your own data: `table`.")
    module, make = SOURCES[name].split(":")
    return getattr(importlib.import_module(module), make)(**options)


def build_shards(source: Source, out: str, options: BuildOptions = BuildOptions()) -> dict[str, Any]:
    """Builds the set in folder `out` and returns its manifest.

    Raises ShardSetError when `out` holds a complete set (unless overwrite) or cannot be written, SourceError for bad
    input.
    """
    out = os.path.abspath(out)  # workers may run in another directory
    _prepare_folder(out, options.overwrite)
    splits = _collect(source)
    plan = {split: _cut(source, objects, options) for split, objects in splits.items()}
    tasks = [
        (split, f"{split}/{split}-{number:06d}.tar", objects)
        for split, shards in plan.items()
        for number, objects in enumerate(shards)
    ]
    for split in plan:
        os.makedirs(os.path.join(out, split), exist_ok=True)
    results: dict[str, list[ShardResult]] = {split: [] for split in plan}
    jobs = [(source, objects, out, file, options.images, options.pack) for _, file, objects in tasks]
    for (split, _, _), result in zip(tasks, _run(jobs, options), strict=True):
        results[split].append(result)
    manifest = _finish(source, out, results)
    if options.tokenizer_vocab:
        from data_shards.tokenizer import train_captions, train_tokenizer

        train_tokenizer(train_captions(out, manifest), os.path.join(out, "tokenizer"), options.tokenizer_vocab)
    source.write_extras(out)
    _write_json(manifest, os.path.join(out, "manifest.json"))
    return manifest


def _prepare_folder(out: str, overwrite: bool) -> None:
    """Makes the folder and takes away an old manifest first: a set that is being replaced is not complete."""
    manifest = os.path.join(out, "manifest.json")
    if os.path.exists(manifest) and not overwrite:
        raise ShardSetError(f"{out} already holds a complete shard set. Choose another folder, or pass --overwrite.")
    try:
        os.makedirs(out, exist_ok=True)
        if os.path.exists(manifest):
            for entry in (s for split in _read_json(manifest).get("splits", {}).values() for s in split["shards"]):
                for name in (entry["file"], entry.get("packed", entry["file"])):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(out, name))
            os.unlink(manifest)
    except OSError as error:
        raise ShardSetError(f"Cannot write to {out}: {error}. Choose another folder with --out.") from error


def _read_json(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _write_json(data: dict[str, Any], path: str) -> None:
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())  # the rename must not reach the disk before the content
    os.replace(f"{path}.tmp", path)


def _collect(source: Source) -> dict[str, list[SourceObject]]:
    """Objects by split in hash order. Raises SourceError for ids that appear twice, or when there is nothing."""
    splits: dict[str, list[SourceObject]] = {}
    object_splits: dict[str, str] = {}
    image_objects: dict[str, str] = {}
    for item in source.objects():
        if item.object_id in object_splits:
            raise SourceError(
                f"Object {item.object_id!r} appears twice (splits {object_splits[item.object_id]} and {item.split}). "
                "All images of an object belong together, in one split."
            )
        object_splits[item.object_id] = item.split
        for image in item.images:
            if image.image_id in image_objects:
                raise SourceError(
                    f"Image id {image.image_id!r} appears twice (objects {image_objects[image.image_id]!r} and "
                    f"{item.object_id!r}). Give every image an id of its own."
                )
            image_objects[image.image_id] = item.object_id
        if item.images:
            splits.setdefault(item.split, []).append(item)
    if not splits:
        raise SourceError(f"Source {source.name!r} has no objects with images. Check its path and options.")
    known = [split for split in SPLIT_ORDER if split in splits]
    order = known + sorted(set(splits) - set(known))
    return {split: sorted(splits[split], key=lambda o: (hash_fraction(o.object_id), o.object_id)) for split in order}


def _cut(source: Source, objects: list[SourceObject], options: BuildOptions) -> list[list[SourceObject]]:
    """Consecutive objects in shards of nearly the same number of images."""
    images = sum(len(item.images) for item in objects)
    if options.samples_per_shard:
        wanted = math.ceil(images / options.samples_per_shard)
    else:
        wanted = math.ceil(images * _mean_bytes(source, objects, images) / (options.target_mb * 1e6))
    count = min(max(wanted, options.min_shards, 1), len(objects))
    shards: list[list[SourceObject]] = [[] for _ in range(count)]
    done = 0
    for position, item in enumerate(objects):
        # By images, but at least one object for each shard that is still to come.
        number = max(min(done * count // images, count - 1), count - (len(objects) - position), 0)
        shards[number].append(item)
        done += len(item.images)
    return [shard for shard in shards if shard]


def _mean_bytes(source: Source, objects: list[SourceObject], images: int) -> float:
    """Bytes of a sample, estimated from a few images evenly spread."""
    step = max(1, images // SIZE_PROBES)
    sizes = []
    for image in islice((i for item in objects for i in item.images), 0, None, step):
        with contextlib.suppress(Exception):  # unusable images are listed when their shard is written
            sizes.append(len(source.load(image.ref)))
    return HEADER_BYTES + sum(sizes) / max(len(sizes), 1)


def _run(jobs: list[tuple], options: BuildOptions) -> Iterator[ShardResult]:
    """Results in the order of the jobs, with a bar that moves as shards finish."""
    bar = tqdm(total=len(jobs), unit="shard", disable=None if options.progress else True, file=sys.stderr)
    with bar:
        if options.workers <= 0:
            for job in jobs:
                yield write_shard(*job)
                bar.update()
            return
        yield from _run_ray(jobs, options.workers, bar.update)


def _run_ray(jobs: list[tuple], workers: int, tick: Callable[[], Any]) -> Iterable[ShardResult]:
    """At most `workers` tasks at a time, on the cluster that is there or on a local one that is stopped afterwards."""
    import ray

    with connect(storage_gb=0.13):
        task = ray.remote(max_retries=2)(write_shard)
        source = ray.put(jobs[0][0])
        waiting = list(enumerate(jobs))[::-1]
        running: dict[Any, int] = {}
        results: dict[int, ShardResult] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                number, job = waiting.pop()
                running[task.remote(source, *job[1:])] = number
            for done in ray.wait(list(running), num_returns=1)[0]:
                try:
                    results[running.pop(done)] = ray.get(done)
                except ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from error
                tick()
        return [results[number] for number in range(len(jobs))]


def _finish(source: Source, out: str, results: dict[str, list[ShardResult]]) -> dict[str, Any]:
    """Writes indexes and objects.parquet, returns the manifest. Object rows are given here: now all skips are known."""
    manifest: dict[str, Any] = {
        "version": VERSION, "name": source.name, "licence": source.licence, "source": source.origin, "splits": {},
    }  # fmt: skip
    skipped = [*source.skipped, *(line for shards in results.values() for shard in shards for line in shard.skipped)]
    for split, shards in results.items():
        rows: list[dict[str, Any]] = []
        object_rows: dict[str, int] = {}
        for number, shard in enumerate(shards):
            for row in shard.rows:
                object_row = object_rows.setdefault(row["object_id"], len(object_rows))
                rows.append({**row, "shard": number, "object_row": object_row})
        if not rows:
            raise SourceError(f"No usable sample in split {split!r}. The first that were left out: {skipped[:3]}")
        _write_table(pa.Table.from_pylist(rows, INDEX_SCHEMA), os.path.join(out, split, f"{split}.index.parquet"))
        if split == "train":
            table = pa.table({"object_id": list(object_rows), "row": pa.array(range(len(object_rows)), pa.int32())})
            _write_table(table, os.path.join(out, "objects.parquet"))
        manifest["splits"][split] = {
            "objects": len(object_rows),
            "images": len(rows),
            "captions": sum(row["n_captions"] for row in rows),
            "shards": [shard.entry for shard in shards],
        }
    manifest["warnings"] = [*getattr(source, "warnings", []), *count_warnings(source, manifest["splits"])]
    manifest["skipped"] = {"count": len(skipped), "first": skipped[:NAMED_SKIPS]}
    return manifest


def _write_table(table: pa.Table, path: str) -> None:
    pq.write_table(table, f"{path}.tmp", compression="zstd")
    os.replace(f"{path}.tmp", path)
