"""Results for people: a table on the terminal, and a page that needs nothing but itself."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import jinja2

from mmref.retrieval.searcher import Result, Searcher
from mmref.terminal.output import printable

WIDEST_ID = 48  # characters


def format_results(results: Sequence[Result]) -> str:
    """Rank, rank before refinement, score, score before, object and item of each result."""
    lines = [f"{'rank':>4} {'before':>7} {'score':>7} {'before':>7}  {'object':20} item"]
    for r in results:
        moved = f"({r.rank_before - r.rank:+d})" if r.rank != r.rank_before else ""
        name, of = printable(r.id), printable(r.object_id or "-")
        name = name if len(name) <= WIDEST_ID else f"...{name[3 - WIDEST_ID :]}"
        before = f"{r.rank_before}{moved}"
        lines.append(f"{r.rank:>4} {before:>7} {r.score:>7.3f} {r.initial:>7.3f}  {of[:20]:20} {name}")
    return "\n".join(lines)


def render_page(searcher: Searcher, answers: Sequence[tuple[str, Sequence[Result]]]) -> str:
    """A self-contained page: a grid of thumbnails for each (query, results)."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmref.retrieval"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["printable"] = printable
    shown = [(query, [(r, base64.b64encode(searcher.thumbnail(r.id)).decode()) for r in results]) for query, results in answers]
    return environment.get_template("results.html.j2").render(index=searcher.index.name, items=len(searcher), answers=shown)
