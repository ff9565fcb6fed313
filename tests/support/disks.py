"""A disk that is full, without one."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def files_below(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes: the kernel refuses it as a full disk does.

    Inside of a test, never a fixture: pytest reports a test before it tears its fixtures down, and what it writes into may be a
    file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
