"""What a source holds that an index does not hold yet, and the other way round.

An item is what lies in one place: a file, or a part of one. It keeps its id as long as it lies there. What lies elsewhere is
another item, whatever its name: it gets the name of its folder before its own where an item has that already.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mmref.retrieval.images import Listing
from mmref.storage.fetch import unsigned
from mmref.storage.locations import from_text, is_url, join, to_text
from mmref.terminal.output import printable

NAMED = 5  # of many ids
PLACE = ("path", "offset", "length")
Place = tuple[str, int, int]


@dataclass(frozen=True)
class Changes:
    """A source held against an index."""

    items: pa.Table  # to embed: new and changed ones, under ids that no item keeps
    replaced: list[str]  # ids of the index's items that the changed ones come in place of, or that are overwritten
    renamed: list[str]  # new ids of those whose own an item elsewhere has
    missing: list[str]  # ids of the index's items of the source that are not in it any more


def compare(listing: Listing, held: Sequence[pa.Table], source: str, split: str | None) -> Changes:
    """What has to be done to have an index hold what a source holds.

    Args:
        held: items of the index's segments.
    """
    of_id: dict[str, Place] = {}
    of_place: dict[Place, str] = {}
    stamps: dict[str, str | None] = {}
    for items in held:
        of_id |= (mine := dict(zip(items["id"].to_pylist(), _places(items))))
        of_place |= {place: name for name, place in mine.items()}
        stamps |= zip(mine, _stamps(items))
    scope, listed = _scope(source, split), set(_places(listing.items))

    replaced: dict[str, None] = {}
    kept: dict[int, str] = {}  # row of the listing -> the id that it has in the index already
    new: dict[int, str] = {}
    rows = zip(listing.items["id"].to_pylist(), _places(listing.items), _stamps(listing.items))
    for row, (name, place, stamp) in enumerate(rows):
        there = name if of_id.get(name) == place else of_place.get(place)
        if there is not None:
            if None in (stamp, stamps[there]) or stamp == stamps[there] or there in replaced:
                continue
            replaced[there] = None
            if not place[2]:
                kept[row] = there
                continue  # a part of a file that was written anew may be another image now
        old = of_id.get(name)
        if old is not None and old not in listed and _has_moved(old, place, scope, stamp, stamps[name]):
            replaced[name] = None
            kept[row] = name
        elif old is None or there is not None or not _same_file(place, old):
            new[row] = name

    renamed = _rename(new, {*kept.values(), *(name for name in of_id if name not in replaced)}, source)
    chosen = dict(sorted((kept | new).items()))
    items = listing.items.take(pa.array(list(chosen), pa.int64()))
    items = items.set_column(items.column_names.index("id"), "id", pa.array(list(chosen.values()), pa.string()))
    closed = [to_text(folder) for folder in listing.closed]
    missing = [
        name
        for name, place in of_id.items()
        if _is_below(place[0], scope) and place not in listed and name not in replaced
        if not any(_is_below(place[0], folder) for folder in closed)
    ]
    return Changes(items, list(replaced), renamed, missing)


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
    scope, its = _scope(source, split), {to_text(source), *listing.items["path"].to_pylist()}
    return [s for s in skipped if s["path"] not in its and not _is_below(s["path"], scope)]


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
        lines.append(f"{len(lost):,} have changed since, cannot be read any more and were removed: {_some(lost)}")
    if found.renamed:
        lines.append(f"{len(found.renamed):,} have the names of items from elsewhere, and are called {_some(found.renamed)}")
    if found.missing:
        end = "and were removed" if removed else "(--remove-missing removes them)"
        lines.append(f"{len(found.missing):,} items are not in {printable(source)} any more {end}: {_some(found.missing)}")
    return lines


def _some(names: Sequence[str]) -> str:
    return ", ".join([printable(name) for name in names[:NAMED]] + (["..."] if len(names) > NAMED else []))


def _scope(source: str, split: str | None) -> str:
    """What the files of a source lie below, as the text of a path."""
    return to_text(join(source, split) if split else source)


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder.rstrip('/')}/")


def _places(items: pa.Table) -> list[Place]:
    return list(zip(*(items[name].to_pylist() for name in PLACE)))


def _stamps(items: pa.Table) -> list[str | None]:
    """An index that was made before there were any has none."""
    return items["file_stamp"].to_pylist() if "file_stamp" in items.column_names else [None] * len(items)


def _has_moved(old: Place, new: Place, scope: str, stamp: str | None, old_stamp: str | None) -> bool:
    """Whether an item that the source does not list was the source's own, is the same file gone from where it was, or the same
    URL with an older signature.

    What is gone and not the same may be on a disk that is not there at the moment.
    """
    if _is_below(old[0], scope) or (is_url(old[0]) and unsigned(old[0]) == unsigned(new[0])):
        return True
    return stamp is not None and stamp == old_stamp and not is_url(old[0]) and not os.path.exists(from_text(old[0]))


def _same_file(one: Place, other: Place) -> bool:
    """Whether two places are one, reached through links."""
    if one[1:] != other[1:] or is_url(one[0]) or is_url(other[0]):
        return False
    try:
        return os.path.samefile(from_text(one[0]), from_text(other[0]))
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
