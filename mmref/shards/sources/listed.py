"""What sources have in common that list images at their places: objects of images, splits, the bytes of one image.

`mmref index` takes the same listings: it needs neither objects nor captions, and takes them where they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmref.errors import SourceError
from mmref.shards.samples import DEFAULT_FRACTIONS, SourceImage, SourceObject, can_name_split, common_split, hash_split
from mmref.storage.image_places import Place, read_place


@dataclass
class ListedImage:
    """An image of a source. object_id None: it is not known, split None: the source has none."""

    image_id: str
    place: Place
    captions: list[str] = field(default_factory=list)
    object_id: str | None = None
    split: str | None = None
    caption_kinds: list[str] | None = None  # parallel to captions
    extra: dict[str, Any] = field(default_factory=dict)


class ListedSource(ABC):
    """A `Source` that lists images. Of a subclass `images` is all that differs.

    Args:
        name: of the source on the command line.
        origin: where the data comes from, for the manifest.
        fractions: of the objects in each split, where there is none.
        resplit: leave the source's own splits aside.
    """

    def __init__(
        self,
        name: str,
        origin: str,
        licence: str = "not stated",
        min_images: int = 1,
        fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
        resplit: bool = False,
    ) -> None:
        self.name, self.origin, self.licence, self.min_images = name, origin, licence, min_images
        self.fractions, self.resplit = dict(fractions), resplit
        self.skipped: list[str] = []
        self.warnings: list[str] = []
        # What an index tells of a source besides.
        self.left_out: list[tuple[str, str]] = []  # what it was (a row, a file), and why
        self.stamps: dict[str, str] = {}  # of image ids: what changes with the file, where listing it has told
        self.passed_over: Counter[str] = Counter()  # files that are no images, by ending
        self.closed: list[str] = []  # folders that could not be looked into
        self.regular = True  # object ids are plainly meant as such
        self.told_objects: set[str] = set()  # object ids that a table says, not a folder
        self.columns_left: dict[str, str] = {}  # columns that were not taken, and why
        self.infinite: Counter[str] = Counter()  # infinite numbers of each column, which are kept as missing

    @abstractmethod
    def images(self) -> Iterable[ListedImage]:
        """Each image once, with an id of its own. What cannot be taken is left out by `leave_out`. Raises SourceError."""

    def leave_out(self, what: str, why: str) -> None:
        """List what is not taken: for a build, which takes it over, and for an index."""
        self.skipped.append(f"{what}: {why}")
        self.left_out.append((what, why))

    def objects(self) -> Iterable[SourceObject]:
        """Objects in the order of their first images; an image whose object is not known is one by itself. Raises SourceError
        for an object in two splits, and as `images`."""
        objects: dict[str, SourceObject] = {}
        alone = 0
        for image in self.images():
            object_id = image.image_id if image.object_id is None else image.object_id
            alone += image.object_id is None
            own = None if self.resplit else image.split
            split = hash_split(object_id, self.fractions) if own is None else own
            item = objects.setdefault(object_id, SourceObject(split, object_id, []))
            if item.split != split:
                raise SourceError(
                    f"{self.origin}: object {object_id!r} is in {item.split!r} and in {split!r}. Splits are by object, or a "
                    "model would be tested on what it was trained on: --resplit divides the objects anew, by --fractions."
                )
            known = image.image_id, image.place, image.captions, image.caption_kinds, image.extra
            item.images.append(SourceImage(*known))
        if alone:
            self.warnings.append(f"{alone:,} images have no object id: each is an object of its own")
        return list(objects.values())

    def load(self, ref: Place) -> bytes:
        """Encoded bytes of an image. Raises OSError or SampleError, which leave it out of the set."""
        return read_place(ref)

    def write_extras(self, root: str) -> None:  # noqa: B027 -- a subclass may have some
        """Nothing to add."""


def split_name(given: str) -> str:
    """The name of a split as it is here: `validation` is val. Raises SourceError for what cannot be a folder."""
    name = common_split(given.strip())
    if not can_name_split(name):
        raise SourceError(f"{given!r} cannot name a split: letters, digits, - and _ can.")
    return name
