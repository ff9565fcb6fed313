"""Disks: a full one is told by its name, and what was written is there after a crash."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mmref.errors import MMRefError, StorageError

FULL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, the limit on a file's size


@contextlib.contextmanager
def told_when_full(place: str | os.PathLike[str], needed: int | None = None) -> Iterator[None]:
    """Turn the full disk that something inside meets into a StorageError.

    Args:
        place: what is written, for the message; it need not exist yet.
        needed: bytes that it takes, where that is known.

    Raises:
        StorageError: the disk, a quota or the limit on a file's size is reached.
    """
    try:
        yield
    except MMRefError:
        raise
    except Exception as error:  # safetensors and faiss have errors of their own, with the system's words in them
        if not is_full(error):
            raise
        known = next((folder for folder in (Path(place), *Path(place).absolute().parents) if folder.exists()), Path("/"))
        need = "" if needed is None else f"{needed:,} bytes are needed, "
        raise StorageError(
            f"no space left for {place}: {need}{shutil.disk_usage(known).free:,} bytes are free ({error}). Free space (or raise "
            "the quota), then start the same command: what is whole already is kept."
        ) from error


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that a disk, a quota or the limit on a file's size is reached."""
    words = [os.strerror(code) for code in FULL_CODES] + [f"os error {code}" for code in FULL_CODES]  # of libraries in Rust
    while error is not None:
        if getattr(error, "errno", None) in FULL_CODES or any(said in str(error) for said in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def sync_files(folder: Path) -> None:
    """Have the disk hold all files below a folder, and their names, before what names them is written. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink():
            sync(path)


def sync(path: Path) -> None:
    """Have the disk hold a file, or the names in a folder. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot for folders
            raise
    finally:
        os.close(handle)
