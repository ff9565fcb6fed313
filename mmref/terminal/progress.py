"""How far a command has come, on standard error: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any

LINE_EVERY_S = 10.0


def terminal_bar(total: int, unit: str, done: int = 0, what: str | None = None) -> Any:
    """A bar of tqdm where standard error is a terminal, None elsewhere: a log would hold every one of its states."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    return tqdm(total=total or None, initial=done, unit=unit, desc=what, dynamic_ncols=True)


def clock(seconds: float) -> str:
    """A duration as 2:05 or 1:02:05."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def say(line: str) -> None:
    """Print a line for whoever watches; a command goes on where nobody does."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Counter:
    """Tells how many of a total are done, from the first ten seconds on where there is no terminal.

    Args:
        what: is being done, as "encoding".
        total: 0 where nobody knows.
        unit: what is counted, in the singular.
        done: how many were done before.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._before, self._began = done, time.monotonic()
        self._told = self._began
        self._bar = terminal_bar(total, unit, done, what)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def add(self, count: int) -> None:
        """Count what has been done since the last call."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif (now := time.monotonic()) - self._told >= LINE_EVERY_S:
            self._told = now
            say(self._line(now - self._began))

    def _line(self, seconds: float) -> str:
        speed = (self.done - self._before) / seconds
        left = f", eta {clock((self.total - self.done) / speed)}" if speed and self.total else ""
        of = f" of {self.total:,}" if self.total else ""
        return f"{self.what}: {self.done:,}{of} {self.unit}s, {speed:.1f} {self.unit}s/s{left}"
