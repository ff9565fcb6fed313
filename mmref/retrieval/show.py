"""Results for people: a table on the terminal, and a page that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mmref.retrieval.notebook import template
from mmref.retrieval.results import Answer, ObjectResult, Result
from mmref.terminal.output import printable

if TYPE_CHECKING:  # it imports torch, and results of a service are shown without
    from mmref.retrieval.duplicates import Found

NO_CLOSE_MATCH = "no close match: right images are mostly more like a sentence than these are"
WIDEST_ID = 48  # characters
MOST_GROUPS, MOST_MEMBERS = 300, 24  # of duplicates on a page: a thumbnail is a few kB


def format_results(results: Sequence[Result]) -> str:
    """Rank, rank before refinement, score, score before, object and item of each result."""
    return "\n".join([_line_of_names("item"), *(_line(r, r.object_id, r.id) for r in results)])


def format_objects(results: Sequence[ObjectResult]) -> str:
    """As `format_results` of each object, beside its best image; the scores and ids of the others below."""
    lines = [_line_of_names("images")]
    for r in results:
        lines.append(_line(r, r.object_id, r.images[0].id))
        lines += [f"{'':12} {i.score:>7.3f} {i.initial:>7.3f}  {'':20} {_short(i.id)}" for i in r.images[1:]]
    return "\n".join(lines)


def _line_of_names(last: str) -> str:
    return f"{'rank':>4} {'before':>7} {'score':>7} {'before':>7}  {'object':20} {last}"


def _line(r: Result | ObjectResult, object_id: str | None, item_id: str) -> str:
    moved = f"({r.rank_before - r.rank:+d})" if r.rank != r.rank_before else ""
    of, before = printable(object_id or "-"), f"{r.rank_before}{moved}"
    return f"{r.rank:>4} {before:>7} {r.score:>7.3f} {r.initial:>7.3f}  {of[:20]:20} {_short(item_id)}"


def _short(item_id: str) -> str:
    name = printable(item_id)
    return name if len(name) <= WIDEST_ID else f"...{name[3 - WIDEST_ID :]}"


def render_page(
    index: str,
    items: int,
    thumbnail: Callable[[str], bytes],
    answers: Sequence[tuple[str, Answer]],
) -> str:
    """A self-contained page: a grid of thumbnails for each (query, answer), or one for each object found.

    Args:
        index, items: its name, and how many it has.
        thumbnail: WebP of an item by its id.
    """
    shown = [
        (
            query,
            [(of, [(r, base64.b64encode(thumbnail(r.id)).decode()) for r in images]) for of, images in _groups(answer.results)],
            NO_CLOSE_MATCH if answer.close_match is False else "",
        )
        for query, answer in answers
    ]
    return template("results.html.j2").render(index=index, items=items, answers=shown)


def render_duplicates(found: Found) -> str:
    """A self-contained page of the groups of `mmref index duplicates`, to look at and to choose what is left out."""
    groups = [
        (group, [(m, base64.b64encode(found.thumbnail(i, j)).decode()) for j, m in enumerate(group.members[:MOST_MEMBERS])])
        for i, group in enumerate(found.groups[:MOST_GROUPS])
    ]
    return template("duplicates.html.j2").render(found=found, groups=groups)


def _groups(results: Sequence[Result] | Sequence[ObjectResult]) -> list[tuple[ObjectResult | None, Sequence[Result]]]:
    """(object, its images), or all images as one group of no object."""
    objects: list[tuple[ObjectResult | None, Sequence[Result]]]
    objects = [(r, r.images) for r in results if isinstance(r, ObjectResult)]
    return objects or [(None, [r for r in results if isinstance(r, Result)])]
