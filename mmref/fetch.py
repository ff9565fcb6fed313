"""Bytes of an image that a table, a folder or an index names: a path, an http(s) URL, or a URL that fsspec opens.

A name is tried as it is written. Where there is no such file, it may be there in the other form of Unicode (a Mac keeps é as
two characters), quoted, or with the backslashes of Windows; a file whose name differs in capitals is named in the message.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import time
import unicodedata
import urllib.error
import urllib.request
from collections import deque
from functools import lru_cache
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from mmref import __version__
from mmref.errors import SampleError
from mmref.locations import is_url, join, read_bytes, size_of

TIMEOUT_S = 30  # of one download
ATTEMPTS, PAUSE_S = 3, 0.5  # the pause doubles
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # answers that may be another one in a moment
KEPT = "%/:?[]@!$&'()*+,;=~|"  # in a URL; a browser leaves them too
FOLDERS = 16  # whose names are kept, to look for other spellings


def locate(ref: str, root: str) -> str:
    """Path or URL of an image cell: a URL, `~` or an absolute path, or relative to `root`."""
    ref = os.path.expanduser(ref) if ref.startswith("~") else ref
    return ref if is_url(ref) or os.path.isabs(ref) else join(root, ref)


def read_location(place: str) -> bytes:
    """Bytes of a path or URL.

    Raises:
        OSError, SampleError: this one cannot be read.
        StorageError: the storage keeps failing. FileSystemMissingError.
    """
    scheme = place.partition("://")[0].lower() if is_url(place) else ""
    if scheme in ("http", "https"):
        return _download(place)
    if scheme == "file":
        place = place[len("file://") :].removeprefix("localhost")
    elif scheme:
        return _read_url(place, scheme)
    if scheme and not os.path.lexists(place) and os.path.lexists(unquote(place)):
        place = unquote(place)
    if size_of(place) is None:
        if os.path.exists(place):  # a pipe would be waited for without end
            raise OSError(f"{place} is no file")
        place = _as_spelled(place)
    return read_bytes(place)


def _read_url(place: str, scheme: str) -> bytes:
    """From a file system of fsspec. An unknown kind of URL is a fault of this name; a package that is missing is not."""
    import fsspec

    if scheme not in fsspec.available_protocols():
        raise SampleError(f"{place}: nothing opens URLs that begin with {scheme}://")
    try:
        return read_bytes(place)
    except FileNotFoundError:
        for form in ("NFC", "NFD"):
            if (other := unicodedata.normalize(form, place)) != place:  # type: ignore[arg-type]
                try:
                    return read_bytes(other)
                except FileNotFoundError:
                    continue
        raise


# -- the web ---------------------------------------------------------------------------------------------------------


def quoted(url: str) -> str:
    """An http(s) URL as a browser sends it: spaces and letters beyond ASCII quoted, the rest as it is. Raises ValueError."""
    parts = urlsplit(url.strip())
    host = parts.netloc if parts.netloc.isascii() else parts.netloc.encode("idna").decode()
    path, query = quote(parts.path.replace("\\", "/"), safe=KEPT), quote(parts.query, safe=KEPT)
    return urlunsplit((parts.scheme, host, path, query, ""))


def _download(url: str) -> bytes:
    """Body of an http(s) URL; what may pass is tried again. Raises OSError, SampleError for a page instead of an image."""
    try:
        request = urllib.request.Request(quoted(url), headers={"User-Agent": f"mmref/{__version__}", "Accept": "*/*"})
    except ValueError as error:
        raise SampleError(f"{url} is no URL: {error}") from None
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                data = answer.read()
            break
        except (OSError, http.client.HTTPException, ValueError) as error:
            lasting = isinstance(error, ValueError | http.client.InvalidURL) or (
                isinstance(error, urllib.error.HTTPError) and error.code not in TRY_AGAIN
            )
            if lasting or attempt == ATTEMPTS - 1:
                raise OSError(f"{url} cannot be fetched: {error}") from error
            time.sleep(PAUSE_S * 2**attempt)
    if re.match(rb"\s*(<!doctype html|<html)", data[:200], re.IGNORECASE):
        raise SampleError(f"{url} is a web page, not an image: it may ask for a login, or show the image")
    return data


# -- names on disk ---------------------------------------------------------------------------------------------------


def _as_spelled(path: str) -> str:
    """The path of the file that is meant by a path that does not exist. Raises FileNotFoundError, which says what is near."""
    found, parts = os.sep, deque(os.path.abspath(path).split(os.sep)[1:])
    while parts:
        part = parts.popleft()
        if os.path.lexists(os.path.join(found, part)):
            found = os.path.join(found, part)
            continue
        if "\\" in part:
            parts.extendleft(reversed([name for name in part.split("\\") if name]))
            continue
        near = _names(found, _changed(found)).get(_folded(part), [])
        same = [name for name in near if unicodedata.normalize("NFC", name) == unicodedata.normalize("NFC", part)]
        if len(same) != 1:
            raise FileNotFoundError(errno.ENOENT, _reason(path, found, near, same), path)
        found = os.path.join(found, same[0])
    return found


def _reason(path: str, folder: str, near: list[str], same: list[str]) -> str:
    if same:
        return f"No such file, and {folder} has the name in {len(same)} other forms of Unicode (NFC, NFD)"
    if near:
        return f"No such file; {folder} has {near[0]!r}, with other capitals"
    if re.search(r"(^|/)[A-Za-z]:[\\/]", path):
        return "No such file: a path of Windows, which means nothing here (--image-root names the folder)"
    return os.strerror(errno.ENOENT)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _changed(folder: str) -> int:
    return os.stat(folder).st_mtime_ns if os.path.isdir(folder) else 0


@lru_cache(FOLDERS)
def _names(folder: str, changed: int) -> dict[str, list[str]]:
    """Names in a folder by what they are without capitals; {} where they cannot be read. `changed`: a later one is another."""
    names: dict[str, list[str]] = {}
    try:
        for name in os.listdir(folder):
            names.setdefault(_folded(name), []).append(name)
    except OSError:
        return {}
    return names
