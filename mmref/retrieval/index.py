"""The index directory: made in a folder beside it and moved into place; changed by new files and a new manifest.

    manifest.json    written last: what of the rest is in force, the model's fingerprint, measured recall
    model/           the export whose features these are
    left_out.jsonl   items that stay out although their files are there (see `duplicates.py`)
    segments/<n>/    items, features, codes and thumbnails (see `segment.py`)
    vectors-<n>      faiss index, only for ivf, hnsw and ivfpq: an exact search reads the features themselves
    skipped.jsonl    images that could not be read or taken, and why

A reader opens the files of one manifest; a writer leaves them alone, and deletes what no manifest names afterwards.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmref.errors import EmptySourceError, ManyMissingError, ModelMismatchError, SearchIndexError
from mmref.retrieval import bundle
from mmref.retrieval.changes import (
    Changes,
    compare,
    describe_changes,
    leave_out,
    list_changes,
    skipped_elsewhere,
    some,
    unread_before,
)
from mmref.retrieval.chunks import JOURNAL, identity
from mmref.retrieval.images import DEFAULT_COLUMNS, FOLDERS, Listing, TableColumns, list_images, no_items
from mmref.retrieval.journal import KILLED
from mmref.retrieval.manifest import Manifest, Source
from mmref.retrieval.segment import Segment, copy_rows, open_segments
from mmref.retrieval.set_aside import add_left_out, not_taken, passed_over, read_left_out, read_skipped, write_skipped
from mmref.retrieval.size import chosen_kind
from mmref.retrieval.sources import images_place
from mmref.retrieval.vector_file import PARTS, build_vectors, changed_vectors
from mmref.retrieval.vectors import Kind
from mmref.retrieval.work_folder import discard, embed_listing, kept_if_begun, start_work
from mmref.run.models import source_of
from mmref.storage.disk import sync_files, told_when_full
from mmref.storage.locks import held
from mmref.storage.whole_folder import held_folder
from mmref.terminal.output import printable
from mmref.terminal.progress import say

MOST_SEGMENTS = 8  # more are joined: every search looks into each
REMOVED_AT_ONCE = 0.2  # of a source's items: more that are gone at once may be a disk that is not there
ALWAYS_REMOVED = 10  # items, where a source is not empty: of a small one they are soon more than that share


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
    memory: int | None = None,
) -> Manifest:
    """Make an index of images.

    Args:
        images: folder, shard set, table, or URL prefix of any of them; dataset on this machine or by its name on a hub.
        model: run directory of `mmref train` (or its URL), folder of `mmref export`, or pretrained model by hub id or folder.
        out: the index directory; must not exist, or be empty. The same call again goes on after a kill.
        split: of a shard set or dataset; by default all of it.
        columns: names of a table's columns, and how other sources are read.
        kind: search exactly (flat) or approximately; auto: exactly up to a million images, else by `memory`.
        workers: Ray actors; 0: in this process.
        recall: share of the ten nearest that an approximate search must find.
        device: auto, cpu or cuda, where images are embedded.
        memory: bytes that searches may keep in memory, by which `auto` chooses; None: half of this machine's.

    Raises:
        SearchIndexError, ModelError, ExportError, ShardSetError, SourceError, StorageError.
    """
    if "://" in out:
        raise SearchIndexError(f"{out} is a URL, and an index is a local folder: give one with --out.")
    _check_asked(kind, recall, columns.folders)
    images, target = images_place(images), Path(os.path.realpath(os.path.expanduser(out)))
    _check_free(target)
    work = target.with_name(f"{target.name}.partial")
    with told_when_full(target), held_folder(work, target, SearchIndexError), kept_if_begun(work):
        _check_free(target)  # who held it has made the index meanwhile
        # These values make a command the same one; another one starts over.
        source = Source(images, split, columns)
        start_work(work, {**source_of(model), **source.to_dict()})
        listing = _listed(images, split, columns)
        if not (work / "model").exists():
            bundle.bundle_model(model, work / "model")
        skipped = embed_listing(work, listing.items, work / "segments" / "000000", workers, 0, work / "model", device=device)
        if len(skipped) == len(listing.items):
            discard(work / "chunks")  # the next start looks again
            raise SearchIndexError(f"none of {len(skipped)} images can be read, the first: {skipped[0]['problem']}")
        skipped += not_taken(images, listing)
        write_skipped(work, skipped)
        manifest = _first_manifest(work, source, listing, kind, recall, len(skipped), workers, memory)
        manifest.write(work)
        sync_files(work)
        if target.exists():
            shutil.copymode(target, work)
        os.rename(work, target)
        _tidy(target)
    return manifest


def _check_asked(kind: str, recall: float, folders: str) -> None:
    """Raise SearchIndexError for choices that there are none of, before hours of work: the terminal offers no others."""
    for name, given, known in (("kind", kind, get_args(Kind)), ("folders", folders, FOLDERS)):
        if given not in known:
            raise SearchIndexError(f"{name} is {given!r}: give one of {', '.join(known)}.")
    if not 0 <= recall <= 1:
        raise SearchIndexError(f"recall is {recall}: give a share of the ten nearest, from 0 to 1.")


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
        bundle.check_model(folder, manifest.model)
        segments = open_segments(folder, manifest)
        listing = _listed_or_gone(source, remove_up_to)
        alone = [(s.images, s.split) for s in _sources(manifest)] == [(images, split)]
        found = leave_out(compare(listing, [s.items for s in segments], images, split, alone), read_left_out(folder))
        _check_missing(found, images, remove_up_to)
        removing = remove_up_to is not None
        if dry_run is not None:
            again = unread_before(found, read_skipped(folder))
            for line in list_changes(found, removing, again):
                dry_run(line)
            notes = describe_changes(found, again, images, removing) + passed_over(listing)
            if again:
                notes.append(f"{len(again):,} could not be read the last time and are tried again: {some(sorted(again))}")
            return replace(manifest, notes=notes)
        work = folder / ".adding"
        stack.enter_context(kept_if_begun(work))
        work.mkdir(exist_ok=True)
        start_work(work, {"generation": manifest.generation, **source.to_dict()})
        if model is not None:
            _check_same_model(folder, work / "given", manifest, model)
        name = f"{manifest.generation:06d}"
        before = read_skipped(folder)
        killers = {identity(s) for s in before if s["problem"] == KILLED}
        unread = embed_listing(work, found.items, work / name, workers, manifest.next_uid, folder / "model", killers, device)
        skipped = [*skipped_elsewhere(before, listing, images, split), *not_taken(images, listing), *unread]
        notes = describe_changes(found, {s["id"] for s in unread}, images, removing) + passed_over(listing)
        gone = {*found.replaced, *(found.missing if removing else ())}
        changed = _with_changes(folder, manifest, segments, gone, found.same, work / name)
        listed = _listed_too(manifest.listed, source)
        if changed == manifest and skipped == before and listed == manifest.listed:
            shutil.rmtree(work)
            return replace(manifest, notes=notes)
        sources = list(dict.fromkeys([*manifest.sources, images]))
        changed = replace(changed, generation=manifest.generation + 1, sources=sources, listed=listed)
        write_skipped(folder, skipped)
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
        discard(folder / "segments" / new.name)
        os.rename(new, folder / "segments" / new.name)
        added = Segment(folder / "segments" / new.name)
        names.append(new.name)
    items, next_uid = manifest.items - len(gone) + embedded, manifest.next_uid + embedded
    changed = _next(manifest, items=items, next_uid=next_uid, segments=names)
    changed = replace(changed, vectors=changed_vectors(folder, manifest, changed, added))
    if len(names) > MOST_SEGMENTS:
        joined = f"{new.name}-joined"
        discard(folder / "segments" / joined)
        copy_rows(folder / "segments" / joined, [(s, np.arange(len(s))) for s in open_segments(folder, changed)])
        changed = replace(changed, segments=[joined])
    return changed


def remove(index: str, ids: Sequence[str], for_good: bool = False) -> Manifest:
    """Remove items.

    Args:
        for_good: `add` and `sync` do not take them in again, as long as their files are what they are, and their thumbnails are
            gone from the disk.

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
        names = _rewritten(folder, manifest, segments, found, forget=for_good)
        changed = _next(manifest, items=manifest.items - len(found), segments=names, notes=[])
        changed = replace(changed, vectors=changed_vectors(folder, manifest, changed, None))
        if for_good:
            add_left_out(folder, segments, found)
        _commit(folder, changed)
    return changed


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


def _first_manifest(
    work: Path, source: Source, listing: Listing, kind: Kind, recall: float, skipped: int, workers: int, memory: int | None
) -> Manifest:
    """Of a new index whose one segment is written; the approximate index is built."""
    segment = Segment(work / "segments" / "000000")
    loaded = _load(work / "model")
    bundle.write_reference_captions(work / "model", loaded.config, loaded.object_ids)
    chosen, why = chosen_kind(kind, len(segment), segment.features.shape[1], memory)
    say(why)
    queries = loaded.encode_text(listing.captions) if listing.captions else None
    return Manifest(
        generation=1,
        items=len(segment),
        dim=segment.features.shape[1],
        next_uid=len(segment),
        segments=["000000"],
        model=bundle.fingerprint(work / "model"),
        kind=chosen,
        vectors=build_vectors(work, chosen, 1, [segment], queries, recall, workers),
        sources=[source.images],
        skipped=skipped,
        notes=passed_over(listing),
        listed=[source.to_dict()],
    )


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
    folder: Path, manifest: Manifest, segments: list[Segment], ids: set[str], same: pa.Table | None = None, forget: bool = False
) -> list[str]:
    """Names of the segments when items have gone and others are listed anew, new ones where any was. `same` and `forget` are
    those of `copy_rows`; to forget, segments that hold a thumbnail of what has gone before are new ones too."""
    wanted, names = pa.array(sorted(ids), pa.string()), []
    relisted = pa.array([] if same is None else same["id"].to_pylist(), pa.string())
    for name, segment in zip(manifest.segments, segments):
        gone = np.asarray(pc.is_in(segment.items["id"], value_set=wanted))
        touched = gone | np.asarray(pc.is_in(segment.items["id"], value_set=relisted))
        if not touched.any() and not (forget and segment.holds_others):
            names.append(name)
        elif not gone.all():
            names.append(f"{manifest.generation:06d}-{len(names)}")
            discard(folder / "segments" / names[-1])
            copy_rows(folder / "segments" / names[-1], [(segment, np.flatnonzero(~gone))], same, forget)
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


def _next(manifest: Manifest, **changes: Any) -> Manifest:
    return replace(manifest, generation=manifest.generation + 1, **changes)


def _commit(index: Path, manifest: Manifest) -> None:
    """Put a manifest in force and delete what it does not name."""
    manifest.write(index)
    for entry in (index / "segments").iterdir():
        if entry.name not in manifest.segments:
            discard(entry)
    for entry in index.glob("vectors-*"):
        if entry.name != manifest.vectors.get("file"):
            discard(entry)
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
        PARTS,
        "new",
    ):
        for entry in index.glob(name):
            discard(entry)


def _check_same_model(index: Path, other: Path, manifest: Manifest, model: str) -> None:
    """`other` is where the model is copied for a moment."""
    discard(other)
    bundle.bundle_model(model, other)
    same, found = bundle.is_of(other, manifest.model), bundle.fingerprint(other)
    discard(other)
    if not same:
        raise ModelMismatchError(
            f"{model} (fingerprint {found[:12]}) is not the model of {index} ({manifest.model[:12]}): features of two "
            "models cannot be compared. Leave --model out to use the index's own, or make a new index."
        )


def _load(model: Path) -> Any:
    from mmref.export.model import load

    return load(model)
