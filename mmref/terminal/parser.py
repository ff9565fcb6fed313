"""The parser of every command's own flags: `-` and `_` alike in their names, and `--log-level`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from mmref.terminal.output import PrintableFormatter

# Level of mmref's own log, and of what it builds on: that would drown the rest.
LEVELS = {
    "debug": (logging.DEBUG, logging.INFO),
    "info": (logging.INFO, logging.WARNING),
    "warning": (logging.WARNING, logging.WARNING),
    "error": (logging.ERROR, logging.ERROR),
}


class Parser(argparse.ArgumentParser):
    """Wrong usage ends with status 2, as argparse has it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--log-level", action=_SetLevel, choices=LEVELS, default=argparse.SUPPRESS,
            help="how much of its log this process writes to standard error (default: warning)",
        )  # fmt: skip

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, with flags spelled as they were declared."""
        if args is not None:
            args = respelled(args, [name for name in self._option_string_actions if name.startswith("--")])
        return super().parse_known_args(args, namespace)


class _SetLevel(argparse.Action):
    """Takes effect at once: what a command does first may have something to say."""

    def __call__(self, parser: Any, namespace: Any, level: Any, option: str | None = None) -> None:
        log_at(level)


def log_at(level: str) -> None:
    """Have this process write its log to standard error, from a level of LEVELS on."""
    own, others = LEVELS[level]
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(handlers=[handler], level=others, force=True)
    logging.getLogger("mmref").setLevel(own)


def respelled(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A command line whose flags have `-` and `_` in their names where the declared ones have them; what is behind `--`, and
    what is no flag, stays as it is."""
    known = {_alike(flag): flag for flag in flags}
    end = list(words).index("--") if "--" in words else len(words)
    found = []
    for word in words[:end]:
        name, equals, value = word.partition("=")
        if name.startswith("--") and name not in flags and _alike(name) in known:
            word = known[_alike(name)] + equals + value
        found.append(word)
    return found + list(words[end:])


def _alike(flag: str) -> str:
    return "--" + flag[2:].replace("_", "-")
