"""What lies in a folder or below a URL prefix: its pictures, texts that may be captions, and what is passed over, none of it
without a word.

Links are followed, each folder once; only regular files are read. A file or folder that cannot be looked at costs itself alone.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmref.data.kinds import PREFIX, ending_of, is_picture, kind_of, why_unread
from mmref.errors import MMRefError, StorageError
from mmref.storage.locations import file_system, is_url, read_bytes, to_text
from mmref.storage.retries import retry
from mmref.storage.whole_folder import LOCK, NEW

CAPTIONS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")  # endings of files that may hold captions of pictures
HIDDEN, UNENDED, LINKED, OTHER = "hidden", "without an ending", "linked twice", "no file"
INDEX, SET, BEGUN = "search index", "shard set", "folder being written"
NAMED_ENDINGS = 8  # of files that are no images
LONGEST_ENDING = 12  # a longer one is a name with a dot in it
SPECIAL = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
# Under these names fsspec's file systems give what changes with a file.
CHANGES_WITH = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "LastModified",
    "last_modified",
    "updated",
    "mtime",
    "created",
)


@dataclass
class Found:
    """What a folder holds. Names are paths below it."""

    pictures: list[tuple[str, str, str]] = field(default_factory=list)  # name, path or URL, what changes with the file
    skipped: list[tuple[str, str]] = field(default_factory=list)  # what looks like a picture or may hold some, and why
    passed_over: Counter[str] = field(default_factory=Counter)  # files by ending, or by what else they are
    closed: list[str] = field(default_factory=list)  # folders that could not be listed
    texts: list[tuple[str, str]] = field(default_factory=list)  # name, path or URL of files of `CAPTIONS`; passed over as well
    folders: list[str] = field(default_factory=list)  # that were looked into, with a slash at the end; not of URLs

    def add(self, name: str, path: str, stamp: str) -> None:
        """Count a regular file in; one whose ending says nothing is told by its first bytes. Raises StorageError."""
        ending = ending_of(name)
        kind = kind_of(ending)
        if kind in ("unknown", "unread"):
            try:
                kind = "picture" if is_picture(read_bytes(path, 0, PREFIX)) else kind
            except StorageError:  # says nothing of the file
                raise
            except Exception as error:  # every file system has its own
                self.skip(name, f"cannot be read: {error}")
                return
        if kind == "picture":
            self.pictures.append((name, path, stamp))
        elif kind in ("unread", "raw"):
            self.skip(name, f"not read here: {why_unread(ending)}")
            self.passed_over[f"{ending} ({why_unread(ending)})"] += 1
        else:
            if ending in CAPTIONS:
                self.texts.append((name, path))
            sensible = ending.isprintable() and 1 < len(ending) <= LONGEST_ENDING
            self.passed_over[ending if sensible else UNENDED] += 1

    def skip(self, name: str, why: str) -> None:
        """List what may be a picture and is not taken."""
        self.skipped.append((to_text(name), why))


def look_into(root: str, wrong: type[MMRefError]) -> Found:
    """What a folder or URL prefix holds, names in order.

    Raises:
        wrong: it cannot be listed.
        StorageError: the storage keeps failing.
    """
    found = _look_below(root, wrong) if is_url(root) else _walk(root, wrong)
    for names in (found.pictures, found.skipped, found.texts):
        names.sort()
    return found


def describe(passed_over: Mapping[str, int]) -> str:
    """How many files there were of each ending, the most first."""
    most = sorted(passed_over.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in most[NAMED_ENDINGS:])
    return ", ".join([f"{n:,} {name}" for name, n in most[:NAMED_ENDINGS]] + ([f"{rest:,} others"] if rest else []))


def _walk(root: str, wrong: type[MMRefError]) -> Found:
    """A folder, first what really lies in it, then what its links lead to."""
    found, top = Found(), os.path.realpath(root)
    seen: set[str] = set()  # folders by their path without links
    folders, links = deque([("", root, top)]), deque[tuple[str, str, str]]()
    while folders or links:
        name, path, real = (folders or links).popleft()
        if real in seen:
            found.passed_over[LINKED] += 1
            continue
        if name and f"{top}/".startswith(f"{real.rstrip('/')}/"):
            found.skip(name, "a link to a folder that holds this one")
            continue
        seen.add(real)
        for entry in _entries(found, name, path, wrong):
            inner = f"{name}{entry.name}"
            if entry.name.startswith("."):
                found.passed_over[HIDDEN] += 1
                continue
            try:
                status = retry(f"look at {entry.path}", entry.stat)
            except FileNotFoundError:
                if entry.is_symlink():  # else it has gone meanwhile
                    found.skip(inner, "a link to nothing")
            except OSError as error:
                found.skip(inner, f"cannot be looked at: {error.strerror}")
            else:
                if not stat.S_ISDIR(status.st_mode):
                    _take(found, inner, entry.path, status)
                elif entry.is_symlink():
                    links.append((f"{inner}/", entry.path, os.path.realpath(entry.path)))
                else:
                    folders.append((f"{inner}/", entry.path, f"{real.rstrip('/')}/{entry.name}"))
    return found


def _entries(found: Found, name: str, path: str, wrong: type[MMRefError]) -> list[os.DirEntry[str]]:
    """Entries of a folder in order; [] for one that is not looked into, which is noted."""

    def listed() -> list[os.DirEntry[str]]:
        with os.scandir(path) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    try:
        entries = retry(f"list {path}", listed)
    except FileNotFoundError:  # gone meanwhile
        return []
    except OSError as error:
        if not name:
            raise wrong(f"{path} cannot be listed: {error.strerror}.") from None
        found.skip(name, f"a folder that cannot be listed: {error.strerror}")
        found.closed.append(path)
        return []
    if name and (ours := _ours(name, {entry.name for entry in entries})):
        found.passed_over[ours] += 1
        return []
    found.folders.append(name)
    return entries


def _ours(name: str, inside: set[str]) -> str:
    """What a folder is that a command of ours wrote or is writing, "" for a user's own."""
    if name.endswith(".partial/") and {LOCK, NEW} <= inside:
        return BEGUN
    return INDEX if {"manifest.json", "segments"} <= inside else SET if {"manifest.json", "objects.parquet"} <= inside else ""


def _take(found: Found, name: str, path: str, status: os.stat_result) -> None:
    if stat.S_ISREG(status.st_mode):
        found.add(name, path, stamp_of(status))
    elif kind_of(ending_of(name)) in ("picture", "unread", "raw"):
        found.skip(name, f"{SPECIAL.get(stat.S_IFMT(status.st_mode), 'something')}, no file")
    else:
        found.passed_over[OTHER] += 1


def stamp_of(status: os.stat_result) -> str:
    """What is another text when a file has changed."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _look_below(root: str, wrong: type[MMRefError]) -> Found:
    """All objects below a URL prefix."""
    found = Found()
    fs, inner = file_system(root)
    try:
        listed: Mapping[str, Any] = retry(f"list {root}", lambda: fs.find(inner, detail=True))
    except StorageError:
        raise
    except Exception as error:  # every file system has its own
        raise wrong(f"{root} cannot be listed: {error}.") from None
    for path, info in listed.items():
        name = path.removeprefix(inner).lstrip("/") or path.rsplit("/", 1)[-1]
        if name.endswith("/"):  # what some stores keep in place of a folder
            continue
        if any(part.startswith(".") for part in name.split("/")):
            found.passed_over[HIDDEN] += 1
        elif info["type"] != "file":
            found.skip(name, f"no file: {info['type']}")
        else:
            changes = next((str(info[key]) for key in CHANGES_WITH if info.get(key) is not None), "")
            found.add(name, path if is_url(path) else fs.unstrip_protocol(path), f"{info.get('size')}-{changes}")
    return found
