"""Oxford Flowers-102 with the ten captions an image of Reed et al. (CVPR 2016); an object is a species.

Expected below `root`: `jpg/image_NNNNN.jpg` and `text_c10/class_NNNNN/image_NNNNN.txt` (a caption a line); an image's class is
the folder of its captions. Class-split files (`trainclasses.txt`, `valclasses.txt`, `testclasses.txt`, one class name a line)
lie beside them; without any, a fixed hash splits the classes.
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
    class_splits,
    first_folder,
    held_out_counts,
    read_captions,
)
from mmref.storage.locations import read_bytes


class FlowersSource:
    """`root`: the folder that holds jpg/ and text_c10/; either may also lie one folder further down or up."""

    name = "flowers"
    licence = "research use only; no right to redistribute is known"
    origin = "Oxford Flowers-102 (Nilsback and Zisserman 2008) with text_c10 captions (Reed et al. 2016)"
    min_images = 1
    published: Mapping[str, Mapping[str, int]] = {
        "train": {"objects": 62}, "val": {"objects": 20}, "test": {"objects": 20},
        "train+val+test": {"objects": 102, "images": 8189},
    }  # fmt: skip

    def __init__(self, root: str, fractions: Mapping[str, float] = DEFAULT_FRACTIONS, val_fraction: float = 0.0) -> None:
        """fractions: of classes in each split, only used when there are no class-split files; val_fraction: of the train
        classes, held out as val (`reed.class_splits`). Raises SourceError."""
        root = os.path.abspath(root)  # workers may run in another directory
        below = sorted(entry.path for entry in os.scandir(root) if entry.is_dir()) if os.path.isdir(root) else []
        folders = [root, *below, os.path.dirname(root)]
        self.images, self.text = first_folder("jpg", folders), first_folder("text_c10", folders)
        if not self.images or not self.text:
            raise SourceError(
                f"{root} is not Oxford Flowers-102 with captions: {'text_c10' if self.images else 'jpg'}/ is missing. Expected "
                "jpg/image_NNNNN.jpg and text_c10/class_NNNNN/image_NNNNN.txt."
            )
        self.fractions, self.val_fraction = dict(fractions), val_fraction
        if val_fraction:
            self.origin, self.published = self.origin + HELD_OUT, held_out_counts(self.published)
        self.class_files, self.warnings = class_files([*folders, self.text])
        self.origin += HASHED if self.warnings else ""
        self.files = {os.path.splitext(file)[0]: file for file in sorted(os.listdir(self.images))}
        self.skipped: list[str] = []

    def objects(self) -> Iterable[SourceObject]:
        """Species in the order of their folders. Images without captions belong to no class and are listed as left out."""
        classes = sorted(entry.name for entry in os.scandir(self.text) if entry.is_dir())
        splits = class_splits(classes, self.class_files, self.fractions, "text_c10/", self.val_fraction)
        known: set[str] = set()
        for name in classes:
            folder = os.path.join(self.text, name)
            stems = sorted(file.removesuffix(".txt") for file in os.listdir(folder) if file.endswith(".txt"))
            known.update(stems)
            if name in splits:
                images = [self._image(folder, stem) for stem in stems]
                yield SourceObject(splits[name], name, images)
        stray = [file for stem, file in self.files.items() if stem not in known and file.lower().endswith(".jpg")]
        self.skipped += [f"{file}: no captions in any class of text_c10/" for file in stray]

    def _image(self, folder: str, stem: str) -> SourceImage:
        captions = read_captions(folder, stem)
        return SourceImage(stem, self.files.get(stem, f"{stem}.jpg"), captions, ["human"] * len(captions))

    def load(self, ref: str) -> bytes:
        """The photograph's bytes as they are on disk."""
        return read_bytes(os.path.join(self.images, ref))

    def write_extras(self, root: str) -> None:
        """Nothing to add: the licence forbids passing the set on."""
