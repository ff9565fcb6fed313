"""Which image ended the process that decoded it: found out by noting on disk what is being decoded.

Who finds a note that was not taken back knows that the process died meanwhile. Several images are decoded at once, so each of
them is a suspect; suspects are decoded alone the next time, and the one that was being decoded at a second death is passed over.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from mmref.errors import StorageError
from mmref.storage.disk import told_when_full

DEATHS = 2
KILLED = "killed the process that decoded it twice"


class Watch:
    """What is known of the images of a chunk before they are decoded.

    Args:
        passed_over: positions of those that are not decoded.
        suspects: positions of those that are decoded alone.
    """

    def __init__(self, passed_over: Collection[int] = (), suspects: Collection[int] = ()) -> None:
        self.passed_over, self.suspects = passed_over, suspects

    @contextlib.contextmanager
    def decoding(self, position: int) -> Iterator[None]:
        """Around the decoding of an image."""
        yield


class Journal:
    """The notes of one process at a time, a line each: `+` and what tells an image from others, `-` when it is decoded.

    Args:
        path: of the file; what an earlier process left there counts.
        known: images that killed processes before, as `identity` tells them.
    """

    def __init__(self, path: Path, known: Collection[str]) -> None:
        self._path = path
        self._deaths: Counter[str] = Counter(dict.fromkeys(known, DEATHS))
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
            if line.startswith("+"):
                self._deaths[line[1:]] += 1
            elif line.startswith("-"):
                del self._deaths[line[1:]]
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def watch(self, images: Sequence[str]) -> Watch:
        """A chunk's images, watched."""
        return _Noted(self, images)

    def deaths(self, image: str) -> int:
        """At which it was being decoded."""
        return self._deaths[image]

    def note(self, sign: str, image: str) -> None:
        """Add a line; a process that dies leaves it behind without further ado. Raises StorageError: else the image would be
        blamed."""
        try:
            with told_when_full(self._path):
                os.write(self._file, f"{sign}{image}\n".encode())
        except OSError as error:
            raise StorageError(f"cannot write {self._path}: {error}.") from None

    def forget(self) -> None:
        """Leave only those that are passed over: a chunk is finished, and on the disk."""
        os.ftruncate(self._file, 0)
        for image, deaths in self._deaths.items():
            if deaths >= DEATHS:
                for _ in range(DEATHS):
                    self.note("+", image)


class _Noted(Watch):
    def __init__(self, journal: Journal, images: Sequence[str]) -> None:
        deaths = [journal.deaths(image) for image in images]
        super().__init__([i for i, n in enumerate(deaths) if n >= DEATHS], [i for i, n in enumerate(deaths) if 0 < n < DEATHS])
        self.journal, self.images = journal, images

    @contextlib.contextmanager
    def decoding(self, position: int) -> Iterator[None]:
        self.journal.note("+", self.images[position])
        try:
            yield
        finally:
            self.journal.note("-", self.images[position])
