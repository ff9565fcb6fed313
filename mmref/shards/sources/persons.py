"""Person retrieval sets annotated in one JSON file: CUHK-PEDES, ICFG-PEDES, RSTPReid, UFine6926; an object is a person.

Each file is a list with an entry an image: its split, the person's number, the image's path below the image folder
(`imgs/` or `images/`, or the root) and its captions. The sets differ in names and in whether they have a val split.
"""

from __future__ import annotations

import errno
import glob
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from mmref.errors import SampleError, SourceError
from mmref.shards.samples import SourceImage, SourceObject, hash_fraction
from mmref.storage.cells import Row
from mmref.storage.locations import read_bytes, size_of
from mmref.storage.texts import read_text

SPLITS = ("train", "val", "test")
IMAGE_FOLDERS = ("imgs", "images", "")  # below the root, in the order in which an image is looked for


@dataclass(frozen=True)
class PersonFormat:
    """How one set names things, and what its publication counts."""

    name: str
    annotations: str  # file name below the root; "*.json": the only one there, whatever its name
    origin: str
    published: Mapping[str, Mapping[str, int]]  # counts by split, which `samples.count_warnings` compares
    path_key: str = "file_path"
    has_val: bool = True
    without_splits: str = ""  # file of the set that has the captions and no splits


CUHK_PEDES = PersonFormat(
    "cuhk_pedes",
    "reid_raw.json",
    "CUHK-PEDES (Li et al., CVPR 2017)",
    {
        "train": {"objects": 11003, "images": 34054, "captions": 68126},
        "val": {"objects": 1000, "images": 3078, "captions": 6158},
        "test": {"objects": 1000, "images": 3074, "captions": 6156},
    },
    without_splits="caption_all.json",
)
ICFG_PEDES = PersonFormat(
    "icfg_pedes",
    "ICFG-PEDES.json",
    "ICFG-PEDES (Ding et al. 2021)",
    {"train+val": {"objects": 3102, "images": 34674}, "test": {"objects": 1000, "images": 19848}},
    has_val=False,
)
RSTPREID = PersonFormat(
    "rstpreid",
    "data_captions.json",
    "RSTPReid (Zhu et al., ACM MM 2021)",
    {
        "train": {"objects": 3701, "images": 18505},
        "val": {"objects": 200, "images": 1000},
        "test": {"objects": 200, "images": 1000},
    },
    path_key="img_path",
)
UFINE6926 = PersonFormat(
    "ufine6926",
    "*.json",
    "UFine6926 (Zuo et al., CVPR 2024)",
    {"train+val+test": {"objects": 6926, "images": 26206, "captions": 52412}},
    has_val=False,
)


class PersonSource:
    """`root`: the folder that holds the annotation file and the images."""

    licence = "research use only; no right to redistribute is known"
    min_images = 1

    def __init__(
        self,
        form: PersonFormat,
        root: str,
        val_fraction: float = 0.05,
        annotations: str | None = None,
        images: str | None = None,
    ) -> None:
        """val_fraction: of the train persons held out as val where the set has none; 0 holds none out.
        annotations: file, where it is not the one of the format.
        images: folder, where it is none of IMAGE_FOLDERS. Raises SourceError."""
        self.form, self.name, self.origin = form, form.name, form.origin
        self.root = os.path.abspath(root)  # workers may run in another directory
        if not 0 <= val_fraction < 1:
            raise SourceError(f"--val-fraction {val_fraction} must be at least 0 and below 1.")
        for option, folder in (("--root", self.root), ("--images", images)):
            if folder and not os.path.isdir(folder):
                raise SourceError(f"{option} {folder} is no folder.")
        self.file = os.path.abspath(annotations) if annotations else self._find()
        if not os.path.isfile(self.file):
            raise SourceError(f"--annotations {self.file} is no file.")
        self.folders = [os.path.abspath(images)] if images else [os.path.join(self.root, name) for name in IMAGE_FOLDERS]
        self.val_fraction = val_fraction
        self.published = form.published
        self.skipped: list[str] = []

    def _find(self) -> str:
        """The annotation file of the format. Raises SourceError where there is none, or more than one."""
        form = self.form
        found = sorted(glob.glob(os.path.join(glob.escape(self.root), form.annotations)))
        if len(found) > 1:
            names = ", ".join(map(os.path.basename, found))
            raise SourceError(
                f"{self.root} has {len(found)} files that may hold the annotations ({names}): name one with --annotations."
            )
        if found:
            return found[0]
        other = form.without_splits if os.path.isfile(os.path.join(self.root, form.without_splits)) else ""
        raise SourceError(
            f"{os.path.join(self.root, form.annotations)} is missing: {form.origin} has {form.annotations} beside its image "
            "folder. Unpack the set and pass its folder with --root, or name the file with --annotations."
            + (f" {other}, which is there, has no splits and cannot take its place." if other else "")
        )

    def objects(self) -> Iterable[SourceObject]:
        """Persons in the order of the file. An entry without a caption is left out when its shard is written.

        A person's id is `<split of the file>-<number>`: a set may number the persons of each split anew.
        Raises SourceError for an entry that is not as the format says, and an image of two persons.
        """
        found: dict[str, SourceObject] = {}
        images: dict[str, SourceImage] = {}
        owner: dict[str, str] = {}
        for number, entry in enumerate(self._read(), 1):
            try:
                split, person, path, captions = self._fields(number, entry)
            except SampleError as error:
                self.skipped.append(f"entry {number}: {error}")
                continue
            object_id = f"{split}-{person}"
            if owner.setdefault(path, object_id) != object_id:
                raise SourceError(
                    f"{self.file}, entry {number}: {path!r} shows the persons {owner[path]} and {object_id}. "
                    "An image belongs to one person of one split."
                )
            item = found.setdefault(object_id, SourceObject(self._split(split, object_id), object_id, []))
            if path not in images:  # a second entry of an image brings more captions of it
                images[path] = SourceImage(path, path, [], [])
                item.images.append(images[path])
            images[path].captions.extend(captions)
            kinds = images[path].caption_kinds
            assert kinds is not None
            kinds.extend(["human"] * len(captions))
        return list(found.values())

    def _split(self, split: str, object_id: str) -> str:
        """The split of the set to build: of the train persons of a set without val, a fixed hash holds some out."""
        if split == "train" and not self.form.has_val and hash_fraction(object_id) < self.val_fraction:
            return "val"
        return split

    def _read(self) -> list[Any]:
        try:
            entries = json.loads(read_text(self.file, SourceError))
        except (ValueError, RecursionError) as error:
            raise SourceError(f"{self.file} cannot be read: {error}. Was the set unpacked completely?") from error
        if not isinstance(entries, list):
            raise SourceError(f"{self.file}: expected a list with an entry an image, found a {type(entries).__name__}.")
        return entries

    def _fields(self, number: int, entry: Any) -> tuple[str, str, str, list[str]]:
        """Split, person's number, image path and captions of an entry. Raises SourceError where it is not as the format says,
        SampleError for a value that is missing or no text."""
        keys = ("split", "id", self.form.path_key, "captions")
        lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if lacking:
            raise SourceError(
                f"{self.file}, entry {number} has no {lacking[0]!r}: {self.form.origin} gives {', '.join(keys)} for every image."
                + (
                    f" ({self.form.without_splits} has no splits: give {self.form.annotations}.)"
                    if self.form.without_splits
                    else ""
                )
            )
        row = Row(number, entry)
        split, person, path = (row.text(key) for key in keys[:3])
        split, path, captions = split.lower(), path.replace("\\", "/"), entry["captions"]
        if split not in SPLITS:
            raise SourceError(f"{self.file}, entry {number}: split {split!r} is none of {', '.join(SPLITS)}.")
        if not isinstance(captions, list):
            raise SourceError(f"{self.file}, entry {number}: captions must be a list, found {captions!r}.")
        if not person or not path:
            raise SampleError(f"no {self.form.path_key if person else 'id'}")
        return split, person, path, row.texts("captions")

    def load(self, ref: str) -> bytes:
        """The photograph's bytes as they are on disk. Raises FileNotFoundError."""
        paths = [os.path.join(folder, ref) for folder in self.folders]
        path = next((path for path in paths if size_of(path) is not None), None)
        if path is None:
            raise FileNotFoundError(
                errno.ENOENT, f"No such file in {', '.join(self.folders)} (--images names another folder)", ref
            )
        return read_bytes(path)

    def write_extras(self, root: str) -> None:
        """Nothing to add: the licence forbids passing the set on."""


cuhk_pedes = partial(PersonSource, CUHK_PEDES)
icfg_pedes = partial(PersonSource, ICFG_PEDES)
rstpreid = partial(PersonSource, RSTPREID)
ufine6926 = partial(PersonSource, UFINE6926)
