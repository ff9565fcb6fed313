"""Makes a shard set of WebDataset tars that stay as and where they are: `mmref shards index`.

Each tar is scanned once, by one task. What it says of its samples goes into the set: their json in mmref's form, a line each,
and where their images lie. The rows of all tars are then brought into the order of a hash of the object id, as
`mmref/shards/build.py` orders them: what was indexed and what was built of the same samples trains alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmref.data.manifest import VERSION
from mmref.data.shard_checks import remember
from mmref.errors import SampleError, ShardSetError, SourceError
from mmref.shards.build import SPLIT_ORDER, files_of_set
from mmref.shards.in_place_rows import PART_SCHEMA, write_indexes
from mmref.shards.left_out import LEFT_OUT, LeftOut
from mmref.shards.reading import ReadingOptions, choose_reading
from mmref.shards.samples import hash_fraction, split_warnings
from mmref.shards.tar_places import find_tars, labels
from mmref.shards.tar_samples import Reading, TarSample, interpret, read_tar
from mmref.shards.tasks import run_jobs
from mmref.shards.tokenizer import train_captions, train_tokenizer
from mmref.storage.locations import folder_name, opened, size_of, to_text
from mmref.storage.parquet import read_parquet
from mmref.storage.secrets import said, told
from mmref.storage.tars import Tar
from mmref.storage.whole_folder import whole_folder, write_whole

JSON_FOLDER, PARTS = "samples", ".parts"
SUCCESS = "success"  # of img2dataset's column `status`
TARS_A_TASK = 16  # tars of a thousand small images take less time than a task costs

Joined = Mapping[str, Mapping[str, Any]]  # value of the column that is joined on -> row of the table
Job = tuple[str, str, int, str]  # path or URL of a tar, its label and number, the folder of the set


@dataclass(frozen=True)
class InPlaceOptions:
    """How tars are indexed."""

    reading: ReadingOptions = field(default_factory=ReadingOptions)
    licence: str = "not stated"
    workers: int = 0  # parallel Ray tasks; 0 scans in this process
    overwrite: bool = False  # replace a complete set
    tokenizer_vocab: int | None = None  # train a WordPiece tokenizer of this size on the train captions
    progress: bool = True  # show a progress bar when standard error is a terminal


@dataclass
class SplitPart:
    """What a split takes from a tar."""

    samples: int = 0
    captions: int = 0
    sha256: str = ""


@dataclass
class ScannedTar:
    """What a scan says of a tar; its rows and json lie in files."""

    place: str
    stamp: str
    size: int
    headers: str
    ranges: bool  # whether parts of it can be read
    json_bytes: int = 0
    json_sha256: str = ""
    splits: dict[str, SplitPart] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    several_images: int = 0  # samples with more than the one image that is taken
    images_aside: int = 0  # images that were not taken, of these
    dotted: str = ""  # the name of one of these samples whose images have names with dots
    failed: Counter[str] = field(default_factory=Counter)  # downloads that img2dataset has no image of, by status

    def count_aside(self, sample: TarSample) -> None:
        """Count the images of a sample, be it used or left out, besides the one that is taken."""
        if sample.aside:
            self.several_images, self.images_aside = self.several_images + 1, self.images_aside + sample.aside
            if not sample.plain and not self.dotted and sample.image is not None:
                self.dotted = to_text(f"{sample.key}.{sample.ext}")


def index_tars(given: Sequence[str], out: str, options: InPlaceOptions = InPlaceOptions()) -> dict[str, Any]:
    """Writes the set of some tars into folder `out` and returns its manifest. The folder appears, or is replaced, when the set is
    complete; the tars are only read.

    Args:
        given: paths, URLs, globs, ranges in braces or folders, see `tar_places`.

    Raises ShardSetError as `build_shards`, SourceError for what cannot be indexed or is not understood, StorageError.
    """
    tars = find_tars(given)
    names = labels(tars)
    reading, joined, choices = choose_reading(tars, options.reading)

    def replaced(root: Path) -> set[str]:
        return files_of_set(root, options.overwrite, "", set())

    with whole_folder(out, ShardSetError, "manifest.json", replaced) as work:
        for folder in (JSON_FOLDER, PARTS):
            (work / folder).mkdir()
        jobs = [(tar, name, number, str(work)) for number, (tar, name) in enumerate(zip(tars, names, strict=True))]
        size = max(1, min(TARS_A_TASK, math.ceil(len(jobs) / (4 * max(1, options.workers)))))
        scanned = run_jobs(scan_tar, (reading, joined), jobs, options.workers, "tar", options.progress, size)
        with contextlib.closing(LeftOut(work / LEFT_OUT)) as left_out:
            for number in range(len(tars)):
                left_out.join(str(work / PARTS / _file(number, "left_out")))
        manifest = _manifest(folder_name(str(out)), scanned, names, options, choices, left_out)
        write_indexes(
            work, [work / PARTS / _file(number, "arrow") for number in range(len(tars))], _shard_numbers(scanned), manifest
        )
        shutil.rmtree(work / PARTS)
        for left in work.rglob("*.tmp"):  # by a worker that was killed, and whose task Ray ran again
            left.unlink()
        if options.tokenizer_vocab:
            if "train" not in manifest["splits"]:
                raise SourceError(f"--tokenizer-vocab trains on train, and there is none, only {', '.join(manifest['splits'])}.")
            train_tokenizer(train_captions(str(work), manifest), str(work / "tokenizer"), options.tokenizer_vocab)
        write_whole(work / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    for split, entry in manifest["splits"].items():  # they were all looked at just now
        remember(os.path.abspath(out), split, entry["shards"])
    return manifest


def _file(number: int, ending: str) -> str:
    return f"{number:06d}.{ending}"


# -- one tar ---------------------------------------------------------------------------------------------------------


def scan_tar(shared: tuple[Reading, Joined | None], job: Job) -> ScannedTar:
    """Scans a tar and writes its samples' json and rows into the folder of the set.

    Args:
        shared: how samples are understood, and the table that they are joined with.

    Raises SourceError for a tar that is not there, packed or of archives, StorageError.
    """
    (reading, joined), (place, label, number, work) = shared, job
    try:
        with Tar(place) as tar:
            contents = read_tar(tar, hashed=reading.ids == "duplicate")
            found = ScannedTar(place, tar.stamp, tar.size, tar.headers, tar.ranges)
            broken = tar.broken
    except OSError as error:
        raise SourceError(
            f"{told(place)} cannot be read: {said(error)}. Leave it out, or mend it; then start the same command."
        ) from None
    found.passed_over = contents.passed_over
    skipped = [f"{label}.tar: {line}" for line in contents.skipped]
    if broken:
        skipped.append(f"{label}.tar is broken, {broken}: what lies before is used")
    rows: dict[str, list[Any]] = {name: [] for name in PART_SCHEMA.names}
    digests: dict[str, Any] = {}
    lines = bytearray()
    for sample in contents.samples.values():
        found.count_aside(sample)
        try:
            meta, split = interpret(sample, label, reading, joined)
            line = json.dumps(meta, ensure_ascii=False, separators=(",", ":"), default=str).encode()
        except (SampleError, ValueError) as error:
            skipped.append(f"{to_text(f'{label}/{sample.key}')}: {error}")
            continue
        assert sample.image is not None
        span = sample.image.offset, sample.image.size
        key, ext, count = to_text(sample.key), to_text(sample.ext), len(meta["captions"])
        texts = split, hash_fraction(meta["object_id"]), meta["object_id"], meta["image_id"], key, ext
        for column, value in zip(rows.values(), (*texts, *span, len(lines), len(line), count)):
            column.append(value)
        part = found.splits.setdefault(split, SplitPart())
        part.samples, part.captions = part.samples + 1, part.captions + count
        digests.setdefault(split, hashlib.sha256(found.headers.encode())).update(b"%d %d " % span + line)
        lines += line + b"\n"
    for split, digest in digests.items():
        found.splits[split].sha256 = digest.hexdigest()
    with contextlib.closing(LeftOut(os.path.join(work, PARTS, _file(number, "left_out")))) as left_out:
        left_out.take(skipped)
    found.json_bytes, found.json_sha256 = len(lines), hashlib.sha256(lines).hexdigest()
    found.failed = _failed_downloads(place) if reading.img2dataset else Counter()
    _write_files(work, number, bytes(lines), rows)
    return found


def _write_files(work: str, number: int, lines: bytes, rows: dict[str, list[Any]]) -> None:
    table = pa.table(rows, schema=PART_SCHEMA).sort_by("fraction")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PART_SCHEMA) as writer:
        writer.write_table(table.combine_chunks())
    for folder, ending, data in ((JSON_FOLDER, "jsonl", lines), (PARTS, "arrow", sink.getvalue())):
        path = os.path.join(work, folder, _file(number, ending))
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)


def _failed_downloads(place: str) -> Counter[str]:
    """Downloads that img2dataset counts as failed in its table beside a tar."""
    base, mark, query = place.partition("?")
    beside = base.removesuffix(".tar") + ".parquet" + mark + query
    try:
        if size_of(beside) is None:
            return Counter()
        with opened(beside) as file:
            status = read_parquet(file, ["status"])["status"].to_pylist()
    except (OSError, ValueError, KeyError):  # a table of somebody else: it only tells numbers
        return Counter()
    return Counter(str(each) for each in status if each != SUCCESS)


# -- all tars --------------------------------------------------------------------------------------------------------


def _splits(scanned: Sequence[ScannedTar]) -> list[str]:
    found = {split for tar in scanned for split in tar.splits}
    return [split for split in SPLIT_ORDER if split in found] + sorted(found - set(SPLIT_ORDER))


def _shard_numbers(scanned: Sequence[ScannedTar]) -> dict[str, list[int]]:
    """By split the number of each tar among those that have samples of it, -1 for the others."""
    numbers = {}
    for split in _splits(scanned):
        counter = iter(range(len(scanned)))
        numbers[split] = [next(counter) if split in tar.splits else -1 for tar in scanned]
    return numbers


def _manifest(
    name: str,
    scanned: Sequence[ScannedTar],
    names: Sequence[str],
    options: InPlaceOptions,
    said: dict[str, str],
    left_out: LeftOut,
) -> dict[str, Any]:
    """The manifest, without the numbers of objects."""
    if not any(tar.splits for tar in scanned):
        raise SourceError(f"No usable sample in {len(scanned)} tars. The first that were left out: {left_out.first[:3]}")
    origin = f"{len(names)} tars in place: {names[0]}" + (f" to {names[-1]}" if len(names) > 1 else "")
    splits = {}
    for split in _splits(scanned):
        parts = [(number, tar, tar.splits[split]) for number, tar in enumerate(scanned) if split in tar.splits]
        splits[split] = {
            "objects": 0,
            "images": sum(part.samples for _, _, part in parts),
            "captions": sum(part.captions for _, _, part in parts),
            "shards": [_entry(number, tar, part) for number, tar, part in parts],
        }
    return {
        "version": VERSION, "name": name, "licence": options.licence, "source": origin, "splits": splits,
        "reading": said, "warnings": [*_warnings(scanned), *split_warnings(splits)],
        "skipped": left_out.summary(),
    }  # fmt: skip


def _entry(number: int, tar: ScannedTar, part: SplitPart) -> dict[str, Any]:
    in_place = {
        "stamp": tar.stamp, "headers": tar.headers, "json": f"{JSON_FOLDER}/{_file(number, 'jsonl')}",
        "json_bytes": tar.json_bytes, "json_sha256": tar.json_sha256,
    }  # fmt: skip
    return {"file": tar.place, "samples": part.samples, "bytes": tar.size, "sha256": part.sha256, "in_place": in_place}


def _warnings(scanned: Sequence[ScannedTar]) -> Iterator[str]:
    failed = sum((tar.failed for tar in scanned), Counter())
    if failed:
        kinds = ", ".join(f"{status[:60]} {count:,}" for status, count in failed.most_common(3))
        yield f"img2dataset's tables count {failed.total():,} failed downloads, which are not in the tars: {kinds}"
    if several := sum(tar.several_images for tar in scanned):
        aside, dotted = sum(tar.images_aside for tar in scanned), next(filter(None, (tar.dotted for tar in scanned)), "")
        name = f". A key ends at the first dot, also that of {dotted}: rename it where each is a sample" if dotted else ""
        yield (
            f"{several:,} samples have several images; of each one is taken, .jpg before .png before .webp, and {aside:,} images "
            f"are not{name}"
        )
    if passed := sum((tar.passed_over for tar in scanned), Counter()):
        yield "members that are neither images nor texts were passed over: " + ", ".join(
            f"{count:,} {ending[:40]}" for ending, count in passed.most_common(5)
        )
    if whole := [tar.place for tar in scanned if not tar.ranges]:
        yield f"{len(whole):,} tars are only given as a whole, as {whole[0]}: train with `data.cache_gb`"
