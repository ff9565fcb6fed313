"""CUB-200-2011 in its native layout, with the ten captions an image of Reed et al. (CVPR 2016); an object is a species.

Expected below `path`: `CUB_200_2011/{images/, images.txt, image_class_labels.txt, classes.txt}` and
`text_c10/<class>/<image>.txt` (a caption a line). Class-split files (`trainclasses.txt`, `valclasses.txt`,
`testclasses.txt`, one class name a line) lie in any of these folders; without any, a fixed hash splits the classes.

The captions' release and CUB's own spell 17 species differently (`009.Brewers_Blackbird`, `009.Brewer_Blackbird`): classes
are known by their number, and images of a class by the two numbers at the end of their name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from mmref.errors import SourceError
from mmref.shards.samples import DEFAULT_FRACTIONS, SourceImage, SourceObject
from mmref.shards.sources.reed import (
    HASHED,
    HELD_OUT,
    class_files,
    class_number,
    class_splits,
    first_folder,
    held_out_counts,
    read_captions,
)
from mmref.storage.locations import read_bytes
from mmref.storage.texts import read_lines


class CubSource:
    """`path`: the folder that holds CUB_200_2011/ and text_c10/ (or a folder with it), or CUB_200_2011/ with text_c10/ in or
    beside it."""

    name = "cub"
    licence = "research use only; no right to redistribute is known"
    origin = "Caltech-UCSD Birds-200-2011 (Wah et al. 2011) with text_c10 captions (Reed et al. 2016)"
    min_images = 1
    published: Mapping[str, Mapping[str, int]] = {
        "train": {"objects": 100}, "val": {"objects": 50}, "test": {"objects": 50},
        "train+val+test": {"objects": 200, "images": 11788},
    }  # fmt: skip

    def __init__(self, path: str, fractions: Mapping[str, float] = DEFAULT_FRACTIONS, val_fraction: float = 0.0) -> None:
        """fractions: of classes in each split, only used when there are no class-split files; val_fraction: of the train
        classes, held out as val (`reed.class_splits`). Raises SourceError."""
        path = os.path.abspath(path)  # workers may run in another directory
        if os.path.isfile(path):
            raise SourceError(f"{path} is a file. Unpack it (`tar -xf {path}`) and pass the folder.")
        nested = os.path.join(path, "CUB_200_2011")
        self.folder = nested if os.path.isdir(nested) else path
        below = sorted(e.path for e in os.scandir(path) if e.is_dir()) if os.path.isdir(nested) else []
        folders = [self.folder, path, os.path.dirname(self.folder), *below]
        self.text = first_folder("text_c10", folders)
        if not os.path.isdir(os.path.join(self.folder, "images")) or not self.text:
            lacking = "text_c10/" if os.path.isdir(os.path.join(self.folder, "images")) else "CUB_200_2011/images/"
            raise SourceError(
                f"{path} is not CUB-200-2011 in its native layout: {lacking} is missing. Expected "
                "CUB_200_2011/images/, CUB_200_2011/images.txt and text_c10/<class>/<image>.txt."
            )
        self.fractions, self.val_fraction = dict(fractions), val_fraction
        if val_fraction:
            self.origin, self.published = self.origin + HELD_OUT, held_out_counts(self.published)
        self.class_files, self.warnings = class_files([*folders, self.text])
        self.origin += HASHED if self.warnings else ""
        self.caption_folders = {class_number(entry.name): entry.path for entry in os.scandir(self.text) if entry.is_dir()}
        self.skipped: list[str] = []

    def _pairs(self, name: str) -> dict[str, str]:
        """`<id> <value>` lines of a CUB text file."""
        path = os.path.join(self.folder, name)
        found = {}
        for number, line in enumerate(read_lines(path, SourceError), 1):
            if not line:
                continue
            parts = line.split(maxsplit=1)
            if len(parts) != 2:
                raise SourceError(f"{path}, line {number}: expected `<id> <value>`, found {line!r}.")
            found[parts[0]] = parts[1]
        return found

    def objects(self) -> Iterable[SourceObject]:
        """Species in the order of classes.txt. An image without captions is left out when its shard is written."""
        classes = self._pairs("classes.txt")
        splits = class_splits(classes.values(), self.class_files, self.fractions, "classes.txt", self.val_fraction)
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
        captions = self._captions(*stem.split("/", 1)) if "/" in stem else []
        return SourceImage(stem, name, captions, ["human"] * len(captions))

    def _captions(self, class_name: str, image: str) -> list[str]:
        folder = self.caption_folders.get(class_number(class_name), "")
        if not folder or os.path.isfile(os.path.join(folder, f"{image}.txt")):
            return read_captions(folder, image)
        numbers = image.split("_")[-2:]
        same = [file for file in os.listdir(folder) if file.removesuffix(".txt").split("_")[-2:] == numbers]
        return read_captions(folder, same[0].removesuffix(".txt")) if len(same) == 1 else []

    def load(self, ref: str) -> bytes:
        """The photograph's bytes as they are on disk."""
        return read_bytes(os.path.join(self.folder, "images", ref))

    def write_extras(self, root: str) -> None:
        """Nothing to add: the licence forbids passing the set on."""
