"""The streams of a command, which may stop early, be no UTF-8, be full or not be there; texts from data on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import sys
from typing import Any

from mmref.errors import OutputError, ReaderLeftError

# Control characters move the cursor, color and rewrite what was printed. The marks of writing direction reorder it, and
# line separators begin new lines. Surrogates are what a name that is no UTF-8 becomes, and cannot be printed.
UNSHOWN = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_ANY = re.compile(f"[{UNSHOWN}]")
_ANY_BUT_LINES = re.compile(f"(?!\n)[{UNSHOWN}]")


def prepare() -> None:
    """Make standard streams that are there, take every character, and fail by OutputError.

    `>&-` closes a stream, LANG=C makes it ASCII.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file to be opened would get its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    before: Any = sys.stdout
    own = before == sys.__stdout__ and before.fileno() == 1
    if own:
        raw: Any = _Output(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            raw if before.write_through else io.BufferedWriter(raw),
            encoding=before.encoding,
            line_buffering=before.line_buffering,
            write_through=before.write_through,
        )
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # another object, of a program that calls us
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


class _Output(io.FileIO):
    """Standard output, whose failures are told from those of other files. After one nothing more is written to it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # what still waits in buffers goes there, or Python would complain at its end
            os.close(null)
            if isinstance(error, BrokenPipeError):
                raise ReaderLeftError("whatever read standard output has ended.") from None
            raise OutputError(f"standard output cannot be written: {error}. Free space, or send it elsewhere.") from None


def to_json(value: Any, **options: Any) -> str:
    """JSON for standard output: letters as they are where it takes them, else escaped as JSON does."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(value, ensure_ascii=not unicode, **options)


def printable(text: object, lines: bool = False) -> str:
    r"""A text with what a terminal would obey, or show in another order, written out: \x1b, \u202e.

    Args:
        lines: keep ends of lines, for a whole message.
    """
    return (_ANY_BUT_LINES if lines else _ANY).sub(lambda found: ascii(found[0])[1:-1], str(text))


class PrintableFormatter(logging.Formatter):
    """Log records that a terminal can be trusted with."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)
