"""Images that a table, a folder or an index names: where they lie, whether a table may name them, their bytes and ids.

A name is tried as it is written. Where there is no such file, it may be there in the other form of Unicode (a Mac keeps é as
two characters), quoted, or with the backslashes of Windows; a file whose name differs in capitals is named in the message.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import unicodedata
from collections import deque
from functools import lru_cache
from urllib.parse import unquote

from mmref.errors import OutsideError, SampleError
from mmref.storage.download import download
from mmref.storage.locations import check_installed, is_url, join, read_bytes, size_of
from mmref.storage.secrets import without_user

FOLDERS = 16  # whose names are kept, to look for other spellings
OUTSIDE = "--allow-outside"  # the flag of `mmref index` and `mmref shards build table`
OUTSIDE_HELP = (
    "take images from anywhere: absolute paths and links that lead out of the image root, file:// and URLs of storage (s3://, "
    "gs://, ...) beyond it; http(s) URLs and what lies below the root need no flag"
)
LONGEST_NAME, HASHED = 80, 12  # characters of an id: of the file's name, and digits that tell such names apart
SIGNED = re.compile(  # parameters of a URL that differ at each signing (S3, CloudFront, Google, Azure)
    r"(x-amz-|x-goog-)[^=]*|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy|"
    r"sig|s[eptvr]|spr|sip|skoid|sktid|skt|ske|sks|skv",
    re.IGNORECASE,
)
SIGNATURE = re.compile(r"(^|&)(x-amz-signature|x-goog-signature|signature|sig)=", re.IGNORECASE)


def locate(ref: str, root: str) -> str:
    """Path or URL of an image cell: a URL, `~` or an absolute path, or relative to `root`. `./a.png` is `a.png`."""
    ref = os.path.expanduser(ref) if ref.startswith("~") else ref
    if not is_url(ref):
        parts = "/".join(part for part in ref.split("/") if part != ".")
        ref = parts if os.path.isabs(ref) else parts.lstrip("/")
    return ref if is_url(ref) or os.path.isabs(ref) else join(root, ref)


def locate_inside(ref: str, root: str) -> str:
    """`locate` of a cell of a table that may be anybody's: http(s), or below `root` with all links followed.

    Raises:
        OutsideError: it lies elsewhere.
        SampleError, FileSystemMissingError: nothing here opens such URLs.
    """
    place = locate(ref, root)
    scheme = _scheme(place)
    if scheme in ("http", "https"):
        return place
    if scheme not in ("", "file"):
        _known(place, scheme)
        inside = f"{root.rstrip('/')}/"
        parts = re.split(r"[/\\]", unquote(place))
        if not place.startswith(inside) or ".." in parts or "::" in place:
            check_installed(place)  # or the flag would be found to help nothing
            raise OutsideError(f"{ref!r} lies outside of {root}: {OUTSIDE} allows it")
        return place
    if _scheme(root) not in ("", "file"):
        raise OutsideError(f"{ref!r} is a path of this machine, and the table's images lie below {root}: {OUTSIDE} allows it")
    try:
        found = os.path.realpath(_file(place))
    except OSError:  # what reads it says so; the name alone decides
        found = os.path.realpath(unquote(_path(place)).replace("\\", "/"))
    top = os.path.realpath(_path(root))
    if os.path.commonpath([found, top]) != top:
        raise OutsideError(f"{ref!r} leads to {found}, outside of {top}: {OUTSIDE} allows it")
    return place


def one_spelling(place: str) -> str:
    """A place as all of its spellings are that `read_location` takes for one: without a URL's scheme where it is of this machine,
    without `..` and doubled slashes, composed where Unicode has two forms. Of another URL the form alone is changed: the rest
    of it may matter there."""
    place = unicodedata.normalize("NFC", place)
    if _scheme(place) not in ("", "file"):
        return place
    path = _path(place)
    path = unquote(path) if path != place else path
    return os.path.normpath(path.replace("\\", "/"))


def outside_most(place: str, root: str, refused: list[tuple[str, str]], rows: int) -> str:
    """Why a table is not worth beginning with: most of its rows name images outside of the root; "" where that is not so.

    Args:
        refused: each such row, and why.
        rows: of the table, all of them.
    """
    if 2 * len(refused) <= rows or not refused:
        return ""
    row, why = refused[0]
    return (
        f"{place}: {len(refused):,} of {rows:,} rows name images outside of {root} ({row}: {why}). If you trust the table, give "
        f"{OUTSIDE}, or the folder that they lie below with --image-root."
    )


def id_of(ref: str) -> str:
    """The id of an image that a table names, which everybody sees who searches: the cell where it is relative; else the file's
    name and digits of a hash of the cell, which tell neither folders nor keys. Another signature or password changes nothing."""
    if not (is_url(ref) or ref.startswith("~") or os.path.isabs(ref)):
        return ref
    place = unsigned(ref)
    path = place.partition("://")[2].partition("/")[2] if is_url(place) else place
    path = re.split(r"[?#]", path)[0] if _scheme(place) in ("http", "https") else path
    stem, ending = os.path.splitext(re.split(r"[/\\]", path.rstrip("/\\"))[-1])
    digest = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:HASHED]
    return f"{stem[:LONGEST_NAME] or 'image'}-{digest}{ending[:LONGEST_NAME]}"


def unsigned(ref: str) -> str:
    """An http(s) URL without user and password, and without what signs it, and when; anything else as it is."""
    ref = without_user(ref)
    base, mark, query = ref.partition("?")
    if _scheme(ref) not in ("http", "https") or not SIGNATURE.search(query):
        return ref
    kept = [part for part in query.split("&") if not SIGNED.fullmatch(part.partition("=")[0])]
    return base + (mark + "&".join(kept) if kept else "")


def read_location(place: str) -> bytes:
    """Bytes of a path or URL.

    Raises:
        OSError, SampleError: this one cannot be read.
        StorageError: the storage keeps failing. FileSystemMissingError.
    """
    scheme = _scheme(place)
    if is_web(place):
        return download(place)
    return read_bytes(_file(place)) if scheme in ("", "file") else _read_url(place, scheme)


def is_web(place: str) -> bool:
    """Whether a place is an http(s) URL."""
    return _scheme(place) in ("http", "https")


def _scheme(place: str) -> str:
    return place.partition("://")[0].lower() if is_url(place) else ""


def _path(place: str) -> str:
    """The path that a place of this machine is, or that its file:// URL names."""
    return re.sub(r"^file://(localhost(?=/))?", "", place, flags=re.IGNORECASE)


def _file(place: str) -> str:
    """The file of this machine that is meant. Raises OSError, StorageError."""
    path = _path(place)
    if path != place and not os.path.lexists(path) and os.path.lexists(unquote(path)):
        path = unquote(path)
    if size_of(path) is None:
        if os.path.exists(path):  # a pipe would be waited for without end
            raise OSError(f"{path} is no file")
        path = _as_spelled(path)
    return path


def _known(place: str, scheme: str) -> None:
    """Raise SampleError for a kind of URL that does not exist: a fault of this name; a package that is missing is not."""
    import fsspec

    if scheme not in fsspec.available_protocols():
        raise SampleError(f"{place}: nothing opens URLs that begin with {scheme}://")


def _read_url(place: str, scheme: str) -> bytes:
    """From a file system of fsspec."""
    _known(place, scheme)
    try:
        return read_bytes(place)
    except FileNotFoundError:
        for form in ("NFC", "NFD"):
            if (other := unicodedata.normalize(form, place)) != place:
                try:
                    return read_bytes(other)
                except FileNotFoundError:
                    continue
        raise


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
