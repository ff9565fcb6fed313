"""Shards of object storage on a node's disk: bounded, shared by the processes of the node, safe against crashes.

A shard is downloaded to a temporary name and moved into place, so what has its name is whole; a download that a crash cut
short is removed by the next process that wants the shard. When the disk budget is reached, the shards unused for longest
go. One that is still open in some process can go too: its bytes stay readable until it is closed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from mmref.errors import ShardSetError
from mmref.storage.locations import file_system, told
from mmref.storage.locks import one_at_a_time
from mmref.storage.retries import retry

FETCHES = "fetches.log"


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
        name = hashlib.sha256(f"{url} {content}".encode()).hexdigest()[:16] + "-" + url.rsplit("/", 1)[-1]
        target = self.folder / name
        if self._touch(target):
            return str(target)
        with self._lock(name):  # one process of the node downloads, the others wait for it
            if not self._touch(target):
                for torn in self.folder.glob(f"{name}.part-*"):
                    torn.unlink(missing_ok=True)
                self._fetch(url, target)
        return str(target)

    def fetches(self) -> list[str]:
        """Names of the shards downloaded so far, by all processes of the node, in order."""
        log = self.folder / FETCHES
        return log.read_text("utf-8").split() if log.exists() else []

    def _fetch(self, url: str, target: Path) -> None:
        fs, inner = file_system(url)
        size = int(retry(f"read {told(url)}", lambda: fs.size(inner)))
        if size > self.limit:
            raise ShardSetError(
                f"{url} has {size:,} bytes, the cache may hold {self.limit:,}: raise `data.cache_gb`, or set it to 0 to "
                "read byte ranges."
            )
        part = target.with_name(f"{target.name}.part-{os.getpid()}")
        with self._lock("room"):  # room is made and taken by one process at a time
            self._make_room(size)
            with open(part, "wb") as file:
                file.truncate(size)  # counts from now on

        def download() -> None:
            fs.get_file(inner, str(part))
            if (got := part.stat().st_size) != size:
                raise OSError(f"{size} bytes expected, {got} came")

        retry(f"read {told(url)}", download)
        os.replace(part, target)
        with open(self.folder / FETCHES, "a", encoding="utf-8") as log:
            log.write(target.name + "\n")

    def _make_room(self, size: int) -> None:
        held = []
        for path in self.folder.iterdir():
            if path.name.endswith(".lock") or path.name == FETCHES:
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

    def _lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        return one_at_a_time(self.folder / f"{name}.lock")


def _is_alive(part: Path) -> bool:
    """Whether the process that downloads to this temporary name still runs."""
    return Path(f"/proc/{part.name.rsplit('-', 1)[-1]}").exists()
