"""What a build leaves out, each with its reason: all of it in a file, the first and the counts by kind in the manifest."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from typing import Any, TextIO

LEFT_OUT = "left_out.jsonl"  # in a set of which something was left out
NAMED = 100  # of what was left out, the manifest names this many
KINDS = (  # what a reason says: its kind. The first that fits
    (re.compile(r": another style of "), "another style"),
    (re.compile(r": a copy of "), "a copy"),
    (re.compile(r": drawn by \d+ of the teams"), "drawn by too few teams"),
    (re.compile(r": (?:a brand|a letter|a number|the flag of a country)\b"), "a brand, letter, number or flag"),
    (re.compile(r" is blank$"), "blank"),
    (re.compile(r"X-Robots-Tag"), "not for machine learning"),
    (re.compile(r"HTTP Error (\d\d\d)"), "HTTP {}"),
    (re.compile(r"has not come within|timed out"), "too slow"),
    (re.compile(r"is larger than the .* that are fetched"), "too large"),
    (re.compile(r"is a web page"), "a web page"),
    (re.compile(r"cannot be fetched|resolution|inside a network|redirects|not followed|is no URL"), "not fetched"),
    (re.compile(r"No such file|is no file|Is a directory|Not a directory"), "no such file"),
    (re.compile(r"outside of"), "outside of the root"),
    (re.compile(r": no image(?:$| in the column )"), "no image"),
    (re.compile(r"there is no picture "), "no such picture"),
    (re.compile(r"\.tar is broken, "), "broken tar"),
    (re.compile(r"not read here: "), "a format that is not read"),
    (re.compile(r": a folder without pictures$"), "empty folder"),
    (re.compile(r"the table has no row for it"), "not in the table"),
    (re.compile(r"no caption with text"), "no caption"),
    (re.compile(r"does not decode|is empty \(0 bytes\)|: its \.\S+ is empty$"), "does not decode"),
    (re.compile(r"pixels, more than"), "too many pixels"),
    (re.compile(r"fewer than \d+ usable images"), "object with too few images"),
    (re.compile(r"(?:^|, )row \d+: "), "row that cannot be used"),
    (re.compile(r": its \.\S+ (?:is broken|is no|has)\b|is not UTF-8|is not JSON|cannot be written"), "text that cannot be used"),
    (re.compile(r": (?:no plain file|a name without an ending|a second one of that name)$"), "member that cannot be used"),
    (re.compile(r": img2dataset's status is "), "failed download"),
)


def kind_of(line: str) -> str:
    """What a line "what: reason" is counted as."""
    for pattern, kind in KINDS:
        if found := pattern.search(line):
            return kind.format(*found.groups())
    return "other"


class LeftOut:
    """Counts lines "what: reason", and writes them to a file as lines of JSON, which is not there while there are none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.count = 0
        self.first: list[str] = []
        self.kinds: Counter[str] = Counter()
        self._path = path
        self._file: TextIO | None = None

    def take(self, lines: list[str]) -> None:
        """Take lines out of a list, which is empty afterwards."""
        for line in lines:
            self._add(line, kind_of(line))
        lines.clear()

    def join(self, path: str) -> None:
        """Take what another of this class has written, where it has."""
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                for text in file:
                    entry = json.loads(text)
                    self._add(entry["left_out"], entry["kind"])

    def summary(self) -> dict[str, Any]:
        """Count, kinds and the first, for the manifest."""
        kinds = dict(sorted(self.kinds.items(), key=lambda kind: (-kind[1], kind[0])))
        return {"count": self.count, "kinds": kinds, "first": self.first}

    def close(self) -> None:
        """Write what is left."""
        if self._file:
            self._file.close()

    def _add(self, line: str, kind: str) -> None:
        self.count += 1
        self.kinds[kind] += 1
        if len(self.first) < NAMED:
            self.first.append(line)
        if self._file is None:
            self._file = open(self._path, "w", encoding="utf-8")
        self._file.write(json.dumps({"kind": kind, "left_out": line}, ensure_ascii=True) + "\n")
