"""What is asked of an index, and what is found. Nothing here needs the model or the index: who asks a service has neither."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar

from mmref.errors import QueryError
from mmref.retrieval.columns import to_plain

if TYPE_CHECKING:
    from mmref.export.model import ImageLike

DEFAULT_IMAGES = 3  # of each object


@dataclass(frozen=True)
class Query:
    """What is looked for: a sentence, an image, or both (`image_weight` of the image, the rest of the sentence)."""

    text: str | None = None
    image: ImageLike | None = None
    image_weight: float = 0.5


@dataclass(frozen=True)
class Reference:
    """A training object that a query and an item both resemble."""

    object_id: str
    caption: str  # "" where the training set could not be read when the index was made
    gain: float  # its part of the score that refinement added


@dataclass(frozen=True)
class Result:
    """An item found. Without refinement `score` is `initial` and `rank` is `rank_before`."""

    rank: int  # from 1
    id: str
    score: float
    initial: float  # cosine, the score before refinement
    rank_before: int
    object_id: str | None
    path: str | None  # None: found by a service, which does not tell
    width: int
    height: int
    metadata: dict[str, Any] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)  # the largest gains

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: dates and times are texts."""
        # `asdict` copies every value deeply, which takes ten times as long.
        return vars(self) | {
            "metadata": {name: to_plain(value) for name, value in self.metadata.items()},
            "references": [dict(vars(reference)) for reference in self.references],
        }

    @classmethod
    def of(cls, told: dict[str, Any]) -> Result:
        """The other way round; a path that is not told is None."""
        references = [Reference(**one) for one in told["references"]]
        return cls(**({"path": None} | told | {"references": references}))

    def value(self, column: str) -> Any:
        """Of a column, None where it is missing."""
        own = {"id": self.id, "object_id": self.object_id, "width": self.width, "height": self.height}
        return own[column] if column in own else self.metadata.get(column)


@dataclass(frozen=True)
class ObjectResult:
    """An object found by its best image, whose `score` is the object's. Ranks of objects are among objects."""

    rank: int  # from 1
    object_id: str
    score: float
    initial: float  # the highest cosine of its images that were ranked, the score before refinement
    rank_before: int
    images: list[Result]  # the best of the object, the best first; their ranks are among the object's images

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return vars(self) | {"images": [image.to_dict() for image in self.images]}

    @classmethod
    def of(cls, told: dict[str, Any]) -> ObjectResult:
        """The other way round."""
        return cls(**(told | {"images": [Result.of(image) for image in told["images"]]}))

    def value(self, column: str) -> Any:
        """Of a column, of the best image."""
        return self.images[0].value(column)


@dataclass(frozen=True)
class Answer:
    """What was found for a query, and whether any of it is close (`Searcher.is_close`)."""

    results: Sequence[Result] | Sequence[ObjectResult]
    close_match: bool | None


R = TypeVar("R", Result, ObjectResult)


def whole(name: str, given: SupportsIndex) -> int:
    """An argument that is a number of things. Raises QueryError."""
    try:
        return operator.index(given)
    except TypeError:
        raise QueryError(f"{name} is {given!r:.100}: give a whole number.") from None


def several(name: str, given: Any) -> list[Any]:
    """An argument that is several things: any list, array, column or generator of them. Raises QueryError for a single one, whose
    letters would be taken for them."""
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, str | bytes | os.PathLike) or not isinstance(given, Iterable):
        raise QueryError(f"{name} is {given!r:.100}: give a list, [...], also of a single one.")
    return list(given)


def sort_column(sort: str) -> tuple[str, bool]:
    """The column that "price" or "-price" names, and whether its values fall."""
    return sort.removeprefix("-"), sort.startswith("-")


def sorted_by(results: Sequence[R], sort: str) -> list[R]:
    """Results by a column, of equal values the better first; those without a value come last."""
    column, falling = sort_column(sort)
    known = [one for one in results if one.value(column) is not None]
    missing = [one for one in results if one.value(column) is None]
    return sorted(known, key=lambda one: _key(one.value(column)), reverse=falling) + missing


def _key(value: Any) -> Any:
    return value.casefold() if isinstance(value, str) else value
