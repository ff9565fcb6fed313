"""Texts that a user writes: configs, spaces, rows, tables, lists of ids and sentences. Every one of them is read here.

UTF-8 is read, with a byte order mark or without, and UTF-16 or UTF-32 with one: the mark says what it is. Anything else is
an error that names the line, since a guess would change letters in silence.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Hashable, Iterator
from typing import Any, TextIO

import yaml

from mmref.errors import MMRefError
from mmref.storage.locations import read_bytes, size_of

MARKS = {  # UTF-32 before UTF-16, whose mark it begins with
    codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
}  # fmt: skip
NO_TEXTS = {b"PK\3\4": "a spreadsheet or ZIP archive", b"\x1f\x8b": "packed with gzip", b"PAR1": "a Parquet file"}
BLOCK = 8 << 20  # bytes of a text that are looked at together
MERGE = "tag:yaml.org,2002:merge"
ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]+$|.*:)")  # octal or of base 60, but not 0.5, 0x1f or 0b11


def open_text(place: str, wrong: type[MMRefError], newline: str | None = "") -> TextIO:
    """A whole text file, checked and open at its beginning; `newline` as in `open`.

    Args:
        place: path or URL.
        wrong: the error of whoever asks.

    Raises:
        wrong: there is no such file, or it is no text in a known encoding; names the line and the fix.
        StorageError: the storage keeps failing. FileSystemMissingError.
    """
    data = _read(place, wrong)
    encoding, begin = _encoding(place, data, wrong)
    try:
        str(memoryview(data)[begin:], encoding)
    except UnicodeDecodeError as error:
        raise wrong(_not_decoded(place, data, begin, encoding, error)) from None
    stream = io.BytesIO(data)
    stream.seek(begin)
    return io.TextIOWrapper(stream, encoding, newline=newline)


def line_blocks(place: str, wrong: type[MMRefError], size: int = BLOCK) -> Iterator[bytes]:
    """A text file in pieces of whole lines, about `size` bytes each, as UTF-8 without a mark. Raises as `open_text`, once it
    comes to the line."""
    if not _has_parts(place):
        yield open_text(place, wrong).read().encode()
        return
    piece = _read(place, wrong, 0, size)
    encoding, begin = _encoding(place, piece, wrong)
    if encoding != "utf-8":
        yield open_text(place, wrong).read().encode()
        return
    rest, position, lines = piece[begin:], len(piece), 0
    while piece:
        piece = _read(place, wrong, position, size)
        position += len(piece)
        # A return at the end may be half of a line end.
        end = max(rest.rfind(b"\n"), rest.rfind(b"\r", 0, -1)) + 1 if piece else len(rest)
        block, rest = rest[:end], rest[end:] + piece
        try:
            str(block, "utf-8")
        except UnicodeDecodeError as error:
            raise wrong(_not_decoded(place, block, 0, encoding, error, lines)) from None
        lines += block.count(b"\n") + block.count(b"\r") - block.count(b"\r\n")
        if block:
            yield block


def _has_parts(place: str) -> bool:
    """Whether parts of a file can be asked for: a pipe comes once, and not every web server gives parts."""
    try:
        return not place.lower().startswith(("http://", "https://")) and size_of(place) is not None
    except OSError:
        return False


def _read(place: str, wrong: type[MMRefError], start: int = 0, size: int | None = None) -> bytes:
    try:
        return read_bytes(place, start, size)
    except OSError as error:
        raise wrong(f"{place} cannot be read: {error.strerror or error}.") from None


def _encoding(place: str, data: bytes, wrong: type[MMRefError]) -> tuple[str, int]:
    """Encoding by the first bytes of a file, and where its text begins. Raises `wrong` for what is no text."""
    if kind := next((kind for magic, kind in NO_TEXTS.items() if data.startswith(magic)), ""):
        raise wrong(f"{place} is {kind}, whatever it is called: save it as a text in UTF-8.")
    mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
    begin = 0
    while mark and data.startswith(mark, begin):  # some programs add a mark to the mark
        begin += len(mark)
    if not mark and b"\0" in data[:2]:
        raise wrong(f"{place} looks like UTF-16 without a byte order mark. Save it as UTF-8.")
    return MARKS.get(mark, "utf-8"), begin


def _not_decoded(place: str, data: bytes, begin: int, encoding: str, error: UnicodeDecodeError, lines: int = 0) -> str:
    before = data[begin : begin + error.start].decode(encoding, "ignore")
    line, byte = lines + io.StringIO(before, newline=None).read().count("\n") + 1, data[begin + error.start]
    letter = bytes([byte]).decode("cp1252", "replace") if encoding == "utf-8" and byte >= 0x80 else ""
    meant = f", which is {letter!r} in Windows-1252," if letter.isprintable() and letter not in ("", "\ufffd") else ""
    return (
        f"{place} is not {encoding.upper()}: in line {line} the byte 0x{byte:02x}{meant} is none of it. Save the file as UTF-8 "
        "(in a spreadsheet: `CSV UTF-8`)."
    )


def read_text(place: str, wrong: type[MMRefError]) -> str:
    """A text file with its line ends as `\\n`. Raises as `open_text`."""
    with open_text(place, wrong, newline=None) as file:
        return file.read()


def read_lines(place: str, wrong: type[MMRefError]) -> list[str]:
    """Lines without white space at their ends; empty ones too, so that the first is line 1. Raises as `open_text`."""
    with open_text(place, wrong) as file:  # breaks at line ends alone: a name may hold one of Unicode's own
        return [line.strip() for line in file]


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text: not where it has half a surrogate pair."""
    return text.isascii() or text.encode(errors="ignore").decode() == text


def parse_yaml(text: str, place: str, wrong: type[MMRefError]) -> dict[str, Any]:
    """Keys and values of a YAML text, {} for an empty one. `place` names it in messages.

    Raises `wrong` where it is no YAML, holds something else than keys and values, a key that is no text, a key twice at any
    depth, or a number that YAML 1.1 reads as another than it looks like.
    """
    try:
        loaded = yaml.load(text, _Plain)
    except _OddError as error:
        raise wrong(f"{place}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = " YAML is indented with spaces, not tabs." if "\\t" in str(error.problem) else ""
        raise wrong(f"{place}{where} is not YAML: {' '.join(filter(None, (error.context, error.problem)))}.{hint}") from None
    except Exception as error:  # a value that is none of its tag's: each has an error of its own
        raise wrong(f"{place} is not YAML: {' '.join(str(error).split())}.") from None
    values = {} if loaded is None else loaded
    if not isinstance(values, dict):
        raise wrong(f"{place} must hold keys and values, found a {type(values).__name__}.")
    if odd := [key for key in values if not isinstance(key, str)]:
        raise wrong(f"{place}: the key `{odd[0]}` is no text to YAML, but a {type(odd[0]).__name__}: put it in quotes.")
    return values


class _OddError(Exception):
    """What PyYAML takes in silence for something else than its writer meant."""


class _Plain(yaml.SafeLoader):
    """YAML asks for distinct keys; PyYAML takes the last of two in silence. Keys that `<<` merges may be overridden.

    PyYAML reads numbers as YAML 1.1 has them: 010 is 8 and 1:30 is 90, which YAML 1.2 and other programs read otherwise.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[Hashable, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = MERGE if key.tag == MERGE else self.construct_object(key)
                line = key.start_mark.line + 1
                if name in lines:
                    raise _OddError(f"`{key.value}` is given twice, in line {lines[name]} and in line {line}: keep one of them.")
                lines[name] = line
        return node

    def plain_number(self, node: yaml.ScalarNode) -> int | float:
        """A whole number, or one with a point, that is what it looks like. Raises _OddError."""
        number: int | float = (self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float)(node)
        if ODD_NUMBER.match(node.value):
            raise _OddError(
                f"`{node.value}` in line {node.start_mark.line + 1} is the number {number} to YAML: write that, or put a text in "
                "quotation marks."
            )
        return number


for kind in ("int", "float"):
    _Plain.add_constructor(f"tag:yaml.org,2002:{kind}", _Plain.plain_number)
