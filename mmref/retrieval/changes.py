"""What a source holds that an index does not hold yet, and the other way round.

An item is what lies in one place: a file, or a part of one. It keeps its id as long as it lies there. What lies elsewhere is
another item, whatever its name: it gets the name of its folder before its own where an item has that already.

Whether an item has changed is told by its file's size and time first. Where these differ its bytes are hashed: those that are
as they were keep their features, wherever they lie now.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from mmref.errors import SampleError
from mmref.retrieval.images import Listing, read_image_bytes
from mmref.storage.fetch import unsigned
from mmref.storage.files import is_glob
from mmref.storage.image_places import file_of
from mmref.storage.locations import from_text, is_url, join, to_text
from mmref.terminal.output import printable

NAMED = 5  # of many ids
READ_THREADS = 4
PLACE = ("path", "offset", "length")
Place = tuple[str, int, int]


@dataclass(frozen=True)
class Changes:
    """A source held against an index."""

    items: pa.Table  # to embed: new and changed ones, under ids that no item keeps
    replaced: list[str]  # ids of the index's items that the changed ones come in place of, or that are overwritten
    renamed: list[str]  # new ids of those whose own an item elsewhere has
    missing: list[str]  # ids of the index's items of the source that are not in it any more
    same: pa.Table  # rows of the listing, under the ids of the index's items whose content they have, that stand in their place
    held: int  # items of the index that are of the source
    left_out: int = 0  # of the listing: were removed for good


def compare(listing: Listing, held: Sequence[pa.Table], source: str, split: str | None, alone: bool = False) -> Changes:
    """What has to be done to have an index hold what a source holds.

    Args:
        held: items of the index's segments.
        alone: the index was made of this source alone, so that every item is of it; else those are whose files lie below it.
    """
    of_id: dict[str, Place] = {}
    of_place: dict[Place, str] = {}
    stamps: dict[str, str | None] = {}
    hashes: dict[str, bytes | None] = {}
    for items in held:
        of_id |= (mine := dict(zip(items["id"].to_pylist(), _places(items))))
        of_place |= {place: name for name, place in mine.items()}
        stamps |= zip(mine, _column(items, "file_stamp"))
        hashes |= zip(mine, _column(items, "file_sha256"))
    scope, listed = _scope(source, split), set(_places(listing.items))

    replaced: dict[str, None] = {}
    kept: dict[int, str] = {}  # row of the listing -> the id that it has in the index already
    new: dict[int, str] = {}
    stands_for: dict[int, str] = {}  # row of the listing -> the item that may have the same content
    rows = zip(listing.items["id"].to_pylist(), _places(listing.items), _column(listing.items, "file_stamp"))
    for row, (name, place, stamp) in enumerate(rows):
        there = name if of_id.get(name) == place else of_place.get(place)
        if there is not None:
            if None in (stamp, stamps[there]) or stamp == stamps[there] or there in replaced:
                continue
            replaced[there] = None
            if not place[2] or name == there:
                stands_for[row] = there
            if not place[2]:
                kept[row] = there
                continue  # a part of a file that was written anew may be another image now
        old = of_id.get(name)
        if old is not None and old not in listed and _has_moved(old, place, scope, stamp, stamps[name]):
            replaced[name] = None
            kept[row] = name
            stands_for[row] = name
        elif old is None or there is not None or not _same_file(place, old):
            new[row] = name

    same = _unchanged(listing.items, {row: hashes[name] for row, name in stands_for.items()})
    for row in same:
        del replaced[stands_for[row]]
        kept.pop(row, None), new.pop(row, None)
    renamed = _rename(new, {*kept.values(), *(name for name in of_id if name not in replaced)}, source)
    refreshed = {row: stands_for[row] for row in same}
    closed = [to_text(folder) for folder in listing.closed]
    own = [name for name, place in of_id.items() if alone or _is_below(place[0], scope)]
    moved = set(refreshed.values())
    there = {to_text(join(source, name)) for name, _ in listing.skipped}  # but cannot be looked at, or not be read here
    missing = [
        name
        for name in own
        if of_id[name] not in listed and name not in replaced and name not in moved and of_id[name][0] not in there
        if not any(_is_below(of_id[name][0], folder) for folder in closed)
    ]
    items, same_items = _under(listing.items, kept | new), _under(listing.items, refreshed)
    return Changes(items, list(replaced), renamed, missing, same_items, len(own))


def leave_out(found: Changes, left_out: Sequence[Mapping[str, Any]]) -> Changes:
    """Changes without items that were removed for good (`index.read_left_out`) and are what they were."""
    known = {(line["path"], line["offset"], line["length"]): line for line in left_out}
    rows = enumerate(zip(_places(found.items), _column(found.items, "file_stamp")))
    meant = {row: (line, stamp) for row, (place, stamp) in rows if (line := known.get(place)) is not None}
    out = {row for row, (line, stamp) in meant.items() if stamp is not None and stamp == line["file_stamp"]}
    hashes = {row: bytes.fromhex(line["file_sha256"] or "") or None for row, (line, _) in meant.items() if row not in out}
    out |= set(_unchanged(found.items, hashes))
    if not out:
        return found
    items = found.items.take(pa.array([row for row in range(len(found.items)) if row not in out], pa.int64()))
    taken = set(items["id"].to_pylist())
    return replace(found, items=items, renamed=[name for name in found.renamed if name in taken], left_out=len(out))


def _under(items: pa.Table, ids: dict[int, str]) -> pa.Table:
    """Rows of a listing in its order, under these ids."""
    chosen = dict(sorted(ids.items()))
    rows = items.take(pa.array(list(chosen), pa.int64()))
    return rows.set_column(rows.column_names.index("id"), "id", pa.array(list(chosen.values()), pa.string()))


def _unchanged(items: pa.Table, hashes: dict[int, bytes | None]) -> list[int]:
    """Rows of a listing whose content has the hash given. What cannot be read is not among them: embedding tells why."""
    known = {row: value for row, value in hashes.items() if value is not None}
    places = _places(items.take(pa.array(list(known), pa.int64())))

    def digest(place: Place) -> bytes:
        try:
            return hashlib.sha256(read_image_bytes(*place)).digest()
        except SampleError:
            return b""

    with ThreadPoolExecutor(READ_THREADS) as pool:
        return [row for row, found in zip(known, pool.map(digest, places)) if found == known[row]]


def _rename(new: dict[int, str], taken: set[str], source: str) -> list[str]:
    """Give the ids that are taken more of the source's path, in place; returns what they are then."""
    own, renamed = set(new.values()), []
    for row, name in new.items():
        if name in taken:
            name = new[row] = next(n for n in _longer(name, source) if n not in taken and n not in own)
            renamed.append(name)
        taken.add(name)
    return renamed


def skipped_elsewhere(skipped: list[dict[str, Any]], listing: Listing, source: str, split: str | None) -> list[dict[str, Any]]:
    """What was skipped of other sources: it lies not below this one, nor is it listed by it."""
    scope, its = unsigned(_scope(source, split)), set(map(unsigned, (to_text(source), *listing.items["path"].to_pylist())))
    return [s for s in skipped if (path := unsigned(s["path"])) not in its and not _is_below(path, scope)]


def unread_before(found: Changes, skipped: list[dict[str, Any]]) -> set[str]:
    """Ids of the items to embed that could not be read the last time."""
    lines = {(s["id"], unsigned(s["path"])) for s in skipped}
    items = zip(found.items["id"].to_pylist(), found.items["path"].to_pylist())
    return {name for name, path in items if (name, unsigned(path)) in lines}


def list_changes(found: Changes, removed: bool, unread: set[str]) -> Iterator[str]:
    """A line for each item that would change: + new, ~ embedded again, ? tried again since it could not be read (`unread`),
    = same content at another place or time, - removed."""
    marks = dict.fromkeys(found.replaced, "~") | dict.fromkeys(unread, "?")
    rows = zip(found.items["id"].to_pylist(), found.items["path"].to_pylist())
    yield from (f"{marks.get(name, '+')} {printable(name)}  {printable(path)}" for name, path in rows)
    yield from (f"= {printable(name)}" for name in found.same["id"].to_pylist())
    yield from (f"- {printable(name)}" for name in (found.missing if removed else ()))


def describe_changes(found: Changes, unread: set[str], source: str, removed: bool) -> list[str]:
    """What was done to have an index hold what a source holds, in words.

    Args:
        unread: ids of those to be embedded that could not be read.
        removed: whether the missing items were removed.
    """
    replaced, embedded = set(found.replaced), set(found.items["id"].to_pylist()) - unread
    lines = [f"{len(embedded - replaced):,} images added"]
    if again := embedded & replaced:
        lines.append(f"{len(again):,} have changed since and were embedded again")
    if lost := sorted(replaced - embedded):
        lines.append(f"{len(lost):,} have changed since, cannot be read any more and were removed: {some(lost)}")
    if count := len(found.same):
        lines.append(f"{count:,} have another place or time of change and the same content, and keep their features")
    if found.renamed:
        lines.append(f"{len(found.renamed):,} have the names of items from elsewhere, and are called {some(found.renamed)}")
    if found.left_out:
        lines.append(f"{found.left_out:,} stay out, since they were removed for good (left_out.jsonl)")
    if found.missing:
        end = "and were removed" if removed else "(`mmref index sync` removes them)"
        lines.append(f"{len(found.missing):,} items are not in {printable(source)} any more {end}: {some(found.missing)}")
    return lines


def some(names: Sequence[str]) -> str:
    return ", ".join([printable(name) for name in names[:NAMED]] + (["..."] if len(names) > NAMED else []))


def _scope(source: str, split: str | None) -> str:
    """What the files of a source lie below, as the text of a path."""
    return to_text(join(source, split) if split else source)


def _is_below(path: str, folder: str) -> bool:
    """Whether a place's path lies in a folder, or in the file or one of the files that a source names itself."""
    if path.startswith((f"{folder.rstrip('/')}/", f"{folder}::")):
        return True
    return is_glob(folder) and fnmatch.fnmatchcase(file_of(path), folder)


def _places(items: pa.Table) -> list[Place]:
    return list(zip(*(items[name].to_pylist() for name in PLACE)))


def _column(items: pa.Table, name: str) -> list[Any]:
    """Stamps or hashes; an index that was made before there were any has none."""
    return items[name].to_pylist() if name in items.column_names else [None] * len(items)


def _has_moved(old: Place, new: Place, scope: str, stamp: str | None, old_stamp: str | None) -> bool:
    """Whether an item that the source does not list was the source's own, is the same file gone from where it was, or the same
    URL with an older signature.

    What is gone and not the same may be on a disk that is not there at the moment.
    """
    if _is_below(old[0], scope) or (is_url(old[0]) and unsigned(old[0]) == unsigned(new[0])):
        return True
    return stamp is not None and stamp == old_stamp and not is_url(old[0]) and not os.path.exists(file_of(from_text(old[0])))


def _same_file(one: Place, other: Place) -> bool:
    """Whether two places are one, reached through links."""
    paths = from_text(one[0]), from_text(other[0])
    files = file_of(paths[0]), file_of(paths[1])
    columns = [path.removeprefix(file) for path, file in zip(paths, files)]
    if one[1:] != other[1:] or columns[0] != columns[1] or is_url(one[0]) or is_url(other[0]):
        return False
    try:
        return os.path.samefile(*files)
    except OSError:
        return False


def _longer(name: str, source: str) -> Iterator[str]:
    """An id with more and more of the source's own path before it, then with a number behind it: the same every time."""
    parts = to_text(source).split("://")[-1].strip("/").split("/")
    for start in range(len(parts) - 1, -1, -1):
        yield "/".join([*parts[start:], name])
    number = 1
    while True:
        number += 1
        yield f"{'/'.join(parts)}/{name} ({number})"
