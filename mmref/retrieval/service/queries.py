"""What may be asked: parameters, JSON and images, checked against the limits before anything is built from them."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import re
from collections import Counter
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mmref.retrieval.searcher import DEFAULT_IMAGES
from mmref.retrieval.service.answering import Ask
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.problems import Problem, Refused, refuse

EXPLAINED = "GET /openapi.json describes every request."
MOST_IMAGES = 20  # of an object
SHOWN = 3  # things that are wrong, of all that may be
# This matches an image in JSON as far as its first letter. Base64 has no quotes, so the image ends at the next one.
IMAGE = re.compile(rb'"image"[ \t\r\n]*:[ \t\r\n]*"')


class SearchQuery(BaseModel):
    """What to search for, and how."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(None, description="A sentence.")
    index: str | None = Field(None, description="Name of an index; the first one where it is left out.")
    by: Literal["image", "object"] = Field(
        "image", description="What the results are: images, or objects, each by its best image."
    )
    top: int = Field(10, ge=1, description="Results wanted.")
    images: int = Field(DEFAULT_IMAGES, ge=1, description="Images of each object, where results are objects.")
    refine: bool = Field(True, description="Compare the first candidates by references too.")
    candidates: int | None = Field(
        None, ge=0, description="Refine so many; 0: all, as far as the limit allows; default: as in evaluation."
    )
    image_weight: float = Field(0.5, ge=0, le=1, description="Share of the image beside a sentence.")
    where: list[str] = Field(
        [], description="COLUMN=VALUE: only items with this value; repeated, of another column: with all of them."
    )


class ExplainQuery(SearchQuery):
    """A search, and the result of it to explain."""

    id: str = Field(description="Id of an item.")


class SearchBody(SearchQuery):
    """A search as JSON."""

    where: dict[str, str | int | float | bool] = Field({}, description="Column to value.")  # type: ignore[assignment]
    image: str | None = Field(None, description="An image file in base64.")


class ExplainBody(SearchBody):
    """An explanation as JSON."""

    id: str = Field(description="Id of an item.")


B = TypeVar("B", bound=SearchBody)


def read_json(data: bytes, kind: type[B], limits: Limits) -> tuple[B, bytes | None]:
    """A body of JSON, and its image. The image is cut out unread: what is parsed is small, whatever it holds. Raises Refused."""
    spans = [(m.end(), data.find(b'"', m.end())) for m in itertools.islice(IMAGE.finditer(data), limits.filters + 2)]
    start, end = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
    if end <= start or len(data) <= limits.json_bytes:
        start = end = 0
    rest, image = data[:start] + data[end:], data[start:end]
    if len(rest) > limits.json_bytes:
        message = f"the JSON has {len(rest):,} bytes beside its image."
        raise refuse(413, "TooLarge", message, f"Send at most {limits.json_bytes:,}.")
    given = _parsed(rest)
    if unknown := [key for key in given if key not in kind.model_fields]:
        named = ", ".join(repr(key[:50]) for key in unknown[:SHOWN])
        raise refuse(422, "InvalidRequest", f"{len(unknown)} unknown keys: {named}."[:500], EXPLAINED)
    where = given.get("where")
    if isinstance(where, dict):
        _check_filters([(name, value if isinstance(value, str) else "") for name, value in where.items()], limits)
    try:
        found = kind.model_validate(given)
        if found.image is None:
            return found, None
        # Some writers of JSON escape the slash.
        return found, base64.b64decode(image.replace(rb"\/", b"/") or found.image.encode(), validate=True)
    except ValidationError as error:
        raise Refused(invalid(error.errors(include_url=False, include_context=False, include_input=False))) from None
    except binascii.Error:
        message = "the image is not valid base64."
        raise refuse(400, "UnreadableImage", message, "Encode the bytes of an image file.") from None


def _parsed(data: bytes) -> dict[str, Any]:
    """A small JSON object. Raises Refused."""
    try:
        found = json.loads(data.decode(), object_pairs_hook=_distinct, parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # halves of characters, which nothing further on would take
    except RecursionError:
        raise Refused(_not_json("it is nested too deeply")) from None
    except ValueError as error:  # numbers of thousands of digits among them
        raise Refused(_not_json(str(error))) from None
    if not isinstance(found, dict):
        raise Refused(_not_json("no object"))
    return found


def _not_json(why: str) -> Problem:
    return Problem(422, "InvalidRequest", f"the body is not a JSON object: {why[:200]}.", EXPLAINED)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:50]!r} comes twice")
    return found


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def to_ask(query: SearchQuery, image: bytes | None, limits: Limits) -> Ask:
    """The search of a query. Raises Refused beyond the limits."""
    if query.text and len(query.text) > limits.text:
        message = f"the sentence has {len(query.text):,} characters."
        raise refuse(400, "TextTooLong", message, f"Give at most {limits.text:,}.")
    if query.top > limits.top:
        message = f"top is {_short(query.top)}."
        raise refuse(400, "TooManyResults", message, f"Ask for at most {limits.top} results.")
    if query.by == "object" and query.images > MOST_IMAGES:
        message = f"images is {_short(query.images)}."
        raise refuse(400, "TooManyResults", message, f"Ask for at most {MOST_IMAGES} images of each object.")
    if query.candidates is not None and query.candidates > limits.candidates:
        message, fix = (
            f"candidates is {_short(query.candidates)}.",
            f"Refine at most {limits.candidates:,}; 0 is as many.",
        )
        raise refuse(400, "TooManyCandidates", message, fix)
    if image is not None and len(image) > limits.image_bytes:
        message = f"the image has {len(image):,} bytes."
        raise refuse(413, "TooLarge", message, f"Send at most {limits.image_bytes:,}.")
    if isinstance(query.where, dict):
        where = [(name, str(value)) for name, value in query.where.items()]
    else:
        if wrong := [pair for pair in query.where if "=" not in pair]:
            message = f"the filter {wrong[0][:100]!r} is not of the form COLUMN=VALUE."
            raise refuse(400, "BadFilter", message, "Write where=COLUMN=VALUE.")
        where = [(pair.partition("=")[0], pair.partition("=")[2]) for pair in query.where]
    _check_filters(where, limits)
    how = query.top, query.refine, query.candidates, tuple(sorted(where)), query.images if query.by == "object" else 0
    return Ask(query.text, image, query.image_weight, *how)


def _check_filters(where: list[tuple[str, str]], limits: Limits) -> None:
    """Raise Refused for too many filters, too long ones, and several of one column."""
    if len(where) > limits.filters:
        raise refuse(400, "BadFilter", f"{len(where)} filters.", f"Give at most {limits.filters}.")
    seen: set[str] = set()
    for name, value in where:
        if (longest := max(len(name), len(value))) > limits.filter_text:
            message = f"the filter by {name[:50]!r} has {longest:,} characters."
            raise refuse(400, "BadFilter", message, f"Give at most {limits.filter_text:,} to a column and to a value.")
        if name in seen:
            message = f"the column {name[:50]!r} is filtered by twice."
            raise refuse(400, "RepeatedFilter", message, "Give one value for each column.")
        seen.add(name)


def _short(number: int) -> str:
    digits = str(number)
    return digits if len(digits) <= 20 else f"a number of {len(digits):,} digits"


def invalid(errors: Any) -> Problem:
    """What pydantic finds wrong, in words."""
    said = "; ".join(f"{'.'.join(str(at) for at in e['loc'] if at != 'query') or 'body'}: {e['msg']}" for e in errors[:SHOWN])
    return Problem(422, "InvalidRequest", f"{said}."[:500], EXPLAINED)
