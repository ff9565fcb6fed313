"""Files that one text names: a file itself, those that a glob matches, or those of a folder."""

from __future__ import annotations

import glob
import itertools
import os

from mmref.storage.locations import file_system, is_folder, is_url, size_of
from mmref.storage.retries import retry
from mmref.storage.secrets import told


def is_glob(place: str) -> bool:
    """Whether a place is a pattern; a file of that very name is none."""
    return glob.has_magic(place) and not (is_url(place) or os.path.lexists(place))


def folder_of(place: str, endings: tuple[str, ...]) -> str:
    """The folder below which all files lie that `matching_files` finds. It does not depend on what is there yet, but for a folder
    whose name ends as a file's does: of a pattern it is what stands before the first wildcard."""
    if not glob.has_magic(place) or os.path.isdir(place):
        return place.rpartition("/")[0] if place.lower().endswith(endings) and not is_folder(place) else place
    return "/".join(itertools.takewhile(lambda part: not glob.has_magic(part), place.split("/")))


def matching_files(place: str, endings: tuple[str, ...]) -> list[str]:
    """Files with some endings that a place names: itself, those that it matches, or those below the folder that it is, without
    hidden ones; in the order of their names. A folder may have such a name, too, as Spark and Dask give it to what they write.

    Raises StorageError, FileSystemMissingError.
    """
    if place.lower().endswith(endings) and not glob.has_magic(place) and not is_folder(place):
        return [place] if is_url(place) or os.path.isfile(place) else []
    if is_url(place):
        return _of_url(place, endings)
    if os.path.isfile(place):
        return []
    folder = os.path.isdir(place)
    pattern = os.path.join(glob.escape(place), "**") if folder else place
    found = [path for path in glob.glob(pattern, recursive=True) if path.lower().endswith(endings)]
    files = {path for path in found if os.path.isfile(path)}
    if not folder:
        files.update(*(matching_files(path, endings) for path in found if os.path.isdir(path)))
    return sorted(files)


def _of_url(place: str, endings: tuple[str, ...]) -> list[str]:
    if not glob.has_magic(place) and size_of(place) is not None:
        return []
    fs, inner = file_system(place)

    def look() -> set[str]:
        """Files below the folder, or of the pattern and below the folders that it matches."""
        if not glob.has_magic(inner):
            return set(fs.find(inner))
        found = fs.glob(inner, detail=True)
        folders = {path for path, about in found.items() if about["type"] == "directory"}
        return (found.keys() - folders).union(*(fs.find(path) for path in folders if path.lower().endswith(endings)))

    try:
        found = retry(f"list {told(place)}", look)
    except FileNotFoundError:
        return []
    names = [path for path in found if path.lower().endswith(endings) and "/." not in path.removeprefix(inner)]
    return sorted(path if is_url(path) else fs.unstrip_protocol(path) for path in names)
