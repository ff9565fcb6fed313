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
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from mmref.cluster.connection import connect
from mmref.data.decode import calm_opencv
from mmref.data.manifest import VERSION
from mmref.errors import ConfigError, ShardSetError, SourceError
from mmref.shards.samples import Source, SourceObject, count_warnings, hash_fraction
from mmref.shards.tar_writer import ImageOptions, ShardResult, write_shard
from mmref.shards.tokenizer import check_vocab, train_captions, train_tokenizer
from mmref.storage.whole_folder import strangers, whole_folder, write_whole

SOURCES = {  # name on the command line -> what makes the source
    "emoji": "mmref.shards.sources.emoji:EmojiSource",
    "cub": "mmref.shards.sources.cub:CubSource",
    "flowers": "mmref.shards.sources.flowers:FlowersSource",
    "cuhk": "mmref.shards.sources.persons:cuhk_pedes",
    "icfg": "mmref.shards.sources.persons:icfg_pedes",
    "rstp": "mmref.shards.sources.persons:rstpreid",
    "ufine": "mmref.shards.sources.persons:ufine6926",
    "table": "mmref.shards.sources.table:TableSource",
}
SPLIT_ORDER = ("train", "val", "test")
NAMED_SKIPS = 100  # of what was left out, the manifest names this many
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
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
    """Builds the set in folder `out` and returns its manifest. The folder appears, or is replaced, when the set is complete.

    Files in it that no build made stay where they are.

    Raises ShardSetError when `out` holds a complete set (unless overwrite) or other files, is being written by another process or
    cannot be written, SourceError for bad input, ConfigError for options that cannot work, StorageError when the disk is full.
    """
    _check_options(options)
    extras: set[str] = set()

    def replaced(root: Path) -> set[str]:
        return _files_of_set(root, options.overwrite, source.name, extras)

    with whole_folder(out, ShardSetError, "manifest.json", replaced) as work:
        splits = _collect(source)
        _check_usable(source, splits, options.tokenizer_vocab)
        manifest = _write_shards(source, splits, str(work), options)
        if options.tokenizer_vocab:
            train_tokenizer(train_captions(str(work), manifest), str(work / "tokenizer"), options.tokenizer_vocab)
        written = _names(work)
        source.write_extras(str(work))
        extras |= _names(work) - written
        write_whole(work / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def _write_shards(source: Source, splits: dict[str, list[SourceObject]], out: str, options: BuildOptions) -> dict[str, Any]:
    """Writes tars, indexes and objects.parquet, and returns the manifest."""
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
    for left in Path(out).rglob("*.tmp"):  # by a worker that was killed, and whose task Ray ran again
        left.unlink()
    return _finish(source, out, results)


def _names(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def _check_options(options: BuildOptions) -> None:
    """Raises ConfigError."""
    images = options.images
    for name, value in (
        ("--target-mb", options.target_mb),
        ("--samples-per-shard", options.samples_per_shard),
        ("--resize-to-px", images.resize_to_px),
        ("--tokenizer-vocab", options.tokenizer_vocab),
    ):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be above 0, found {value}.")


def _files_of_set(root: Path, overwrite: bool, source: str, extras: set[str]) -> set[str]:
    """What a build wrote into a folder; `extras` are those of a source. Raises ShardSetError where the set is to stay, or the
    folder holds no set."""
    path = root / "manifest.json"
    if not path.exists():
        if found := strangers(root):
            raise ShardSetError(
                f"{root} holds files and no complete shard set ({', '.join(found[:3])}{', ...' if found[3:] else ''}): give "
                "an empty or a new folder with --out, or remove what a build left there that was killed."
            )
        return set()
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
        names = {shard[kind] for shard in shards for kind in ("file", "packed") if kind in shard}
        names |= {f"{split}/{split}.index.parquet" for split in manifest["splits"]}
        names |= {*_extras_of(manifest["name"]), *(extras if manifest["name"] == source else ())}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ShardSetError(
            f"{path} is damaged or of something else than a shard set: choose another folder with --out, or remove this one."
        ) from None
    if not overwrite:
        raise ShardSetError(f"{root} already holds a complete shard set. Choose another folder, or pass --overwrite.")
    return names | {"manifest.json", "objects.parquet", *(f"tokenizer/{name}" for name in TOKENIZER_FILES)}


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
        left_out = f" The first that were left out: {source.skipped[:3]}" if source.skipped else ""
        raise SourceError(f"Source {source.name!r} has no objects with images. Check its path and options.{left_out}")
    known = [split for split in SPLIT_ORDER if split in splits]
    order = known + sorted(set(splits) - set(known))
    return {split: sorted(splits[split], key=lambda o: (hash_fraction(o.object_id), o.object_id)) for split in order}


def _extras_of(name: str) -> Iterable[str]:
    """What another source writes beside its shards."""
    if name not in SOURCES:
        return ()
    module, make = SOURCES[name].split(":")
    return getattr(getattr(importlib.import_module(module), make), "extras", ())


def _check_usable(source: Source, splits: dict[str, list[SourceObject]], vocab: int | None) -> None:
    """Raises SourceError for what is known before anything is written: a split without captions, none for the tokenizer."""
    for split, objects in splits.items():
        told = [sum(any(c.strip() for c in image.captions) for image in item.images) for item in objects]
        if max(told) < source.min_images:
            raise SourceError(
                f"No usable sample in split {split!r}: none of its {len(objects)} objects has {source.min_images} or more "
                "images with a caption."
            )
    if not vocab:
        return
    if "train" not in splits:
        raise SourceError(
            f"--tokenizer-vocab trains on the captions of train, and source {source.name!r} has no such split, only "
            f"{', '.join(splits)}: leave it out, or put objects into train."
        )
    check_vocab((c for item in splits["train"] for image in item.images for c in image.captions), vocab)


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


def _write_shard(*job: Any) -> ShardResult:
    calm_opencv()
    return write_shard(*job)


def _run_ray(jobs: list[tuple], workers: int, tick: Callable[[], Any]) -> Iterable[ShardResult]:
    """At most `workers` tasks at a time, on the cluster that is there or on a local one that is stopped afterwards."""
    import ray

    with connect(storage_gb=0.13):
        task = ray.remote(max_retries=2)(_write_shard)
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
        table = pa.Table.from_pylist(rows, INDEX_SCHEMA)
        pq.write_table(table, os.path.join(out, split, f"{split}.index.parquet"), compression="zstd")
        if split == "train":
            table = pa.table({"object_id": list(object_rows), "row": pa.array(range(len(object_rows)), pa.int32())})
            pq.write_table(table, os.path.join(out, "objects.parquet"), compression="zstd")
        manifest["splits"][split] = {
            "objects": len(object_rows),
            "images": len(rows),
            "captions": sum(row["n_captions"] for row in rows),
            "shards": [shard.entry for shard in shards],
        }
    manifest["warnings"] = [*getattr(source, "warnings", []), *count_warnings(source, manifest["splits"])]
    manifest["skipped"] = {"count": len(skipped), "first": skipped[:NAMED_SKIPS]}
    return manifest
