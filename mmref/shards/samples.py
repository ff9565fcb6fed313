"""What a source yields, how keys are escaped, and the fixed-hash split: the contract between sources and builder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import quote, unquote

from mmref.errors import SampleError, SourceError

RESERVED = ("object_id", "image_id", "captions", "caption_kinds")  # fields of a sample that a set writes itself
SPLIT_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}
WITHOUT = {  # of each split what a set that lacks it cannot give
    "train": "nothing can be trained on it",
    "val": "no checkpoint or refinement can be chosen by it",
    "test": "the numbers that are reported have no split of their own",
}
DEFAULT_FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}  # of the objects, where a source does not split itself


@dataclass(frozen=True)
class SourceImage:
    """One image. `ref` is whatever the source's `load` turns into encoded bytes: a path, a URL, a pair of names."""

    image_id: str
    ref: Any
    captions: list[str]
    caption_kinds: list[str] | None = None  # parallel to captions
    extra: dict[str, Any] = field(default_factory=dict)  # goes into the sample's json


@dataclass(frozen=True)
class SourceObject:
    """One object of one split with all of its images."""

    split: str
    object_id: str
    images: list[SourceImage]


class Source(Protocol):
    """A dataset. Instances are pickled to workers, so keep them small; `load` runs there, in parallel."""

    name: str
    licence: str
    origin: str  # where the data comes from, for the manifest
    min_images: int  # an object with fewer usable images is left out
    skipped: list[str]  # "what: reason" of input that `objects` had to leave out
    # A source whose images take a while to come gives `at_once`, how many `load` may be called for at a time, `waits(ref)`,
    # whether one of them is such an image, and `share(processes, folder)`, the same source for one of so many processes,
    # with a folder for what is kept until the set is complete.
    # Optional are `published`, what the set's publication counts (see `count_warnings`); `warnings`, lines for the
    # manifest; and `extras` of the class, the names that `write_extras` writes, so that a set of another source in its
    # place leaves none of them. A source that has `scratch` is given the path of a folder there, for what it keeps while the
    # set is built.

    def objects(self) -> Iterable[SourceObject]:
        """Each object once. Raises SourceError when the layout is not the expected one."""

    def load(self, ref: Any) -> bytes:
        """Encoded image (jpg, png, webp, ...). Raises SampleError or OSError: the image is listed and skipped."""

    def write_extras(self, root: str) -> None:
        """Writes files that belong to the set (licences, read-me) before its manifest."""


def check_kept(keep: Iterable[str], object_id: str = "") -> None:
    """Raise SourceError for a column to keep whose name a sample has for a field of the set's own; the objects' column may be
    kept, as what it is."""
    if lost := [name for name in keep if name in RESERVED and name != object_id]:
        raise SourceError(
            f"--keep {lost[0]}: a sample has a field of that name already, of the set's own: rename the column to keep it."
        )


def common_split(given: str) -> str:
    """The name that a split has here: `Validation` is val."""
    name = given.lower()
    return SPLIT_NAMES.get(name, name)


def can_name_split(name: str) -> bool:
    """Whether a name can be that of a split, which becomes a folder."""
    return name.replace("_", "").replace("-", "").isalnum()


def cell_split(given: str, where: str) -> str:
    """The split that a row or sample says, with the name that it has here. Raises SampleError, which says `where` it stands, for
    what cannot name one."""
    name = common_split(given)
    if not can_name_split(name):
        raise SampleError(f"{name!r:.80} ({where}) cannot name a split")
    return name


def escape_key(text: str) -> str:
    """WebDataset key for an id: no dot (a key ends at its first dot), no slash, ASCII. `unescape_key` reverses it."""
    return quote(text, safe="").replace(".", "%2E").replace("~", "%7E")


def unescape_key(key: str) -> str:
    """Inverse of `escape_key`."""
    return unquote(key)


def hash_fraction(text: str) -> float:
    """A fixed number in [0, 1) for an id: the first 8 bytes of its sha256."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def hash_split(object_id: str, fractions: Mapping[str, float]) -> str:
    """Split of an object by its id alone: adding or removing other objects moves nothing. Fractions sum to 1."""
    position, edge = hash_fraction(object_id), 0.0
    for split, fraction in fractions.items():
        edge += fraction
        if position < edge:
            return split
    return list(fractions)[-1]  # the sum may fall short of 1 by rounding


def split_warnings(splits: Iterable[str]) -> list[str]:
    """A line where a set lacks one of train, val and test: they are called otherwise, or there are too few objects."""
    there = list(splits)
    if not (missing := [name for name in WITHOUT if name not in there]):
        return []
    lacks = "; ".join(f"no {name}: {WITHOUT[name]}" for name in missing)
    return [f"the set has the split{'s' if len(there) > 1 else ''} {', '.join(there)} alone ({lacks})"]


def count_warnings(source: Source, splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for every count of a built set's splits that is not what the set's publication says.

    A source may have `published`: {split: {"objects" | "images" | "captions": number}}; `train+val` is the sum of the two.
    """
    lines = []
    for names, counts in getattr(source, "published", {}).items():
        for what, expected in counts.items():
            found = sum(splits[name][what] for name in names.split("+") if name in splits)
            if found != expected:
                lines.append(f"{names}: {found:,} {what}, the publication has {expected:,}")
    return lines
