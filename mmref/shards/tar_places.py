"""Which tars a user means: paths, URLs, globs, ranges in braces and folders."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence

from mmref.data.manifest import STORAGES, outside
from mmref.errors import SourceError
from mmref.storage.locations import absolute, expanded, file_system, in_utf8, is_url
from mmref.storage.retries import retry
from mmref.storage.secrets import told, without_user

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
PACKED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|zip)$", re.IGNORECASE)
WILD = re.compile(r"[*?\[]")


def find_tars(given: Sequence[str]) -> list[str]:
    """Paths (whole) and URLs of the tars that are meant, each file once, in the order in which they are given; those of one glob
    or folder by name.

    Raises SourceError for what names no tar, a packed one, or a folder that holds its tars in folders; PathError for a name that
    is no UTF-8.
    """
    by_file: dict[str, str] = {}  # a link is the tar that it leads to
    for text in given:
        # A path that is there is meant as it stands, as in `_tars_of`.
        is_there = not is_url(text) and os.path.lexists(expanded(text))
        for place in [text] if is_there else _expand_braces(text):
            for tar in _tars_of(place):
                by_file.setdefault(tar if is_url(tar) else os.path.realpath(tar), tar)
    found = list(by_file.values())
    for place in found:
        in_utf8(place)
        if is_url(place) and (why := outside(place)):
            raise SourceError(f"{why}: name a .tar on {', '.join(STORAGES)}.")
    return found


def _expand_braces(text: str) -> Iterator[str]:
    """`{000..999}` and `{a,b}`, as a shell expands them without quotes."""
    match = BRACES.search(text)
    if match is None:
        yield text
        return
    inner = match[1]
    if span := RANGE.fullmatch(inner):
        first, last = int(span[1]), int(span[2])
        width = max(len(span[1]), len(span[2])) if span[1].startswith("0") or span[2].startswith("0") else 0
        parts = [f"{number:0{width}d}" for number in range(first, last + 1)]
    else:
        parts = inner.split(",")
    if len(parts) < 1 or (len(parts) == 1 and not RANGE.fullmatch(inner)):
        raise SourceError(f"{text}: {{{inner}}} is no range such as {{00000..00999}}, and no list such as {{a,b}}.")
    for part, rest in itertools.product(parts, _expand_braces(text[match.end() :])):
        yield text[: match.start()] + part + rest


def _tars_of(given: str) -> list[str]:
    if packed := PACKED.search(given):
        raise SourceError(
            f"{told(given)} is packed ({packed[0]}), so no sample in it can be read alone. Unpack it to a plain .tar (of "
            ".tar.gz: `gunzip`), and name that."
        )
    if is_url(given):
        return _tars_of_url(given)
    place = absolute(expanded(given))
    if os.path.isdir(place):
        return _tars_of_folder(place, sorted(os.listdir(place)))
    if not os.path.lexists(place) and WILD.search(place):
        return _tars_of_glob(given, sorted(glob.glob(place, recursive=True)))
    if not os.path.isfile(place):
        raise SourceError(f"{place}: there is no such tar.")
    if not place.endswith(".tar"):
        raise SourceError(f"{place} is not called .tar: name tars of WebDataset, or a folder of them.")
    return [place]


def _tars_of_url(given: str) -> list[str]:
    if given.partition("?")[0].endswith(".tar") and not WILD.search(given.partition("?")[0]):
        return [given]
    if given.startswith(("http://", "https://")):
        raise SourceError(
            f"{told(given)}: over http tars cannot be listed. Give each by its URL, or a range: .../{{00000..00999}}.tar"
        )
    fs, inner = file_system(given)
    if WILD.search(given):
        return _tars_of_glob(given, sorted(fs.unstrip_protocol(path) for path in retry(f"list {given}", lambda: fs.glob(inner))))
    names = [path.rstrip("/").rsplit("/", 1)[-1] for path in retry(f"list {given}", lambda: fs.ls(inner, detail=False))]
    return _tars_of_folder(given.rstrip("/"), sorted(names))


def _tars_of_glob(given: str, matches: list[str]) -> list[str]:
    tars = [match for match in matches if match.endswith(".tar")]
    if not tars:
        what = f"matches {matches[0]} and {len(matches) - 1} others, none of which is a .tar" if matches else "matches nothing"
        raise SourceError(f"{given} {what}.{_packed_hint(matches)}")
    return tars


def _tars_of_folder(folder: str, names: list[str]) -> list[str]:
    tars = [name for name in names if name.endswith(".tar")]
    if tars:
        return [f"{folder}/{name}" for name in tars]
    hint = _packed_hint(names)
    if not hint and not is_url(folder):
        inside = [name for name in names if os.path.isdir(os.path.join(folder, name))]
        below = next((name for name in inside if any(n.endswith(".tar") for n in os.listdir(os.path.join(folder, name)))), None)
        hint = f" Its folders do, {below} for one: give '{folder}/*/*.tar'." if below is not None else hint
        hint = hint or " Images in folders, and tables of them, are for `mmref shards build`."
    raise SourceError(f"{folder} holds no .tar.{hint}")


def _packed_hint(names: list[str]) -> str:
    packed = next((name for name in names if PACKED.search(name)), None)
    return f" {packed} is packed: unpack such files to plain .tar (of .tar.gz: `gunzip`)." if packed is not None else ""


def labels(tars: Sequence[str]) -> list[str]:
    """A short name for each tar, its own: the ends of the paths, without `.tar`, with as many folders as tell them apart."""
    parts = [without_user(place).partition("?")[0].removesuffix(".tar").split("/") for place in tars]
    for depth in range(1, max(len(part) for part in parts) + 1):
        found = ["/".join(part[-depth:]) for part in parts]
        if len(set(found)) == len(found):
            return found
    raise SourceError(f"Two tars have one path and other parameters behind the `?`: {told(tars[0])} ...; give each once.")
