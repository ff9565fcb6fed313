"""Types of command-line arguments: what every command takes for a place, a path of this machine, or a text."""

from __future__ import annotations

from mmref.errors import PathError, TextError
from mmref.locations import absolute, expanded, is_url


def place(given: str) -> str:
    """A path, made absolute, or a URL as it is. Raises PathError."""
    return absolute(expanded(given))


def local_path(given: str) -> str:
    """A path of this machine, made absolute. Raises PathError, also for a URL: it would become a folder of that name."""
    if is_url(given):
        raise PathError(f"{given} is a URL, and this must be a path of this machine, or of storage mounted on it.")
    return place(given)


def text(given: str) -> str:
    """A text such as a sentence or an id. Raises TextError for one that is no UTF-8, as of a terminal in Latin-1."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise TextError(
            f"{given.encode('utf-8', 'surrogateescape')!r} is no UTF-8: let the terminal send it (`locale` shows a name with "
            "UTF-8), or convert the file it comes from (`iconv -t utf-8`)."
        ) from None
    return given
