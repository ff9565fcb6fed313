"""What the two sets with the captions of Reed et al. (CVPR 2016) share: `text_c10/` and class-split files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from mmref.errors import SourceError
from mmref.shards.samples import hash_fraction, hash_split
from mmref.storage.texts import read_lines

SPLITS = ("train", "val", "test")
HASHED = "; classes split by a hash of their names"
HELD_OUT = "; val: train classes held out, test: the published val classes, without the published test classes"


def read_captions(folder: str, stem: str) -> list[str]:
    """The captions of an image, a line each; none where it has no file. As published, they hold a few bytes that are not UTF-8.

    Raises SourceError."""
    path = os.path.join(folder, f"{stem}.txt")
    if not os.path.exists(path):
        return []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = [line.strip() for line in file.read().splitlines()]
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}. Was the data set unpacked completely?") from error
    return [line for line in lines if line]


def first_folder(name: str, folders: Iterable[str]) -> str:
    """The first of `<folder>/<name>` that is a folder, "" where none is."""
    return next((path for path in (os.path.join(f, name) for f in folders) if os.path.isdir(path)), "")


def class_number(name: str) -> str:
    """What stays of a class that two releases spell differently: `009` of `009.Brewers_Blackbird`, else the whole name."""
    number = name.partition(".")[0]
    return number if number.isdigit() else name


def class_files(folders: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Split -> its class-split file (`trainclasses.txt`, ...), in the first of the folders that has it; and what the manifest
    warns of where there is none. Raises SourceError where there are some, and none of train."""
    folders = list(dict.fromkeys(folders))
    found: dict[str, str] = {}
    for split in SPLITS:
        paths = [os.path.join(folder, f"{split}classes.txt") for folder in folders]
        if path := next(filter(os.path.isfile, paths), ""):
            found[split] = path
    if found and "train" not in found:
        both = next(filter(os.path.isfile, (os.path.join(folder, "trainvalclasses.txt") for folder in folders)), "")
        fix = f" {both} does not say which of its classes are val: write trainclasses.txt and valclasses.txt." if both else ""
        raise SourceError(
            f"There is {', '.join(sorted(os.path.basename(path) for path in found.values()))} but no trainclasses.txt in "
            f"{', '.join(folders)}: no class would be left to train on.{fix}"
        )
    if found:
        return found, []
    return {}, [
        "no trainclasses.txt, valclasses.txt or testclasses.txt, so that a hash of the names splits the classes: this is not the "
        f"published split; looked in {', '.join(folders)}"
    ]


def class_splits(
    classes: Iterable[str],
    files: Mapping[str, str],
    fractions: Mapping[str, float],
    listing: str,
    val_fraction: float = 0,
) -> dict[str, str]:
    """Class name -> split, from the class-split `files` (as of `class_files`); a name may differ where the number is the same.

    A class in no file is left out. Without any file, a fixed hash of the name splits the classes by `fractions`.
    `listing` says where classes are known from.

    With a `val_fraction` the test classes are kept apart, for whoever is still choosing: that share of the train classes
    (those with the lowest hashes) becomes val, the val classes become the split that is reported, `test`, and the test
    classes are left out.

    Raises SourceError for an unknown class, for one in two files, and for a `val_fraction` without class-split files.
    """
    classes = list(classes)
    known = {class_number(name): name for name in classes}
    splits: dict[str, str] = {}
    for split, path in files.items():
        for written in filter(None, read_lines(path, SourceError)):
            name = written if written in classes else known.get(class_number(written))
            if name is None:
                raise SourceError(f"{path} names the class {written!r}, which {listing} does not have.")
            if splits.setdefault(name, split) != split:
                raise SourceError(f"Class {name!r} is in {split}classes.txt and in {splits[name]}classes.txt.")
    if not 0 <= val_fraction < 1:
        raise SourceError(f"--val-fraction {val_fraction} must be at least 0 and below 1.")
    if val_fraction and not {"train", "val"} <= set(splits.values()):
        raise SourceError(
            f"--val-fraction {val_fraction} holds out train classes and reports on val classes: it needs trainclasses.txt and "
            f"valclasses.txt, found {sorted(set(splits.values())) or 'no class-split file'}."
        )
    if val_fraction:
        train = sorted((name for name, split in splits.items() if split == "train"), key=hash_fraction)
        held_out = set(train[: max(1, round(val_fraction * len(train)))])  # a share by number: there are few classes
        renamed = {"train": "train", "val": "test"}
        return {n: "val" if n in held_out else renamed[s] for n, s in splits.items() if s in renamed}
    return splits if files else {name: hash_split(name, fractions) for name in classes}


def held_out_counts(published: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """What is published, for splits made with a `val_fraction`."""
    return {"train+val": {"objects": published["train"]["objects"]}, "test": {"objects": published["val"]["objects"]}}
