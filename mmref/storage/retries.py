"""Storage that fails for a moment (a full disk, a network, a busy object store) does not end a run."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from mmref.errors import StorageError
from mmref.storage.secrets import said

T = TypeVar("T")

PATIENCE_S = 60.0  # how long an operation is tried again before StorageError
FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 10.0
# These are answers rather than failures: trying again would get the same.
PERMANENT = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
PERMANENT_CODES = {errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EROFS, errno.ENOTSUP, errno.ENXIO}
# These are the libraries below fsspec whose errors are not OSErrors.
CLIENTS = ("botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "httpx", "httpcore")
# These errors of theirs say that credentials are missing, which waiting does not bring.
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
                    f"cannot {what}: {type(error).__name__}: {said(error)}. Give this process the storage's credentials: for "
                    "s3:// AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
                ) from error
            if not is_transient(error):
                raise
            if time.monotonic() - began + delay > PATIENCE_S:
                raise StorageError(
                    f"cannot {what}: {type(error).__name__}: {said(error)}. Tried for {time.monotonic() - began:.0f} s. Free "
                    "space or mend the storage, then start the same command: it resumes."
                ) from error
            log.warning("cannot %s: %s: %s; trying again in %.1f s", what, type(error).__name__, said(error), delay)
        time.sleep(delay)
        delay = min(2 * delay, LONGEST_DELAY_S)
