"""Many downloads at a time: so many of each host, kept on the disk until whoever asked has finished."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from mmref.storage.download import Terms, download
from mmref.storage.fetch import unsigned
from mmref.storage.secrets import without_user

KEPT = re.compile(r"[0-9a-f]{64}(\.\d+-\d+)?$")  # names in the folder, of whole files and of parts
FOR_TRAINING = Terms(for_training=True)


@dataclass(frozen=True)
class Downloads:
    """How images are fetched, by each of several processes.

    What came is kept in `folder`, so that a second start does not fetch it again; None keeps nothing.
    """

    terms: Terms = FOR_TRAINING
    at_once: int = 64
    per_host: int = 16
    folder: str | None = None

    def share(self, processes: int, folder: str) -> Downloads:
        """What one of so many processes may do: each does something."""
        among = max(1, processes)
        return Downloads(self.terms, max(1, self.at_once // among), max(1, self.per_host // among), folder)

    def fetch(self, url: str) -> bytes:
        """Body of a URL. Raises as `download`."""
        if self.folder is None:
            return self._fetch(url)
        digest = hashlib.sha256(f"{self.terms.for_training} {unsigned(url)}".encode()).hexdigest()
        path = os.path.join(self.folder, digest[:2], digest)
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            return file.read()
        data = self._fetch(url)
        part = f"{path}.{os.getpid()}-{threading.get_ident()}"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(part, "wb") as file:
                file.write(data)
            os.replace(part, path)  # what has its name is whole
        except OSError:  # a full disk: whoever writes the image itself says so
            with contextlib.suppress(OSError):
                os.unlink(part)
        return data

    def _fetch(self, url: str) -> bytes:
        with HOSTS.turn(_host(url), self.per_host):
            return download(url, self.terms)


def forget(folder: str) -> None:
    """Remove what `Downloads` kept in a folder, and the folder where it held nothing else."""
    for path in Path(folder).glob("[0-9a-f][0-9a-f]/*"):
        if KEPT.match(path.name):
            path.unlink(missing_ok=True)
    for path in [*Path(folder).glob("[0-9a-f][0-9a-f]"), Path(folder)]:
        with contextlib.suppress(OSError):  # it holds something else, or is not there
            path.rmdir()


def _host(url: str) -> str:
    try:
        return urlsplit(without_user(url.strip())).netloc.lower()
    except ValueError:  # no URL, which is said when it is fetched
        return ""


class _Hosts:
    """Turns of the threads of a process at each host. A host that nobody asks is forgotten."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[tuple[str, int], tuple[threading.Semaphore, int]] = {}  # with how many hold or wait for one

    @contextlib.contextmanager
    def turn(self, host: str, most: int) -> Iterator[None]:
        """Wait until fewer than `most` threads ask a host, and be one of them within the block."""
        name = host, most
        with self._lock:
            turns, users = self._turns.get(name, (threading.Semaphore(most), 0))
            self._turns[name] = turns, users + 1
        try:
            with turns:
                yield
        finally:
            with self._lock:
                turns, users = self._turns.pop(name)
                if users > 1:
                    self._turns[name] = turns, users - 1


HOSTS = _Hosts()
DEFAULT = Downloads()
