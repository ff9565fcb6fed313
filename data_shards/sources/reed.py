"""What the two sets with the captions of Reed et al. (CVPR 2016) share: `text_c10/` and class-split files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from data_shards.samples import hash_split
from mmref.errors import SourceError

SPLITS = ("train", "val", "test")


def read_lines(path: str) -> list[str]:
    """Lines without white space at the ends. The captions hold a few bytes that are not UTF-8. Raises SourceError."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [line.strip() for line in file.read().splitlines()]
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}. Was the data set unpacked completely?") from error


def read_captions(folder: str, stem: str) -> list[str]:
    """The captions of an image, a line each; none where it has no file."""
    path = os.path.join(folder, f"{stem}.txt")
    return [line for line in read_lines(path) if line] if os.path.exists(path) else []


def first_folder(name: str, folders: Iterable[str]) -> str:
    """The first of `<folder>/<name>` that is a folder, "" where none is."""
    return next((path for path in (os.path.join(f, name) for f in folders) if os.path.isdir(path)), "")


def class_splits(
    classes: Iterable[str], folders: Iterable[str], fractions: Mapping[str, float], listing: str
) -> dict[str, str]:
    """Class name -> split, from `trainclasses.txt`, `valclasses.txt`, `testclasses.txt` in any of the folders.

    A class in no file is left out. Without any file, a fixed hash of the name splits the classes by `fractions`.
    `listing` says where classes are known from. Raises SourceError for an unknown class and for one in two files.
    """
    classes, folders = list(classes), list(folders)
    splits: dict[str, str] = {}
    found = False
    for split in SPLITS:
        paths = [os.path.join(folder, f"{split}classes.txt") for folder in folders]
        path = next((p for p in paths if os.path.isfile(p)), None)
        found |= path is not None
        for name in read_lines(path) if path else ():
            if name not in classes:
                raise SourceError(f"{path} names the class {name!r}, which {listing} does not have.")
            if splits.setdefault(name, split) != split:
                raise SourceError(f"Class {name!r} is in {split}classes.txt and in {splits[name]}classes.txt.")
    return splits if found else {name: hash_split(name, fractions) for name in classes}
