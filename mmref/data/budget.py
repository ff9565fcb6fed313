"""How many pixels are decoded at once: a file of a few bytes may unpack to hundreds of megabytes, and so may its neighbor."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from mmref.errors import DecodersBusyError, PixelLimitError

# Of all threads of a process. Decoding takes 7 to 16 bytes for each; four photographs of a phone (4096 x 3072) fit.
PIXELS_AT_ONCE = 48 * 1024 * 1024


class PixelBudget:
    """Pixels that may be decoded at once. Thread-safe; what fits goes ahead of what has to wait.

    Args:
        pixels: of all images together. One counts as three quarters of them at most: the largest is decoded, one at a time,
            and keeps no small one waiting.
    """

    def __init__(self, pixels: int = PIXELS_AT_ONCE) -> None:
        self.pixels, self.used = pixels, 0
        self._changed = threading.Condition()

    def acquire(self, pixels: int, patience_s: float | None) -> int:
        """Wait until there is room for an image; returns what to release. Raises DecodersBusyError after `patience_s`."""
        share = min(pixels, self.pixels * 3 // 4)
        with self._changed:
            if not self._changed.wait_for(lambda: self.used + share <= self.pixels, patience_s):
                raise DecodersBusyError(f"other images are still being decoded after {patience_s:g} s: try again later.")
            self.used += share
        return share

    def release(self, share: int) -> None:
        """Make room for others."""
        with self._changed:
            self.used -= share
            self._changed.notify_all()


BUDGET = PixelBudget()


class Room:
    """The room of one image, taken as soon as its size is known and left at the end of the block.

    Args:
        name: of the image, for messages.
        max_pixels: that it may have.
        patience_s: to wait for room; None: as long as it takes.
    """

    def __init__(self, name: str, max_pixels: int, patience_s: float | None = None) -> None:
        self.name, self.max_pixels = name, max_pixels
        self._until = None if patience_s is None else time.monotonic() + patience_s
        self._share = 0

    def take(self, width: int, height: int) -> None:
        """Wait for it. Another size, as another decoder reads it, takes the place of the first. Raises PixelLimitError,
        DecodersBusyError."""
        if width * height > self.max_pixels:
            limit = f"more than the {self.max_pixels:,} that are decoded: make it smaller."
            raise PixelLimitError(f"{self.name}: {width} x {height} pixels, {limit}")
        self._leave()  # who held some and waited for more could wait for ever
        patience_s = None if self._until is None else max(0.0, self._until - time.monotonic())
        self._share = BUDGET.acquire(width * height, patience_s)

    def _leave(self) -> None:
        if self._share:
            BUDGET.release(self._share)
            self._share = 0

    def __enter__(self) -> Room:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._leave()
