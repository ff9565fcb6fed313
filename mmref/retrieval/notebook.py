"""Results of a search as a notebook shows them: pictures beside scores."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

import jinja2

from mmref.terminal.output import printable

MOST_SHOWN = 50  # a thumbnail is a few kB, and a notebook keeps what it has shown


def template(name: str) -> jinja2.Template:
    """A template of this package, in which text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmref.retrieval"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["printable"] = printable
    return environment.get_template(name)


class Shown(Protocol):
    """What is told of a result; see `mmref.retrieval.searcher.Result`."""

    @property
    def rank(self) -> int: ...
    @property
    def id(self) -> str: ...
    @property
    def object_id(self) -> str | None: ...
    @property
    def score(self) -> float: ...
    @property
    def initial(self) -> float: ...
    @property
    def rank_before(self) -> int: ...
    @property
    def metadata(self) -> dict[str, Any]: ...


R = TypeVar("R", bound=Shown)


class Results(list[R]):
    """A list of results, which a notebook shows as a grid of pictures.

    Args:
        results: the best first.
        thumbnail: WebP of an item by its id. It is asked when the results are shown.
    """

    def __init__(self, results: Iterable[R], thumbnail: Callable[[str], bytes]) -> None:
        super().__init__(results)
        self._thumbnail = thumbnail

    def __reduce__(self) -> tuple[Any, ...]:
        """A plain list is what another process gets: pictures would take the whole searcher along."""
        return list, (list(self),)

    def _repr_html_(self) -> str:
        """The first 50 with thumbnails in the page itself, scores, and metadata; text is escaped."""
        shown = [(result, base64.b64encode(self._thumbnail(result.id)).decode()) for result in self[:MOST_SHOWN]]
        return template("notebook.html.j2").render(shown=shown, more=len(self) - len(shown))
