"""Ranges of bytes that are wanted of files, put together to few requests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

LONGEST = 8 << 20  # bytes of one request: more would keep others waiting, and fill the memory


@dataclass(frozen=True)
class Range:
    """Some bytes of a file, path or URL."""

    place: str
    start: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


@dataclass(frozen=True)
class Request:
    """Bytes of a file that are read at once, and which of the wanted ranges lie in them."""

    whole: Range
    wanted: list[int]


def requests(wanted: Sequence[Range], gap: Callable[[str], int]) -> list[Request]:
    """The requests that bring all ranges: of those of a file that lie side by side one.

    Args:
        gap: the most bytes between two ranges of a file that are rather read as well than left out.
    """
    made: list[Request] = []
    for number in sorted(range(len(wanted)), key=lambda number: (wanted[number].place, wanted[number].start)):
        own = wanted[number]
        if made:
            last = made[-1].whole
            stop = max(last.stop, own.stop)
            if last.place == own.place and own.start <= last.stop + gap(own.place) and stop - last.start <= LONGEST:
                made[-1] = Request(Range(own.place, last.start, stop - last.start), [*made[-1].wanted, number])
                continue
        made.append(Request(own, [number]))
    return made
