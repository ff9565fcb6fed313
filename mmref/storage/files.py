"""Files that one text names: a file itself, those that a glob matches, or those of a folder."""

from __future__ import annotations

import glob
import itertools
import os

from mmref.storage.locations import file_system, is_url, size_of
from mmref.storage.retries import retry


def is_glob(place: str) -> bool:
    """Whether a place is a pattern; a file of that very name is none."""
    return glob.has_magic(place) and not (is_url(place) or os.path.lexists(place))


def folder_of(place: str, endings: tuple[str, ...]) -> str:
    """The folder below which all files lie that `matching_files` finds. It does not depend on what is there yet: of a pattern it
    is what stands before the first wildcard."""
    if not glob.has_magic(place) or os.path.isdir(place):
        return place.rpartition("/")[0] if place.lower().endswith(endings) and not os.path.isdir(place) else place
    return "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), place.split("/")))


def matching_files(place: str, endings: tuple[str, ...]) -> list[str]:
    """Files with some endings that a place names: itself, those that it matches, or those below the folder that it is, without
    hidden ones; in the order of their names.

    Raises StorageError, FileSystemMissingError.
    """
    if place.lower().endswith(endings) and not glob.has_magic(place):
        return [place] if is_url(place) or os.path.isfile(place) else []
    if is_url(place):
        return _of_url(place, endings)
    if os.path.isfile(place):
        return []
    root = place if os.path.isdir(place) else ""
    pattern = os.path.join(glob.escape(root), "**") if root else place
    found = [path for path in glob.glob(pattern, recursive=True) if path.lower().endswith(endings) and os.path.isfile(path)]
    return sorted(found)


def _of_url(place: str, endings: tuple[str, ...]) -> list[str]:
    if not glob.has_magic(place) and size_of(place) is not None:
        return []
    fs, inner = file_system(place)
    try:
        found = retry(f"list {place}", lambda: fs.glob(inner) if glob.has_magic(inner) else fs.find(inner))
    except FileNotFoundError:
        return []
    names = [path for path in found if path.lower().endswith(endings) and "/." not in path.removeprefix(inner)]
    return sorted(path if is_url(path) else fs.unstrip_protocol(path) for path in names)
