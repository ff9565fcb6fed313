"""Paths and URLs: what a text that names a place means, and reading what lies there.

A URL is whatever fsspec opens (s3://, gs://, http://, ...); anything else is a path of this machine, or of a file system
that is mounted on it. Both are read with the same patience: mounted storage fails for a moment as a network does.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmref.errors import FileSystemMissingError, PathError
from mmref.storage.retries import is_transient, retry
from mmref.storage.secrets import told

ODD_BYTE = re.compile(r"\\x[89a-f][0-9a-f]")
VARIABLE = re.compile(r"(?:^|/)(\$\w+)(?=/|$)|(\$\{\w+\})")
ONE_SLASH = re.compile(r"(s3a?|gcs|gs|az|abfss?|https?|hdfs|file):/(?!/)")

UNTOLD = -1  # the size of a file whose web server does not say how much comes
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def bypass_proxies() -> None:
    """Reach this machine directly where proxies are set, as in company networks: an S3 endpoint or table here, Ray's services."""
    if not any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES):
        return
    named = [name.strip() for name in (os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "").split(",")]
    direct = ",".join(dict.fromkeys([*filter(None, named), *LOOPBACK]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*" if "*" in named else direct


def is_loopback(host: str) -> bool:
    """Whether a host is this machine itself: by its name, or by any address of loopback."""
    try:
        return host.lower().rstrip(".") == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cache_folder(name: str) -> str:
    """A folder for what can be made or fetched again: below MMREF_CACHE, else below `mmref` in the user's cache."""
    own = os.environ.get("MMREF_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "mmref")
    return os.path.join(os.path.abspath(os.path.expanduser(own)), name)


def is_url(place: str) -> bool:
    """Whether a place is a URL rather than a path."""
    return "://" in place


def absolute(place: str) -> str:
    """What means the same place in another directory: a path with `~` and `..` resolved, a URL as it is."""
    return place.rstrip("/") if is_url(place) else os.path.abspath(os.path.expanduser(place))


def file_stamps(folder: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change) of every file in a folder: where they are the same, so are the files. Raises OSError."""
    files = [(str(file.relative_to(folder)), file.stat()) for file in sorted(folder.rglob("*")) if file.is_file()]
    return [(name, found.st_size, found.st_mtime_ns) for name, found in files]


def in_utf8(place: str) -> str:
    """The place itself. Raises PathError for one that is no UTF-8, which JSON, Ray and tokenizers do not take."""
    try:
        place.encode()
    except UnicodeEncodeError:
        raise PathError(
            f"{place!a} is no UTF-8: rename the folder (`convmv -f latin1 -t utf-8`), or make a symbolic link to it (`ln -s`) "
            "and give that."
        ) from None
    return place


def expanded(place: str) -> str:
    """A path as its user means it, with `~` and `~user` expanded; a URL as it is.

    Shells leave `~` alone behind `=` and in quotes, and nothing expands it or a variable in a YAML file.

    Raises PathError where a folder of that very name would be made in silence: an empty path, a user that is not known here, a
    variable that nothing expanded, a URL with one slash or with nothing behind its slashes.
    """
    if is_url(place):
        if not place.partition("://")[2].strip("/"):
            raise PathError(f"{place} is a URL without a place: write {place.partition('://')[0]}://BUCKET/FOLDER.")
        return place
    if not place.strip() or "\0" in place:
        raise PathError(f"{place!r} is no path: give one, or leave the option out.")
    found = os.path.expanduser(place)
    if os.path.lexists(found):
        return found
    if found.startswith("~"):
        raise PathError(f"{place}: there is no home directory of {found.partition('/')[0]} here. Give the path itself, or "
                        f"./{place} for a folder of that name.")  # fmt: skip
    if variable := VARIABLE.search(found):
        raise PathError(
            f"{place} holds {variable[1] or variable[2]}, which nothing expands here: a shell does outside of single quotes. "
            "Give the path itself."
        )
    if ONE_SLASH.match(found):
        raise PathError(f"{place} is a URL with one slash: write {found.replace(':/', '://', 1)}.")
    return found


def join(root: str, *parts: str) -> str:
    """A place below another."""
    return "/".join([root.rstrip("/"), *parts]) if is_url(root) else os.path.join(root, *parts)


def folder_name(place: str) -> str:
    """The last part of a folder's path or URL."""
    return place.rstrip("/").rsplit("/", 1)[-1]


def to_text(place: str) -> str:
    """A path, or a name of a file, as text that a table, JSON, a page or a terminal can hold; `from_text` gives the path back.

    Names are bytes: those that are no UTF-8 (out of an old zip) become `\\xNN`. Backslashes of such a name, and of one that
    looks like such a text, are doubled, so that no two names share a text. All other names stay as they are.
    """
    try:
        place.encode()
    except UnicodeEncodeError:
        pass
    else:
        if not ODD_BYTE.search(place):
            return place
    return place.replace("\\", "\\\\").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def from_text(text: str) -> str:
    """The path or name that `to_text` made a text of."""
    if not ODD_BYTE.search(text):
        return text
    escapes = re.compile(rb"\\(?:x([89a-f][0-9a-f])|\\)")
    return os.fsdecode(escapes.sub(lambda m: bytes.fromhex(m[1].decode()) if m[1] else b"\\", text.encode()))


def below(root: str, name: str) -> str:
    """The file that a manifest names, of the folder it describes.

    Raises:
        ValueError: the name, or a link on the way, leads elsewhere, or to what keeps a reader waiting. Whoever wrote the
            manifest may not be a friend.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts) or is_url(name):
        raise ValueError(f"{name!r} is no name of a file below {root}")
    path = join(root, *parts)
    if not is_url(root):
        found = os.path.realpath(path)
        if os.path.commonpath([found, os.path.realpath(root)]) != os.path.realpath(root):
            raise ValueError(f"{path} is a link that leads out of {root}, to {found}: copy or link the whole folder instead")
        if why := endless(path):
            raise ValueError(why)
    return path


def endless(path: str) -> str:
    """Why a local file cannot be read to its end, in words: it is a pipe, a socket or a device. "" for any other."""
    if not os.path.exists(path) or os.path.isfile(path) or os.path.isdir(path):
        return ""
    return f"{path} is no file but a pipe, a socket or a device"


def file_system(place: str, **options: Any) -> tuple[Any, str]:
    """fsspec's file system of a place, and the path of the place on it.

    Raises:
        FileSystemMissingError: nothing here opens such URLs, or its package is not installed.
    """
    import fsspec  # takes a moment to import, which most runs need not spend

    try:
        return fsspec.core.url_to_fs(place, **options)
    except (ImportError, ValueError) as error:
        raise _missing(place, error) from None


def opened(place: str) -> Any:
    """A file or URL, open to be read piece by piece. Raises OSError, or FileSystemMissingError."""
    if not is_url(place):
        return open(place, "rb")
    fs, inner = file_system(place)
    return fs.open(inner, "rb")


def check_installed(place: str) -> None:
    """Raise FileSystemMissingError where nothing here opens such URLs; nothing is connected to."""
    import fsspec

    try:
        fsspec.get_filesystem_class(place.partition("://")[0].lower())
    except (ImportError, ValueError) as error:
        raise _missing(place, error) from None


def _missing(place: str, error: Exception) -> FileSystemMissingError:
    return FileSystemMissingError(
        f"{told(place)} needs a file system that is not installed: {error}. Install its package with pip on every node (s3://: "
        "`pip install 'mmref[s3]'`, gs://: gcsfs, az:// and abfs://: adlfs)."
    )


def read_bytes(place: str, start: int = 0, size: int | None = None) -> bytes:
    """A file, or `size` bytes of it from `start` (fewer where it ends before).

    Raises:
        StorageError: the storage keeps failing.
        OSError: there is no such file, or it may not be read.
        FileSystemMissingError: as `file_system`.
    """
    if is_url(place):
        fs, path = file_system(place)
        part = {} if size is None and not start else {"start": start, "end": None if size is None else start + size}
        return retry(f"read {told(place)}", lambda: fs.cat_file(path, **part))

    def read() -> bytes:
        with open(place, "rb") as file:
            if start:  # a pipe, as the shell's <(...) makes, cannot be moved in
                file.seek(start)
            return file.read(-1 if size is None else size)

    return retry(f"read {place}", read)


def _answered(look: Callable[[str], Any], path: str) -> Any:
    """What a file system says of a path. Raises the error behind "no such file" where it is that the host does not answer."""
    try:
        return look(path)
    except FileNotFoundError as error:
        if isinstance(cause := error.__cause__, OSError) and is_transient(cause):
            raise cause from None
        raise


def size_told(size: int | None) -> int:
    """The size of a file as fsspec tells it, or UNTOLD."""
    return UNTOLD if size is None else int(size)


def size_of(place: str) -> int | None:
    """Bytes of a file, or UNTOLD; None where there is none. Raises StorageError, FileSystemMissingError, OSError."""
    try:
        if is_url(place):
            fs, path = file_system(place)
            info = retry(f"look at {told(place)}", lambda: _answered(fs.info, path))
            return size_told(info["size"]) if info["type"] == "file" else None
        found = retry(f"look at {place}", lambda: os.stat(place))
        return found.st_size if stat.S_ISREG(found.st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_folder(place: str) -> bool:
    """Whether there is a folder, or files whose names begin as if there were. Raises StorageError, FileSystemMissingError."""
    if not is_url(place):
        return os.path.isdir(place)
    fs, path = file_system(place)
    try:
        return bool(retry(f"look at {told(place)}", lambda: _answered(fs.info, path))["type"] == "directory")
    except (FileNotFoundError, NotADirectoryError):
        return False


def sha256_of(path: str) -> str:
    """Hex digest of a local file or URL, read in 1 MiB pieces."""
    if is_url(path):
        return hashlib.sha256(read_bytes(path)).hexdigest()

    def digest() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retry(f"read {path}", digest)
