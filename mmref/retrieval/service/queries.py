"""What may be asked: parameters, JSON and images, checked against the limits before anything is built from them."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import re
from collections import Counter
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from mmref.errors import FilterError
from mmref.retrieval.filters import Condition, read_where
from mmref.retrieval.results import DEFAULT_IMAGES
from mmref.retrieval.searcher import DEFAULT_TOP
from mmref.retrieval.service.answering import Ask
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.problems import Problem, Refused, refuse

EXPLAINED = "GET /openapi.json describes every request."
MOST_IMAGES = 20  # of an object
SHOWN = 3  # things that are wrong, of all that may be
# This matches an image in JSON as far as its first letter. Base64 has no quotes, so the image ends at the next one.
IMAGE = re.compile(rb'"image"[ \t\r\n]*:[ \t\r\n]*"')
# This matches the list of `within` in JSON, as far as it holds texts. Nothing of it is tried twice.
WITHIN = re.compile(
    rb'"within"[ \t\r\n]*+:[ \t\r\n]*+(\[(?:[ \t\r\n]*+"(?:[^"\\]++|(?:\\.)++)*+"[ \t\r\n]*+,?)*+(?:[ \t\r\n]*+\])?)', re.DOTALL
)


class SearchQuery(BaseModel):
    """What to search for, and how."""

    model_config = ConfigDict(extra="forbid")

    text: str | None = Field(None, description="A sentence.")
    index: str | None = Field(None, description="Name of an index; the first one where it is left out.")
    by: Literal["image", "object"] = Field(
        "image", description="What the results are: images, or objects, each by its best image."
    )
    top: int | None = Field(
        None, ge=1, description=f"Results wanted; default: {DEFAULT_TOP}, or as many as the limit allows."
    )  # fmt: skip
    offset: int = Field(0, ge=0, description="Results to pass over: with top=10, 10 gives ranks 11 to 20.")
    sort: str | None = Field(
        None, min_length=1, max_length=500,
        description="A column to put these results in the order of, instead of their scores; -COLUMN: the highest first.",
    )  # fmt: skip
    images: int = Field(DEFAULT_IMAGES, ge=1, description="Images of each object, where results are objects.")
    refine: bool = Field(True, description="Compare the first candidates by references too.")
    candidates: int | None = Field(
        None, ge=0, description="Refine so many; 0: all, as far as the limit allows; default: as in evaluation."
    )
    image_weight: float = Field(0.5, ge=0, le=1, description="Share of the image beside a sentence.")
    where: list[str] = Field(
        [],
        description="Only items that meet this: COLUMN=VALUE, !=, <, <=, > or >=; COLUMN~TEXT (contains); COLUMN in VALUE,VALUE; "
        "COLUMN is missing, COLUMN is not missing. Repeated: that meet all of them.",
    )
    within: list[str] | None = Field(
        None,
        description="Only these items, by their ids: a search in what was found. Repeated for each; as JSON an empty list finds "
        "nothing.",
    )


class ExplainQuery(SearchQuery):
    """A search, and the result of it to explain."""

    id: str = Field(description="Id of an item.")


class SearchBody(SearchQuery):
    """A search as JSON."""

    where: dict[str, str | int | float | bool] | list[str] = Field(  # type: ignore[assignment]
        [], description="Column to value; or conditions as a parameter `where` has them."
    )
    image: str | None = Field(None, description="An image file in base64.")


class ExplainBody(SearchBody):
    """An explanation as JSON."""

    id: str = Field(description="Id of an item.")


class JudgedQuery(BaseModel):
    """A sentence whose judgements are asked for."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(description="The sentence that is searched for.")
    index: str | None = Field(None, description="Name of an index; the first one where it is left out.")


class JudgementBody(JudgedQuery):
    """A judgement as JSON."""

    id: str = Field(description="Id of an item.")
    relevant: StrictBool | None = Field(
        description="Whether the item is what the sentence asks for; null takes back what was said."
    )


B = TypeVar("B", bound=SearchBody)
M = TypeVar("M", bound=BaseModel)


def read_json(data: bytes, kind: type[B], limits: Limits) -> tuple[B, bytes | None]:
    """A body of JSON, and its image. The image is cut out unread: what is parsed is small, whatever it holds. Raises Refused."""
    spans = [(m.end(), data.find(b'"', m.end())) for m in itertools.islice(IMAGE.finditer(data), limits.filters + 2)]
    start, end = max(spans, key=lambda span: span[1] - span[0], default=(0, 0))
    if end <= start or len(data) <= limits.json_bytes:
        start = end = 0
    rest, image = data[:start] + data[end:], data[start:end]
    found = read_object(rest, kind, limits)
    if found.image is None:
        return found, None
    try:
        # Some writers of JSON escape the slash.
        return found, base64.b64decode(image.replace(rb"\/", b"/") or found.image.encode(), validate=True)
    except binascii.Error:
        message = "the image is not valid base64."
        raise refuse(400, "UnreadableImage", message, "Encode the bytes of an image file.") from None


def read_object(data: bytes, kind: type[M], limits: Limits) -> M:
    """A body of JSON without an image. Raises Refused."""
    _check_bytes(data, kind, limits)
    given = _parsed(data)
    if unknown := [key for key in given if key not in kind.model_fields]:
        named = ", ".join(repr(key[:50]) for key in unknown[:SHOWN])
        raise refuse(422, "InvalidRequest", f"{len(unknown)} unknown keys: {named}."[:500], EXPLAINED)
    for name, most in (("where", limits.filters), ("within", limits.within)):
        if isinstance(given.get(name), dict | list):
            _check_count(name, given[name], most)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise Refused(invalid(error.errors(include_url=False, include_context=False, include_input=False))) from None


def _check_bytes(data: bytes, kind: type[BaseModel], limits: Limits) -> None:
    """Raise Refused for JSON that is too large to be parsed. The ids of a search within results have room of their own."""
    room, listed = limits.within_bytes if "within" in kind.model_fields else 0, 0
    if limits.json_bytes < len(data) <= limits.json_bytes + room and (ids := WITHIN.search(data)):
        listed = min(len(ids[1]), room)
    if (others := len(data) - listed) > limits.json_bytes:
        message = f"the JSON has {others:,} bytes beside its image and {listed:,} of ids."
        more = f", and {room:,} of ids in `within`" if room else ""
        raise refuse(413, "TooLarge", message, f"Send at most {limits.json_bytes:,}{more}.")


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
    _check_text(query.text or "", limits)
    top = min(DEFAULT_TOP, limits.top) if query.top is None else query.top
    if top > limits.top:
        message = f"top is {_short(top)}."
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
    if query.offset + top > limits.depth:
        message = f"offset is {_short(query.offset)}."
        raise refuse(400, "TooDeep", message, f"Ask for results up to rank {limits.depth:,}, or filter for others.")
    _check_count("within", query.within or (), limits.within)
    return Ask(
        query.text,
        image,
        query.image_weight,
        top,
        query.refine,
        query.candidates,
        _conditions(query.where, limits),
        query.images if query.by == "object" else 0,
        query.offset,
        None if query.within is None else tuple(query.within),
        query.sort,
    )


def judged_sentence(query: JudgedQuery, limits: Limits) -> str:
    """The sentence of a judgement, as it is kept. Raises Refused."""
    _check_text(query.text, limits)
    if not query.text.strip():
        raise refuse(400, "EmptyQuery", "a judgement needs the sentence that was searched.", "Give it as text.")
    return query.text.strip()


def _check_text(text: str, limits: Limits) -> None:
    if len(text) > limits.text:
        message = f"the sentence has {len(text):,} characters."
        raise refuse(400, "TextTooLong", message, f"Give at most {limits.text:,}.")


def _conditions(where: Any, limits: Limits) -> tuple[Condition, ...]:
    """Filters as they were written. Raises Refused for too many, too long ones, and those that cannot be read."""
    _check_count("where", where, limits.filters)
    if isinstance(where, list):  # before they are read, which takes longer the longer they are
        _check_lengths([("", one) for one in where], 2 * limits.filter_text)
    try:
        found = read_where(where)
    except FilterError as error:
        raise refuse(400, "BadFilter", str(error), "Write where=COLUMN=VALUE, or where=COLUMN>=VALUE.") from None
    _check_lengths([(one.column, ",".join(map(str, one.values))) for one in found], limits.filter_text)
    return tuple(sorted(found, key=repr))


def _check_count(name: str, given: Any, most: int) -> None:
    if len(given) > most:
        error = "BadFilter" if name == "where" else "TooManyItems"
        raise refuse(400, error, f"{name} has {len(given):,} entries.", f"Give at most {most:,}.")


def _check_lengths(pairs: list[tuple[str, str]], most: int) -> None:
    for name, value in pairs:
        if (longest := max(len(name), len(value))) > most:
            message = f"the filter by {name[:50]!r} has {longest:,} characters."
            raise refuse(400, "BadFilter", message, f"Give at most {most:,} to a column and to its values.")


def _short(number: int) -> str:
    digits = str(number)
    return digits if len(digits) <= 20 else f"a number of {len(digits):,} digits"


def invalid(errors: Any) -> Problem:
    """What pydantic finds wrong, in words."""
    said = "; ".join(f"{'.'.join(str(at) for at in e['loc'] if at != 'query') or 'body'}: {e['msg']}" for e in errors[:SHOWN])
    return Problem(422, "InvalidRequest", f"{said}."[:500], EXPLAINED)
