"""The index directory: made in a folder beside it and moved into place; changed by new files and a new manifest.

    manifest.json    written last: what of the rest is in force, the model's fingerprint, measured recall
    model/           the export whose features these are
    left_out.jsonl   items that stay out although their files are there (see `duplicates.py`)
    segments/<n>/    items, features, codes and thumbnails (see `segment.py`)
    vectors-<n>      faiss index, only for ivf and hnsw: an exact search reads the features themselves
    skipped.jsonl    images that could not be read or taken, and why

A reader opens the files of one manifest; a writer leaves them alone, and deletes what no manifest names afterwards.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmref.data.folder import describe
from mmref.errors import EmptySourceError, ManyMissingError, ModelMismatchError, SearchIndexError
from mmref.retrieval import bundle
from mmref.retrieval.changes import Changes, compare, describe_changes, leave_out, list_changes, skipped_elsewhere, some
from mmref.retrieval.chunks import JOURNAL, PLACE, Chunks, embed, identity
from mmref.retrieval.images import DEFAULT_COLUMNS, Listing, TableColumns, list_images, no_items
from mmref.retrieval.journal import KILLED
from mmref.retrieval.segment import Segment, copy_rows, write_segment
from mmref.retrieval.sources import images_place
from mmref.retrieval.vectors import FLAT_UP_TO, Approximate, Floats, Kind
from mmref.storage.disk import sync_files, told_when_full
from mmref.storage.locations import below, endless, sha256_of, to_text
from mmref.storage.locks import held
from mmref.storage.whole_folder import held_folder, write_whole
from mmref.terminal.output import printable

VERSION = 1
LEFT_OUT = "left_out.jsonl"
MOST_SEGMENTS = 8  # more are joined: every search looks into each
REBUILD_SHARE = 0.1  # of an approximate index that may be items removed since
REMOVED_AT_ONCE = 0.2  # of a source's items: more that are gone at once may be a disk that is not there
ALWAYS_REMOVED = 10  # items, where a source is not empty: of a small one they are soon more than that share


@dataclass(frozen=True)
class Source:
    """Images of an index, and how they are listed."""

    images: str  # absolute path or URL
    split: str | None = None
    columns: TableColumns = DEFAULT_COLUMNS

    def to_dict(self) -> dict[str, Any]:
        """For the manifest, and to tell one command from another."""
        return {"images": self.images, "split": self.split, **asdict(self.columns)}

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Source:
        """Of `to_dict`. Raises TypeError or KeyError for what is none."""
        columns = {name: value for name, value in options.items() if name not in ("images", "split")}
        return cls(str(options["images"]), options["split"], TableColumns(**columns))


@dataclass(frozen=True)
class Manifest:
    """What an index holds. `generation` rises with every change."""

    generation: int
    items: int
    dim: int
    next_uid: int
    segments: list[str]
    model: str  # fingerprint
    kind: str  # flat, ivf or hnsw
    vectors: dict[str, Any] = field(default_factory=dict)  # file, setting, recall and how it was measured
    sources: list[str] = field(default_factory=list)
    skipped: int = 0
    notes: list[str] = field(default_factory=list)  # what the last change passed over, renamed, found missing
    listed: list[dict[str, Any]] = field(default_factory=list)  # each `Source.to_dict`; of older versions none
    version: int = VERSION

    @classmethod
    def read(cls, index: Path) -> Manifest:
        """Raises SearchIndexError where there is no complete index of this version."""
        path = index / "manifest.json"
        if why := endless(str(path)):
            raise SearchIndexError(f"{why}: make the index again.")
        try:
            values = json.loads(path.read_text())
        except OSError:
            begun = Path(f"{index}.partial").exists()
            hint = "was begun and is not finished: run the same `mmref index` again" if begun else "is no index"
            raise SearchIndexError(f"{index} {hint}. Make one with `mmref index IMAGES --model RUN --out DIR`.") from None
        except ValueError as error:
            raise SearchIndexError(f"{path} is damaged ({error}): make the index again.") from None
        if not isinstance(values, dict) or "items" not in values or "splits" in values:
            raise SearchIndexError(f"{index} is no index, its manifest.json is of something else; give one of `mmref index`.")
        if (version := values.get("version")) != VERSION:
            raise SearchIndexError(f"{path} has version {version}, this program reads {VERSION}: make the index again.")
        try:
            found = cls(**values)
            found._check(str(index))
        except (TypeError, ValueError, KeyError) as error:
            raise SearchIndexError(f"{path} is damaged ({error}): make the index again.") from None
        return found

    def _check(self, index: str) -> None:
        """Raise what a manifest that no index of ours has leads to; whoever wrote it may not be a friend."""
        for name in ("generation", "items", "dim", "next_uid", "skipped"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r:.100}")
        if not self.segments:
            raise ValueError("it names no segments")
        folder = below(index, "segments")
        for segment in self.segments:
            below(folder, segment)
        if not isinstance(self.vectors, dict):
            raise ValueError(f"vectors is {self.vectors!r:.100}")
        for options in self.listed:
            Source.of(options)
        if self.kind != "flat":
            below(index, self.vectors["file"])
            int(self.vectors["setting"]), int(self.vectors.get("bytes", 0))

    def write(self, index: Path) -> None:
        """Replace the manifest as a whole."""
        write_whole(index / "manifest.json", _encoded(json.dumps(asdict(self), indent=1, ensure_ascii=False)))


def stamp(index: Path) -> tuple[int, int]:
    """What changes with every manifest, and with another index in the same place; zeros where there is none."""
    try:
        found = (index / "manifest.json").stat()
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one writer at a time. Raises SearchIndexError when there is another."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(held(str(folder / ".lock")))
        except BlockingIOError as error:
            raise SearchIndexError(f"{folder} is in use: {error} writes to it. Wait until that has finished.") from None
        yield


def create(
    images: str,
    model: str,
    out: str,
    split: str | None = None,
    columns: TableColumns = DEFAULT_COLUMNS,
    kind: Kind = "auto",
    workers: int = 1,
    recall: float = 0.95,
    device: str = "auto",
) -> Manifest:
    """Make an index of images.

    Args:
        images: folder, shard set, table, or URL prefix of any of them; dataset on this machine or by its name on a hub.
        model: run directory of `mmref train` (or its URL), folder of `mmref export`, or pretrained model by hub id or folder.
        out: the index directory; must not exist, or be empty. The same call again goes on after a kill.
        split: of a shard set or dataset; by default all of it.
        columns: names of a table's columns, and how other sources are read.
        kind: search exactly (flat) or approximately; auto: exactly up to a million images.
        workers: Ray actors; 0: in this process.
        recall: share of the ten nearest that an approximate search must find.
        device: auto, cpu or cuda, where images are embedded.

    Raises:
        SearchIndexError, ModelError, ExportError, ShardSetError, SourceError, StorageError.
    """
    if "://" in out:
        raise SearchIndexError(f"{out} is a URL, and an index is a local folder: give one with --out.")
    images, target = images_place(images), Path(os.path.realpath(os.path.expanduser(out)))
    _check_free(target)
    work = target.with_name(f"{target.name}.partial")
    with told_when_full(target), held_folder(work, target, SearchIndexError), _kept_if_begun(work):
        _check_free(target)  # who held it has made the index meanwhile
        # These values make a command the same one; another one starts over.
        source = Source(images, split, columns)
        _start(work, {"model": os.path.abspath(model) if os.path.exists(model) else model, **source.to_dict()})
        listing = _listed(images, split, columns)
        if not (work / "model").exists():
            bundle.bundle_model(model, work / "model")
        skipped = _embed(work, listing.items, work / "segments" / "000000", workers, 0, work / "model", device=device)
        if len(skipped) == len(listing.items):
            _discard(work / "chunks")  # the next start looks again
            raise SearchIndexError(f"none of {len(skipped)} images can be read, the first: {skipped[0]['problem']}")
        skipped += _not_taken(images, listing)
        _write_skipped(work, skipped)
        segment = Segment(work / "segments" / "000000")
        loaded = _load(work / "model")
        bundle.write_reference_captions(work / "model", loaded.config, loaded.object_ids)
        chosen = ("flat" if len(segment) <= FLAT_UP_TO else "ivf") if kind == "auto" else kind
        queries = loaded.encode_text(listing.captions) if listing.captions else None
        manifest = Manifest(
            generation=1,
            items=len(segment),
            dim=segment.features.shape[1],
            next_uid=len(segment),
            segments=["000000"],
            model=bundle.fingerprint(work / "model"),
            kind=chosen,
            vectors=_build_vectors(work, chosen, 1, [segment], queries, recall),
            sources=[images],
            skipped=len(skipped),
            notes=_passed_over(listing),
            listed=[source.to_dict()],
        )
        manifest.write(work)
        sync_files(work)
        if target.exists():
            shutil.copymode(target, work)
        os.rename(work, target)
        _tidy(target)
    return manifest


def add(
    index: str,
    images: str,
    model: str | None = None,
    split: str | None = None,
    columns: TableColumns = DEFAULT_COLUMNS,
    workers: int = 1,
    device: str = "auto",
) -> Manifest:
    """Have the index hold what a source holds now: what is new or has changed is embedded, see `changes.py`.

    What is gone from the source stays, and is named: `sync` removes it.

    Args:
        model: checked against the index's own, which is used. Others as in `create`.

    Raises:
        ModelMismatchError: `model` is another one. SearchIndexError and others as in `create`.
    """
    return _take_in(index, Source(images_place(images), split, columns), model, workers, device, None)


def sync(
    index: str,
    source: Source,
    workers: int = 1,
    device: str = "auto",
    remove_up_to: float = REMOVED_AT_ONCE,
    dry_run: Callable[[str], None] | None = None,
) -> Manifest:
    """Have the index hold what a source holds now, and nothing else of it: `add`, and what is gone is removed, in one change.

    Args:
        source: one of `sources_of`, or another one.
        remove_up_to: share of the source's items, 0 to 1, that may be gone at once (and ALWAYS_REMOVED, above 0). With 1 the
            source may be empty or gone.
        dry_run: is told a line for each item that would change, and nothing is changed.

    Returns:
        What the index holds then; after a dry run, as it is, with notes on what would be done.

    Raises:
        ManyMissingError: more is gone: a disk may not be there. Others as in `add`.
    """
    return _take_in(index, source, None, workers, device, remove_up_to, dry_run)


def sources_of(index: str) -> list[Source]:
    """What an index was made of and what was added, and how it was read. Raises SearchIndexError."""
    return _sources(Manifest.read(Path(index).expanduser().absolute()))


def _sources(manifest: Manifest) -> list[Source]:
    listed = [Source.of(options) for options in manifest.listed]
    # Indexes of older versions do not tell how their sources were read.
    return listed + [Source(images) for images in manifest.sources if images not in {source.images for source in listed}]


def _take_in(
    index: str,
    source: Source,
    model: str | None,
    workers: int,
    device: str,
    remove_up_to: float | None,
    dry_run: Callable[[str], None] | None = None,
) -> Manifest:
    """`add`, where `remove_up_to` is None, and `sync`."""
    folder, images, split = Path(index).expanduser().absolute(), source.images, source.split
    Manifest.read(folder)
    with told_when_full(folder), locked(folder), contextlib.ExitStack() as stack:
        manifest = Manifest.read(folder)
        check_model(folder, manifest)
        segments = open_segments(folder, manifest)
        listing = _listed_or_gone(source, remove_up_to)
        alone = [(s.images, s.split) for s in _sources(manifest)] == [(images, split)]
        found = leave_out(compare(listing, [s.items for s in segments], images, split, alone), read_left_out(folder))
        _check_missing(found, images, remove_up_to)
        removing = remove_up_to is not None
        if dry_run is not None:
            for line in list_changes(found, removing):
                dry_run(line)
            return replace(manifest, notes=describe_changes(found, set(), images, removing) + _passed_over(listing))
        work = folder / ".adding"
        stack.enter_context(_kept_if_begun(work))
        work.mkdir(exist_ok=True)
        _start(work, {"generation": manifest.generation, **source.to_dict()})
        if model is not None:
            _check_same_model(folder, work / "given", manifest, model)
        name = f"{manifest.generation:06d}"
        before = read_skipped(folder)
        killers = {identity(s) for s in before if s["problem"] == KILLED}
        unread = _embed(work, found.items, work / name, workers, manifest.next_uid, folder / "model", killers, device)
        skipped = [*skipped_elsewhere(before, listing, images, split), *_not_taken(images, listing), *unread]
        notes = describe_changes(found, {s["id"] for s in unread}, images, removing) + _passed_over(listing)
        gone = {*found.replaced, *(found.missing if removing else ())}
        changed = _with_changes(folder, manifest, segments, gone, found.same, work / name)
        listed = _listed_too(manifest.listed, source)
        if changed == manifest and skipped == before and listed == manifest.listed:
            shutil.rmtree(work)
            return replace(manifest, notes=notes)
        sources = list(dict.fromkeys([*manifest.sources, images]))
        changed = replace(changed, generation=manifest.generation + 1, sources=sources, listed=listed)
        _write_skipped(folder, skipped)
        changed = replace(changed, skipped=len(skipped), notes=notes)
        _commit(folder, changed)
        shutil.rmtree(work)
    return changed


def _with_changes(
    folder: Path, manifest: Manifest, segments: list[Segment], gone: set[str], same: pa.Table, new: Path
) -> Manifest:
    """The next manifest, whose files are written: without the items gone, with what a listing says now of the `same` ones, and
    with the segment `new` where there is one. The manifest itself where none of this changes anything."""
    embedded = len(np.load(new / "uids.npy", mmap_mode="r")) if new.exists() else 0
    if not embedded and not gone and not len(same):
        return manifest
    if not embedded and len(gone) == manifest.items:
        raise SearchIndexError(f"nothing would be left of {folder}: delete the folder instead.")
    names, added = _rewritten(folder, manifest, segments, gone, same), None
    if embedded:
        _discard(folder / "segments" / new.name)
        os.rename(new, folder / "segments" / new.name)
        added = Segment(folder / "segments" / new.name)
        names.append(new.name)
    items, next_uid = manifest.items - len(gone) + embedded, manifest.next_uid + embedded
    changed = _next(manifest, items=items, next_uid=next_uid, segments=names)
    changed = replace(changed, vectors=_changed_vectors(folder, manifest, changed, added))
    if len(names) > MOST_SEGMENTS:
        joined = f"{new.name}-joined"
        _discard(folder / "segments" / joined)
        copy_rows(folder / "segments" / joined, [(s, np.arange(len(s))) for s in open_segments(folder, changed)])
        changed = replace(changed, segments=[joined])
    return changed


def remove(index: str, ids: Sequence[str], for_good: bool = False) -> Manifest:
    """Remove items.

    Args:
        for_good: `add` and `sync` do not take them in again, as long as their files are what they are.

    Raises:
        SearchIndexError: an id is not there, or nothing would be left. StorageError.
    """
    folder = Path(index).expanduser().absolute()
    Manifest.read(folder)
    with told_when_full(folder), locked(folder):
        manifest = Manifest.read(folder)
        segments = open_segments(folder, manifest)
        held = {name for s in segments for name in s.items["id"].to_pylist()}
        found = held.intersection(ids)
        if missing := [name for name in ids if name not in found]:
            raise SearchIndexError(f"{folder} has no item {missing[0]!r} ({len(missing)} of {len(ids)} ids are unknown).")
        if len(found) == manifest.items:
            raise SearchIndexError(f"nothing would be left of {folder}: delete the folder instead.")
        names = _rewritten(folder, manifest, segments, found)
        changed = _next(manifest, items=manifest.items - len(found), segments=names, notes=[])
        changed = replace(changed, vectors=_changed_vectors(folder, manifest, changed, None))
        if for_good:
            _add_left_out(folder, segments, found)
        _commit(folder, changed)
    return changed


def check_model(index: Path, manifest: Manifest) -> None:
    """Raise ModelMismatchError when `model/` is not what the features were made with."""
    if not bundle.is_of(index / "model", manifest.model):
        found = bundle.fingerprint(index / "model")
        raise ModelMismatchError(
            f"{index / 'model'} has fingerprint {found[:12]}, the features were made with {manifest.model[:12]}: the model "
            "was replaced. Make the index again with the new one."
        )


def open_segments(index: Path, manifest: Manifest) -> list[Segment]:
    """The segments in force. Raises SearchIndexError."""
    return [Segment(index / "segments" / name) for name in manifest.segments]


def open_vectors(index: Path, manifest: Manifest) -> Approximate | None:
    """The approximate index, None for an exact search. Raises SearchIndexError."""
    if manifest.kind == "flat":
        return None
    path, told = index / manifest.vectors["file"], manifest.vectors
    # A file that is not whole may make faiss end the process, so it is looked at first. The earliest indexes tell
    # neither number.
    try:
        size = path.stat().st_size
        if size != (wanted := int(told.get("bytes", size))):
            raise SearchIndexError(f"{path} has {size:,} bytes of {wanted:,}: the index is damaged; make it again.")
        if "sha256" in told and sha256_of(str(path)) != told["sha256"]:
            raise SearchIndexError(f"{path} is not what was written: the index is damaged; make it again.")
    except OSError as error:
        raise SearchIndexError(f"{path} cannot be read ({error}): the index is damaged; make it again.") from None
    found = Approximate.open(path, manifest.kind, int(told["setting"]), manifest.dim)
    if not manifest.items <= len(found) <= manifest.next_uid:
        raise SearchIndexError(f"{path} holds {len(found):,} items of {manifest.items:,}: make the index again.")
    return found


# -- steps -----------------------------------------------------------------------------------------------------------


def _check_free(target: Path) -> None:
    """An empty folder is as good as none, where another can be moved into its place."""
    if target.is_dir() and os.path.ismount(target):
        raise SearchIndexError(
            f"{target} is where a disk is mounted, so that no folder can be moved into its place: give a folder in it with --out."
        )
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise SearchIndexError(
            f"{target} exists already and is not empty: `mmref index add` adds to an index; else give another --out."
        )


@contextlib.contextmanager
def _kept_if_begun(work: Path) -> Iterator[None]:
    """An error leaves the work folder for the next start where something is embedded; else nothing of it stays."""
    try:
        yield
    except Exception:
        if not any(work.glob("chunks/*.npz")):
            _discard(work)
        raise


def _start(work: Path, plan: dict[str, Any]) -> None:
    """Keep what an interrupted call with the same plan has done, remove what another one left."""
    path = work / "plan.json"
    if not path.exists() or json.loads(path.read_text()) != plan:
        for entry in work.iterdir():
            if entry.name != ".lock":
                _discard(entry)
        write_whole(path, json.dumps(plan))


def _listed(images: str, split: str | None, columns: TableColumns) -> Listing:
    """What is there now: a resumed call lists again, and embeds what it has not embedded. Raises SearchIndexError."""
    listing = list_images(images, split, columns)
    ids = listing.items["id"]
    if len(ids.unique()) != len(ids):
        twice = pc.value_counts(ids)
        name = next(v["values"].as_py() for v in twice if v["counts"].as_py() > 1)
        raise SearchIndexError(f"{images}: the id {name!r} appears twice; ids must be distinct.")
    return listing


def _rewritten(
    folder: Path, manifest: Manifest, segments: list[Segment], ids: set[str], same: pa.Table | None = None
) -> list[str]:
    """Names of the segments when items have gone and others are listed anew (`same` of `copy_rows`), new ones where any was."""
    wanted, names = pa.array(sorted(ids), pa.string()), []
    relisted = pa.array([] if same is None else same["id"].to_pylist(), pa.string())
    for name, segment in zip(manifest.segments, segments):
        gone = np.asarray(pc.is_in(segment.items["id"], value_set=wanted))
        touched = gone | np.asarray(pc.is_in(segment.items["id"], value_set=relisted))
        if not touched.any():
            names.append(name)
        elif not gone.all():
            names.append(f"{manifest.generation:06d}-{len(names)}")
            _discard(folder / "segments" / names[-1])
            copy_rows(folder / "segments" / names[-1], [(segment, np.flatnonzero(~gone))], same)
    return names


def _listed_or_gone(source: Source, remove_up_to: float | None) -> Listing:
    """What a source holds; nothing, where all of it may go and it is empty or gone. Raises ManyMissingError."""
    try:
        return _listed(source.images, source.split, source.columns)
    except EmptySourceError as error:
        if remove_up_to is None:
            raise
        if remove_up_to < 1:
            raise ManyMissingError(
                f"{error} Nothing was removed from the index: the disk may not be there. If these images are gone for good, "
                "say so with `--remove-up-to 1`."
            ) from None
        return Listing(no_items(), [])


def _check_missing(found: Changes, images: str, remove_up_to: float | None) -> None:
    """Raises ManyMissingError."""
    if remove_up_to is not None and len(found.missing) > (max(remove_up_to * found.held, ALWAYS_REMOVED) if remove_up_to else 0):
        share, several = len(found.missing) / found.held, some(found.missing)
        raise ManyMissingError(
            f"{len(found.missing):,} of {found.held:,} items are not in {printable(images)} any more: {several}. That is "
            f"{share:.0%}, and at most {remove_up_to:.0%} are removed at once, since a disk may not be there. Nothing was "
            f"changed. If they are gone for good, say so with `--remove-up-to {math.ceil(100 * share) / 100:g}`."
        )


def _listed_too(listed: list[dict[str, Any]], source: Source) -> list[dict[str, Any]]:
    """How sources were read, with one more, in place of what was known of it."""
    of = [Source.of(options) for options in listed]
    others = [o.to_dict() for o in of if (o.images, o.split) != (source.images, source.split)]
    return listed if source in of else [*others, source.to_dict()]


def _changed_vectors(folder: Path, before: Manifest, after: Manifest, added: Segment | None) -> dict[str, Any]:
    """The approximate index with a segment added, built again when much of it has gone; {} for flat."""
    approximate = open_vectors(folder, before)
    if approximate is None:
        return {}
    if after.items < (1 - REBUILD_SHARE) * (len(approximate) + (0 if added is None else len(added))):
        kept, recall = open_segments(folder, after), float(before.vectors["wanted"])
        return _build_vectors(folder, before.kind, after.generation, kept, None, recall)
    if added is None:
        return before.vectors
    approximate.add(added.features, added.uids)
    return before.vectors | _write_vectors(approximate, folder, after.generation)


def _embed(
    work: Path,
    items: pa.Table,
    target: Path,
    workers: int,
    first_uid: int,
    model: Path,
    killers: Collection[str] = (),
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Embed the items of a listing and write its readable images as a segment; returns those that could not be read."""
    chunks = Chunks(work, items)
    embed(chunks, model, workers, killers, device)
    count, dim = 0, 0
    skipped: list[dict[str, Any]] = []
    for rows, arrays in chunks.read():
        count += len(arrays["position"])
        dim = arrays["features"].shape[1]
        for position, problem in json.loads(arrays["problems"].tobytes()).items():
            (row,) = rows.slice(int(position), 1).to_pylist()
            # For an image that is never decoded again, its place tells whether it is still the same.
            kept = ("id", *PLACE) if problem == KILLED else ("id", "path")
            skipped.append({**{name: row[name] for name in kept}, "problem": problem})
    _discard(target)
    if count:
        write_segment(target, chunks.read(), first_uid, count, dim)
    return skipped


def read_skipped(index: Path) -> list[dict[str, Any]]:
    """Images that could not be read or taken: id, path (of what could not be taken: its source), problem; of one that ended
    processes, all of its place (see `embed.identity`)."""
    # `splitlines` would also break where a name has one of Unicode's own line ends.
    return [json.loads(line) for line in (index / "skipped.jsonl").read_text(encoding="utf-8").split("\n") if line]


def read_left_out(index: Path) -> list[dict[str, Any]]:
    """Items that were removed for good: id, path, offset, length, file_stamp and file_sha256 (in hex) of each."""
    path = index / LEFT_OUT
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []


def _add_left_out(index: Path, segments: list[Segment], ids: set[str]) -> None:
    """Note items that are removed for good. Written before the removal is in force: what is in the index is never looked up."""
    lines = read_left_out(index)
    for segment in segments:
        items = segment.items.filter(pc.is_in(segment.items["id"], value_set=pa.array(sorted(ids), pa.string())))
        for row in items.select([name for name in ("id", *PLACE, "file_sha256") if name in items.column_names]).to_pylist():
            content = row.get("file_sha256")
            lines.append({**dict.fromkeys(PLACE), **row, "file_sha256": content.hex() if content else None})
    write_whole(index / LEFT_OUT, _encoded("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)))


def _write_skipped(index: Path, skipped: list[dict[str, Any]]) -> None:
    lines = (json.dumps(s, ensure_ascii=False) + "\n" for s in skipped)
    write_whole(index / "skipped.jsonl", _encoded("".join(lines)))


def _encoded(text: str) -> bytes:
    """JSON as UTF-8; of a path that is none JSON keeps \\udcNN."""
    return text.encode("utf-8", "backslashreplace")


def _not_taken(source: str, listing: Listing) -> list[dict[str, Any]]:
    return [{"id": what, "path": to_text(source), "problem": why} for what, why in listing.skipped]


def _passed_over(listing: Listing) -> list[str]:
    """What lies beside the images of a listing, in words."""
    count = sum(listing.passed_over.values())
    lines = list(listing.notes)
    lines += [f"{count:,} files passed over: {describe(listing.passed_over)}"] if count else []
    if left := [f"{printable(name)} ({why})" for name, why in listing.columns_left.items()]:
        lines.append(f"columns of the table that were not taken: {', '.join(left)}")
    if infinite := [f"{printable(name)} ({count:,})" for name, count in listing.cells_left.items()]:
        lines.append(f"infinite numbers of the table that are kept as missing: {', '.join(infinite)}")
    return lines


def _build_vectors(
    index: Path, kind: str, generation: int, segments: list[Segment], queries: Floats | None, recall: float
) -> dict[str, Any]:
    """Build, tune and write an approximate index; {} for flat.

    Recall is measured with captions of the source where it has any, else with the features of items.
    """
    if kind == "flat":
        return {}
    matrices, uids = [s.features for s in segments], np.concatenate([s.uids for s in segments])
    began = time.perf_counter()
    approximate = Approximate.build(kind, matrices, uids)
    measured_on = "captions"
    if queries is None:
        measured_on = "items"
        queries = np.ascontiguousarray(matrices[0][:: max(1, len(matrices[0]) // 256)][:256])
    reached = approximate.tune(queries, matrices, uids, recall)
    return {
        **_write_vectors(approximate, index, generation),
        "setting": approximate.setting,
        "recall@10": round(reached, 4),
        "wanted": recall,
        "measured_on": measured_on,
        "queries": len(queries),
        "build_seconds": round(time.perf_counter() - began, 1),
    }


def _write_vectors(approximate: Approximate, index: Path, generation: int) -> dict[str, Any]:
    """Its name below the index, and what tells later whether it is whole."""
    path = index / f"vectors-{generation:06d}"
    approximate.write(path)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(str(path))}


def _next(manifest: Manifest, **changes: Any) -> Manifest:
    return replace(manifest, generation=manifest.generation + 1, **changes)


def _commit(index: Path, manifest: Manifest) -> None:
    """Put a manifest in force and delete what it does not name."""
    manifest.write(index)
    for entry in (index / "segments").iterdir():
        if entry.name not in manifest.segments:
            _discard(entry)
    for entry in index.glob("vectors-*"):
        if entry.name != manifest.vectors.get("file"):
            _discard(entry)
    _tidy(index)


def _tidy(index: Path) -> None:
    """Delete what making the index needed, and what a killed writer left."""
    for name in (
        "chunks",
        JOURNAL,
        "plan.json",
        "chunks.new",
        ".*.json*.tmp",
        ".export-*",
        "model.partial",
        "new",
    ):
        for entry in index.glob(name):
            _discard(entry)


def _check_same_model(index: Path, other: Path, manifest: Manifest, model: str) -> None:
    """`other` is where the model is copied for a moment."""
    _discard(other)
    bundle.bundle_model(model, other)
    same, found = bundle.is_of(other, manifest.model), bundle.fingerprint(other)
    _discard(other)
    if not same:
        raise ModelMismatchError(
            f"{model} (fingerprint {found[:12]}) is not the model of {index} ({manifest.model[:12]}): features of two "
            "models cannot be compared. Leave --model out to use the index's own, or make a new index."
        )


def _load(model: Path) -> Any:
    from mmref.export.model import load

    return load(model)


def _discard(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
