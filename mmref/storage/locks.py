"""Files and folders that one process at a time holds, on one machine or over a network file system."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from typing import TextIO

log = logging.getLogger("mmref")
LEASE_S, LOOK_S = 120.0, 2.0  # NFS gives up a lost client's locks after 90


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
        with open(path, "a+", encoding="utf-8") as file:
            while holder := _lock(file):
                if f" on {host} " in holder or time.monotonic() > until:
                    raise BlockingIOError(holder)
                if not waiting:
                    log.warning("%s is in use: %s, or its machine was lost; waiting up to %.0f s", path, holder, LEASE_S)
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
def one_at_a_time(path: str | os.PathLike[str]) -> Iterator[bool]:
    """One process of this node at a time, the others wait; the kernel lets go for a process that dies. Raises OSError.

    Gives False where the file system has no locks and others may be at it too: what is made has to be whole or absent anyway.
    """
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            alone = False
        else:
            alone = True
        yield alone


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
