"""Types of command-line arguments: what every command takes for a place, a path of this machine, or a text."""

from __future__ import annotations

import argparse
import math
import os
import re

from mmref.errors import PathError, TextError
from mmref.storage.hub import hub_id
from mmref.storage.locations import absolute, expanded, in_utf8, is_url


def place(given: str) -> str:
    """A path, made absolute, or a URL as it is. Raises PathError."""
    return in_utf8(source(given))


def source(given: str) -> str:
    """As `place`, of files that are only read: their names may be any bytes."""
    return absolute(expanded(given))


def images(given: str) -> str:
    """As `source`; what can be a name on a hub, and is no path here, as it is. Raises PathError."""
    found = expanded(given)
    named = not is_url(found) and not os.path.lexists(found) and hub_id(found) is not None
    return found if named else absolute(found)


def model(given: str) -> str:
    """A run, an export or a pretrained model: a path, made absolute, or a URL or a name on a hub as it is. Raises PathError."""
    found = expanded(given)
    named = is_url(found) or (hub_id(found) is not None and not os.path.lexists(found))
    return in_utf8(found if named else absolute(found))


def model_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """A model as the first positional argument or as --model; `chosen_model` reads it."""
    parser.add_argument("given_model", nargs="?", type=model, metavar="MODEL", help=what)
    parser.add_argument("--model", type=model, metavar="MODEL", help="the same, as an option")


def chosen_model(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """The model that was given in one of the two ways; a usage error where it is none or both."""
    if (args.given_model is None) == (args.model is None):
        parser.error("give one MODEL: as the first argument, or with --model")
    return str(args.model or args.given_model)


def run_dir_argument(parser: argparse.ArgumentParser) -> None:
    """Where a model that is no run becomes one, of no steps: see `mmref.run.models.as_run`."""
    parser.add_argument(
        "--run_dir", type=place, metavar="DIR",
        help="where metrics, report and references of a model are kept that is no run (default: runs/NAME)",
    )  # fmt: skip


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


def count(given: str) -> int:
    """A whole number from 0 up."""
    return _at_least(0, given)


def positive(given: str) -> int:
    """A whole number from 1 up."""
    return _at_least(1, given)


def amount(given: str) -> float:
    """A finite number from 0 up."""
    value = float(given)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 up, found {given}")
    return value


def share(given: str) -> float:
    """A number from 0 to 1."""
    value = float(given)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, found {given}")
    return value


def _at_least(least: int, given: str) -> int:
    value = int(given)
    if value < least:
        raise argparse.ArgumentTypeError(f"must be at least {least}, found {given}")
    return value


def size(given: str) -> int:
    """Bytes, as of 2GB, 500MB or 1e9; units are powers of a thousand."""
    found = re.fullmatch(r"\s*([0-9.e+]+)\s*([KMGT]?)B?\s*", given, re.IGNORECASE)
    try:
        value = float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ") if found else 0.0
    except ValueError:
        value = 0.0
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a size such as 2GB or 500MB, found {given}")
    return int(value)
