"""Storage that fails for a moment (a full disk, a network, a busy object store) does not end a run; files one process holds;
a full disk told by its name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from mmref.errors import MMRefError, StorageError

T = TypeVar("T")

PATIENCE_S = 60.0  # how long an operation is tried again before StorageError
FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 10.0
LEASE_S, LOOK_S = 120.0, 2.0  # NFS gives up a lost client's locks after 90
# answers rather than failures: trying again would get the same
PERMANENT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
PERMANENT_CODES = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EROFS, errno.ENOTSUP, errno.ENXIO}
FULL_CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's quota, the limit on a file's size
# libraries below fsspec whose errors are not OSErrors
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "httpx", "httpcore")
# of these what says that nobody has told them who asks: waiting does not
UNKNOWN = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "SSOTokenLoadError", "UnauthorizedSSOTokenError",
    "DefaultCredentialsError", "CredentialUnavailableError",
}  # fmt: skip

log = logging.getLogger("mmref")


def is_transient(error: BaseException) -> bool:
    """Whether the same operation may succeed later."""
    if isinstance(error, OSError):
        return not isinstance(error, PERMANENT) and error.errno not in PERMANENT_CODES
    return _of_client(error) and type(error).__name__ not in UNKNOWN


def _of_client(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in CLIENTS


def retry(what: str, action: Callable[[], T]) -> T:
    """Result of an action that may be repeated, tried again with growing pauses for PATIENCE_S seconds.

    Args:
        what: what it does and where, for the message: "write s3://bucket/run/config.yaml".

    Raises:
        StorageError: it still fails after that time, or has no credentials to ask with. Permanent errors (no such file, no
            permission) pass as they are.
    """
    began, delay = time.monotonic(), FIRST_DELAY_S
    while True:
        try:
            return action()
        except Exception as error:
            if _of_client(error) and type(error).__name__ in UNKNOWN:
                raise StorageError(
                    f"cannot {what}: {type(error).__name__}: {error}. Give this process the storage's credentials: for s3:// "
                    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
                ) from error
            if not is_transient(error):
                raise
            if time.monotonic() - began + delay > PATIENCE_S:
                raise StorageError(
                    f"cannot {what}: {type(error).__name__}: {error}. Tried for {time.monotonic() - began:.0f} s. Free "
                    "space or mend the storage, then start the same command: it resumes."
                ) from error
            log.warning("cannot %s: %s: %s; trying again in %.1f s", what, type(error).__name__, error, delay)
        time.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY_S)


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
        known = next(
            (folder for folder in (Path(place), *Path(place).absolute().parents) if folder.exists()), Path("/")
        )
        need = "" if needed is None else f"{needed:,} bytes are needed, "
        raise StorageError(
            f"no space left for {place}: {need}{shutil.disk_usage(known).free:,} bytes are free ({error}). Free space (or raise "
            "the quota), then start the same command: what is whole already is kept."
        ) from error


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that a disk, a quota or the limit on a file's size is reached."""
    words = [os.strerror(code) for code in FULL_CODES] + [
        f"os error {code}" for code in FULL_CODES
    ]  # of libraries in Rust
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


@contextlib.contextmanager
def held(path: str) -> Iterator[None]:
    """Hold a file, which the kernel gives back however this process ends; nothing where the file system has no locks.

    A holder on another machine is given LEASE_S to end: a network file system keeps a lost machine's locks that long.

    Raises:
        BlockingIOError: another process holds it; the text says which.
        FileNotFoundError: its folder is not there.
    """
    host, until, waiting = socket.gethostname(), time.monotonic() + LEASE_S, False
    while True:
        with open(path, "a+") as file:
            while holder := _lock(file):
                if f" on {host} " in holder or time.monotonic() > until:
                    raise BlockingIOError(holder)
                if not waiting:
                    log.warning(
                        "%s is in use: %s, or its machine was lost; waiting up to %.0f s", path, holder, LEASE_S
                    )
                    waiting = True
                time.sleep(LOOK_S)
            if not _is_at(file, path):
                continue  # who held it has removed it, and another may hold the one that is there now
            file.truncate(0)
            text = f"process {os.getpid()} on {host} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
            with contextlib.suppress(OSError):  # a full disk; unbuffered, so that closing does not try again
                os.write(file.fileno(), text.encode())
            yield
            return


@contextlib.contextmanager
def one_at_a_time(path: str | os.PathLike[str]) -> Iterator[None]:
    """One process of this node at a time, the others wait; the kernel lets go for a process that dies. Raises OSError."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_at(file: TextIO, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(file: TextIO) -> str:
    """Who holds the file; "" where it is this process now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read() or "another process"
    except OSError:
        log.warning("%s cannot be locked on this file system: do not start the same twice", file.name)
    return ""
