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
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, cast

from mmref.data.manifest import VERSION
from mmref.errors import ConfigError, ShardSetError, SourceError
from mmref.shards.index_parts import IndexWriter, Written, write_part
from mmref.shards.left_out import LEFT_OUT, LeftOut
from mmref.shards.rows import RowSource, source_rows
from mmref.shards.samples import Source, count_warnings, split_warnings
from mmref.shards.spool import Span, Spool, read_objects
from mmref.shards.tar_writer import ImageOptions, loaded, write_shard
from mmref.shards.tasks import run_jobs
from mmref.shards.tokenizer import check_vocab, train_captions, train_tokenizer
from mmref.storage.downloads import forget
from mmref.storage.parquet import read_parquet
from mmref.storage.whole_folder import strangers, whole_folder, write_whole

SOURCES = {  # name on the command line -> what makes the source
    "emoji": "mmref.shards.sources.emoji:EmojiSource",
    "icons": "mmref.shards.sources.icons:IconSource",
    "cub": "mmref.shards.sources.cub:CubSource",
    "flowers": "mmref.shards.sources.flowers:FlowersSource",
    "cuhk": "mmref.shards.sources.persons:cuhk_pedes",
    "icfg": "mmref.shards.sources.persons:icfg_pedes",
    "rstp": "mmref.shards.sources.persons:rstpreid",
    "ufine": "mmref.shards.sources.persons:ufine6926",
    "table": "mmref.shards.sources.parquet_images:table_source",
    "dataset": "mmref.shards.sources.hub_dataset:DatasetSource",
    "folder": "mmref.shards.sources.folders:FolderSource",
}
SPLIT_ORDER = ("train", "val", "test")
NAMED = 3  # of what was left out, in an error
SPOOL = ".spool"  # folder in the new set that is gone when it is complete
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
SIZE_PROBES = 32  # images read to estimate the mean size
HEADER_BYTES = 2048  # headers, padding and json of a sample, for the estimate


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


@dataclass(frozen=True)
class Job:
    """A shard to be written."""

    spans: list[Span]  # of the spool: its objects
    root: str  # of the set
    file: str  # below it
    images: ImageOptions
    pack: bool
    part: str  # where what goes into the index is left, see `write_part`


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
        return files_of_set(root, options.overwrite, source.name, extras)

    with whole_folder(out, ShardSetError, "manifest.json", replaced) as work:
        if hasattr(source, "scratch"):
            source.scratch = str(work / SPOOL / "source")
        with contextlib.closing(LeftOut(work / LEFT_OUT)) as left_out:
            spool = _collect(source, work / SPOOL, left_out)
            _check_usable(source, spool, options.tokenizer_vocab)
            manifest = _write_shards(_shared(source, out, options.workers), spool, str(work), options, left_out)
        shutil.rmtree(work / SPOOL)
        if options.tokenizer_vocab:
            train_tokenizer(train_captions(str(work), manifest), str(work / "tokenizer"), options.tokenizer_vocab)
        written = _names(work)
        source.write_extras(str(work))
        extras |= _names(work) - written
        write_whole(work / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    forget(_fetched(out))
    return manifest


def _fetched(out: str) -> str:
    """Folder of what was fetched for a set that is not complete yet."""
    return f"{os.path.realpath(out)}.downloads"


def _shared(source: Source, out: str, workers: int) -> Source:
    """The source as a task gets it, see `Source`."""
    share = getattr(source, "share", None)
    shared: Source = share(workers, _fetched(out)) if share else source
    return shared


def _write_shards(source: Source, spool: Spool, out: str, options: BuildOptions, left_out: LeftOut) -> dict[str, Any]:
    """Writes tars, indexes and objects.parquet, and returns the manifest."""
    plan = {split: spool.cut(split, _shards(source, spool, split, options)) for split in _in_order(spool.splits)}
    tasks = [
        (split, f"{split}/{split}-{number:06d}.tar", spans)
        for split, shards in plan.items()
        for number, spans in enumerate(shards)
    ]
    for split in plan:
        os.makedirs(os.path.join(out, split), exist_ok=True)
    written: dict[str, list[Written]] = {split: [] for split in plan}
    jobs = [
        Job(spans, out, file, options.images, options.pack, os.path.join(out, SPOOL, f"index-{number:06d}"))
        for number, (_, file, spans) in enumerate(tasks)
    ]
    made = run_jobs(_make_shard, source, jobs, options.workers, "shard", options.progress)
    for (split, _, _), result in zip(tasks, made, strict=True):
        written[split].append(result)
    for left in Path(out).rglob("*.tmp"):  # by a worker that was killed, and whose task Ray ran again
        left.unlink()
    return _finish(source, out, written, left_out)


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


def files_of_set(root: Path, overwrite: bool, source: str, extras: set[str]) -> set[str]:
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
        names |= {shard["in_place"]["json"] for shard in shards if "in_place" in shard}
        names |= {f"{split}/{split}.index.parquet" for split in manifest["splits"]}
        names |= {*_extras_of(manifest["name"]), *(extras if manifest["name"] == source else ())}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise ShardSetError(
            f"{path} is damaged or of something else than a shard set: choose another folder with --out, or remove this one."
        ) from None
    if not overwrite:
        raise ShardSetError(f"{root} already holds a complete shard set. Choose another folder, or pass --overwrite.")
    return names | {"manifest.json", "objects.parquet", LEFT_OUT, *(f"tokenizer/{name}" for name in TOKENIZER_FILES)}


def _collect(source: Source, folder: Path, left_out: LeftOut) -> Spool:
    """Rows of the source by split in hash order. Raises SourceError for ids that appear twice, or when there is nothing."""
    spool = Spool(folder, merges=hasattr(source, "batches"))
    for table in source_rows(source):
        spool.add(table)
        left_out.take(source.skipped)
    left_out.take(source.skipped)
    if (found := spool.settle()) is not None:
        if spool.merges:
            raise SourceError(cast(RowSource, source).contradiction(found))
        if found.of_image:
            raise SourceError(
                f"Image id {found.name!r} appears twice (objects {found.first!r} and {found.second!r}). Give every image an id "
                "of its own."
            )
        raise SourceError(
            f"Object {found.name!r} appears twice (splits {found.first} and {found.second}). All images of an object belong "
            "together, in one split."
        )
    if not spool.splits:
        why = f" The first that were left out: {left_out.first[:NAMED]}" if left_out.count else ""
        raise SourceError(f"Source {source.name!r} has no objects with images. Check its path and options.{why}")
    return spool


def _in_order(splits: Iterable[str]) -> list[str]:
    known = [split for split in SPLIT_ORDER if split in splits]
    return known + sorted(set(splits) - set(known))


def _extras_of(name: str) -> Iterable[str]:
    """What another source writes beside its shards."""
    if name not in SOURCES:
        return ()
    module, make = SOURCES[name].split(":")
    return getattr(getattr(importlib.import_module(module), make), "extras", ())


def _check_usable(source: Source, spool: Spool, vocab: int | None) -> None:
    """Raises SourceError for what is known before anything is written: a split without captions, none for the tokenizer."""
    for split in _in_order(spool.splits):
        found = spool.splits[split]
        if found.most_told < source.min_images:
            raise SourceError(
                f"No usable sample in split {split!r}: none of its {found.objects} objects has {source.min_images} or more "
                "images with a caption."
            )
    if not vocab:
        return
    if "train" not in spool.splits:
        raise SourceError(
            f"--tokenizer-vocab trains on the captions of train, and source {source.name!r} has no such split, only "
            f"{', '.join(_in_order(spool.splits))}: leave it out, or put objects into train."
        )
    check_vocab(spool.captions("train"), vocab)


def _shards(source: Source, spool: Spool, split: str, options: BuildOptions) -> int:
    """How many shards a split has."""
    found = spool.splits[split]
    if options.samples_per_shard:
        wanted = math.ceil(found.images / options.samples_per_shard)
    else:
        wanted = math.ceil(found.images * _mean_bytes(source, spool, split) / (options.target_mb * 1e6))
    return min(max(wanted, options.min_shards, 1), found.objects)


def _mean_bytes(source: Source, spool: Spool, split: str) -> float:
    """Bytes of a sample, estimated from a few images evenly spread."""
    step = max(1, spool.splits[split].images // SIZE_PROBES)
    sizes = []
    for _, (load,) in loaded(source, spool.sample(split, step)):
        with contextlib.suppress(Exception):  # unusable images are listed when their shard is written
            sizes.append(len(load()))
    return HEADER_BYTES + sum(sizes) / max(len(sizes), 1)


def _make_shard(source: Source, job: Job) -> Written:
    """Writes a tar, and beside the rows of the set what goes into its index: what returns is small."""
    return write_part(write_shard(source, read_objects(job.spans), job.root, job.file, job.images, job.pack), job.part)


def _first_left_out(shards: Iterable[Written]) -> list[str]:
    """Of what was left out of some shards the first lines."""
    kept = (shard.left_out for shard in shards if os.path.exists(shard.left_out))
    lines = (line for path in kept for line in Path(path).read_text(encoding="utf-8").splitlines())
    return [json.loads(line)["left_out"] for line in islice(lines, NAMED)]


def _finish(source: Source, out: str, written: dict[str, list[Written]], left_out: LeftOut) -> dict[str, Any]:
    """Writes indexes and objects.parquet, returns the manifest. Object rows are given here: now all skips are known."""
    manifest: dict[str, Any] = {
        "version": VERSION, "name": source.name, "licence": source.licence, "source": source.origin, "splits": {},
    }  # fmt: skip
    for shards in written.values():
        for shard in shards:
            left_out.join(shard.left_out)
    for split, shards in written.items():
        if not any(shard.entry["samples"] for shard in shards):
            raise SourceError(
                f"No usable sample in split {split!r}, all of its images were left out. The first: {_first_left_out(shards)}. "
                "Mend these, or put other objects into the split."
            )
        objects = os.path.join(out, "objects.parquet") if split == "train" else None
        with IndexWriter(os.path.join(out, split, f"{split}.index.parquet"), objects) as index:
            for number, shard in enumerate(shards):
                index.add(number, read_parquet(f"{shard.part}.parquet"))
        manifest["splits"][split] = {
            "objects": index.objects,
            "images": sum(shard.entry["samples"] for shard in shards),
            "captions": index.captions,
            "shards": [shard.entry for shard in shards],
        }
    splits = manifest["splits"]
    manifest["warnings"] = [*getattr(source, "warnings", []), *count_warnings(source, splits), *split_warnings(splits)]
    manifest["skipped"] = left_out.summary()
    return manifest
