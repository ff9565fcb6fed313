"""CUB-200-2011 in its native layout, with the ten captions an image of Reed et al. (CVPR 2016); an object is a species.

Expected below `path`: `CUB_200_2011/{images/, images.txt, image_class_labels.txt, classes.txt}` and
`text_c10/<class>/<image>.txt` (a caption a line). Class-split files (`trainclasses.txt`, `valclasses.txt`,
`testclasses.txt`, one class name a line) lie in any of these folders; without any, a fixed hash splits the classes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from data_shards.samples import DEFAULT_FRACTIONS, SourceImage, SourceObject, hash_split
from mmref.errors import SourceError

SPLITS = ("train", "val", "test")


class CubSource:
    """`path`: the folder that holds CUB_200_2011/ and text_c10/, or CUB_200_2011/ with text_c10/ in or beside it."""

    name = "cub"
    licence = "research use only; no right to redistribute is known"
    origin = "Caltech-UCSD Birds-200-2011 (Wah et al. 2011) with text_c10 captions (Reed et al. 2016)"
    min_images = 1

    def __init__(self, path: str, fractions: Mapping[str, float] = DEFAULT_FRACTIONS) -> None:
        """fractions: of classes in each split, only used when there are no class-split files. Raises SourceError."""
        path = os.path.abspath(path)  # workers may run in another directory
        if os.path.isfile(path):
            raise SourceError(f"{path} is a file. Unpack it (`tar -xf {path}`) and pass the folder.")
        nested = os.path.join(path, "CUB_200_2011")
        self.folder = nested if os.path.isdir(nested) else path
        self.text = next((t for t in self._beside("text_c10", path) if os.path.isdir(t)), "")
        if not os.path.isdir(os.path.join(self.folder, "images")) or not self.text:
            lacking = "text_c10/" if os.path.isdir(os.path.join(self.folder, "images")) else "CUB_200_2011/images/"
            raise SourceError(
                f"{path} is not CUB-200-2011 in its native layout: {lacking} is missing. Expected "
                "CUB_200_2011/images/, CUB_200_2011/images.txt and text_c10/<class>/<image>.txt."
            )
        self.path, self.fractions = path, dict(fractions)
        self.skipped: list[str] = []

    def _beside(self, name: str, path: str) -> list[str]:
        return [os.path.join(folder, name) for folder in (self.folder, path, os.path.dirname(self.folder))]

    def _pairs(self, name: str) -> dict[str, str]:
        """`<id> <value>` lines of a CUB text file."""
        path = os.path.join(self.folder, name)
        found = {}
        for number, line in enumerate(_lines(path), 1):
            parts = line.split(maxsplit=1)
            if len(parts) != 2:
                raise SourceError(f"{path}, line {number}: expected `<id> <value>`, found {line!r}.")
            found[parts[0]] = parts[1]
        return found

    def _class_splits(self, classes: Iterable[str]) -> dict[str, str]:
        """Class name -> split, from the split files or the hash. A class in no file is left out, in two an error."""
        classes = list(classes)
        splits: dict[str, str] = {}
        files = {
            split: next((f for f in self._beside(f"{split}classes.txt", self.path) if os.path.isfile(f)), None)
            for split in SPLITS
        }
        for split, path in files.items():
            for name in _lines(path) if path else ():
                if name not in classes:
                    raise SourceError(f"{path} names the class {name!r}, which classes.txt does not have.")
                if splits.setdefault(name, split) != split:
                    raise SourceError(f"Class {name!r} is in {split}classes.txt and in {splits[name]}classes.txt.")
        if not any(files.values()):
            return {name: hash_split(name, self.fractions) for name in classes}
        return splits

    def objects(self) -> Iterable[SourceObject]:
        """Species in the order of classes.txt. An image without captions is left out when its shard is written."""
        classes = self._pairs("classes.txt")
        splits = self._class_splits(classes.values())
        labels = self._pairs("image_class_labels.txt")
        images: dict[str, list[SourceImage]] = {}
        for number, name in self._pairs("images.txt").items():
            if classes.get(labels.get(number, "")) is None:
                self.skipped.append(f"{name}: image_class_labels.txt gives it no class of classes.txt")
            elif classes[labels[number]] in splits:
                images.setdefault(classes[labels[number]], []).append(self._image(name))
        return [SourceObject(splits[name], name, found) for name, found in images.items()]

    def _image(self, name: str) -> SourceImage:
        stem = os.path.splitext(name)[0]
        path = os.path.join(self.text, f"{stem}.txt")
        captions = [line for line in _lines(path) if line] if os.path.exists(path) else []
        return SourceImage(stem, name, captions, ["human"] * len(captions))

    def load(self, ref: str) -> bytes:
        """The photograph's bytes as they are on disk."""
        with open(os.path.join(self.folder, "images", ref), "rb") as file:
            return file.read()

    def write_extras(self, root: str) -> None:
        """Nothing to add: the licence forbids passing the set on."""


def _lines(path: str) -> list[str]:
    """Lines without white space at the ends. The captions hold a few bytes that are not UTF-8. Raises SourceError."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [line.strip() for line in file.read().splitlines()]
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error}. Was the data set unpacked completely?") from error
