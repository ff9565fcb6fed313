"""Shards of object storage on a node's disk: bounded, shared by the processes of the node, safe against crashes.

A shard is downloaded to a temporary name and moved into place, so what has its name is whole; a download that a crash cut
short is removed by the next process that wants the shard. When the disk budget is reached, the shards unused for longest
go. One that is still open in some process can go too: its bytes stay readable until it is closed.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
from pathlib import Path

from mmref.errors import ShardSetError
from mmref.storage.fetch import unsigned
from mmref.storage.locations import UNTOLD, file_system, size_told
from mmref.storage.locks import one_at_a_time
from mmref.storage.retries import retry
from mmref.storage.secrets import told

FETCHES = "fetches.log"
LONGEST = 100  # bytes that a shard's own name has in the name of its copy
OWN = re.compile(r"[0-9a-f]{16}-.*", re.DOTALL)  # names of copies


class ShardCache:
    """Whole shards under `folder`, at most `limit` bytes of them."""

    def __init__(self, folder: str, limit: int) -> None:
        self.folder, self.limit = Path(folder).expanduser(), limit
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, url: str, content: str = "") -> str:
        """Local path of a shard, downloaded when it is not here yet. Raises OSError, StorageError, ShardSetError.

        Args:
            content: its sha256 in the manifest, by which a shard that was built anew at the same place is another one.
        """
        # What signs a URL is another the next day, and would make a name longer than a disk takes.
        where = unsigned(url)
        last = where.partition("?")[0].rsplit("/", 1)[-1].encode()[-LONGEST:].decode(errors="ignore")
        name = f"{hashlib.sha256(f'{where} {content}'.encode()).hexdigest()[:16]}-{last}"
        target = self.folder / name
        if self._touch(target):
            return str(target)
        with self._lock(name):  # one process of the node downloads, the others wait for it
            if not self._touch(target):
                for torn in self.folder.glob(f"{glob.escape(name)}.part-*"):
                    if not _is_alive(torn):  # one may be at work where the file system has no locks
                        torn.unlink(missing_ok=True)
                self._fetch(url, target)
        return str(target)

    def fetches(self) -> list[str]:
        """Names of the shards downloaded so far, by all processes of the node, in order."""
        log = self.folder / FETCHES
        return log.read_text("utf-8").split() if log.exists() else []

    def _fetch(self, url: str, target: Path) -> None:
        fs, inner = file_system(url)
        size = size_told(retry(f"look at {told(url)}", lambda: fs.size(inner)))
        self._check_fits(url, size)
        part = target.with_name(f"{target.name}.part-{os.getpid()}")
        if size != UNTOLD:
            with self._lock("room"):  # room is made and taken by one process at a time
                self._make_room(size)
                with open(part, "wb") as file:
                    file.truncate(size)  # counts from now on

        def download() -> None:
            fs.get_file(inner, str(part))
            if (got := part.stat().st_size) != size != UNTOLD:
                raise OSError(f"{size} bytes expected, {got} came")

        retry(f"read {told(url)}", download)
        if size == UNTOLD:
            try:
                self._check_fits(url, part.stat().st_size)
            except ShardSetError:
                part.unlink()
                raise
            with self._lock("room"):
                self._make_room(0)  # it is here, and counts
        os.replace(part, target)
        with open(self.folder / FETCHES, "a", encoding="utf-8") as log:
            log.write(target.name + "\n")

    def _check_fits(self, url: str, size: int) -> None:
        """Raise ShardSetError for a shard that is larger than the cache may be."""
        if size > self.limit:
            raise ShardSetError(
                f"{told(url)} has {size:,} bytes, the cache may hold {self.limit:,}: raise `data.cache_gb`, or set it to 0 to "
                "read byte ranges."
            )

    def _make_room(self, size: int) -> None:
        """Remove the shards unused for longest until there is room. What else lies in the folder stays: it may be anyone's."""
        held = []
        for path in self.folder.iterdir():
            if not OWN.fullmatch(path.name) or path.suffix == ".lock":
                continue
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                held.append((stat.st_mtime, stat.st_size, path))
        total = sum(entry[1] for entry in held)
        for _, bytes_, path in sorted(held, key=lambda entry: entry[0]):
            if total + size <= self.limit:
                return
            if ".part-" not in path.name or not _is_alive(path):
                path.unlink(missing_ok=True)
                total -= bytes_

    def _touch(self, target: Path) -> bool:
        """Mark as used now; False when it is not here."""
        try:
            os.utime(target)
        except FileNotFoundError:
            return False
        return True

    def _lock(self, name: str) -> contextlib.AbstractContextManager[bool]:
        return one_at_a_time(self.folder / f"{name}.lock")


def _is_alive(part: Path) -> bool:
    """Whether the process that downloads to this temporary name still runs."""
    return Path(f"/proc/{part.name.rsplit('-', 1)[-1]}").exists()
