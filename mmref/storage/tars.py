"""Tars as they lie on a disk or behind a URL: their members' headers, without the members' bytes.

Headers are read with what lies around them, a block at a time: small members that follow cost no further read, and large ones
are stepped over. Behind a URL a block is a range request; a server that gives no ranges is read once from end to end.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmref.errors import SourceError
from mmref.storage.locations import UNTOLD, endless, file_system, is_url
from mmref.storage.retries import retry
from mmref.storage.secrets import told

LOCAL_BLOCK, REMOTE_BLOCK = 8 << 10, 4 << 20  # bytes; a request takes as long as some megabytes of a stream
BLOCK = tarfile.BLOCKSIZE
END = bytes(BLOCK)
TIMES = {b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname", b"comment"}  # of no interest here
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\3\4": "zip"}
UNPACK = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd"}
STAMPS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Last-Modified", "LastModified", "last_modified", "mtime")


class Member(NamedTuple):
    """A member of a tar: where its bytes lie, and whether it is a plain file."""

    name: str  # bytes that are no UTF-8 as surrogates
    offset: int
    size: int
    is_file: bool
    is_folder: bool


def tar_stamp(place: str) -> str:
    """Size and time of a tar, or its tag on a storage: another text once the tar was replaced.

    Raises:
        OSError: there is no such file. StorageError, FileSystemMissingError.
    """
    if not is_url(place):
        return stamp_of(retry(f"look at {place}", lambda: os.stat(place)))
    fs, inner = file_system(place)
    return _stamp_of_answer(retry(f"look at {told(place)}", lambda: fs.info(inner)))


def stamp_of(found: os.stat_result) -> str:
    """As `tar_stamp`, of a file of this machine. Whole seconds: what copies files does not always keep more."""
    return f"{found.st_size} {int(found.st_mtime)}"


def size_in(stamp: str) -> int:
    """The size alone, of what `tar_stamp` gave, or UNTOLD."""
    size = stamp.partition(" ")[0]
    return int(size) if size.isdigit() else UNTOLD


def _stamp_of_answer(info: dict[str, Any]) -> str:
    tag = next((str(info[name]) for name in STAMPS if info.get(name)), "")
    return f"{info.get('size')} {tag.strip()}"


class Tar:
    """A tar that is open. After `members` has ended, `headers` is a hash of names, sizes and times of all members, and `broken`
    says where the tar is damaged, "" where it is not.

    Raises:
        OSError: there is no such file, or it may not be read. StorageError, FileSystemMissingError.
        SourceError: it is packed, or no file.
    """

    def __init__(self, place: str) -> None:
        self.place, self.broken, self.ranges = place, "", True
        self._digest = hashlib.sha256()
        self._file, self._buffer, self._at = -1, b"", 0
        if is_url(place):
            self._fs, self._inner = file_system(place)
            info = retry(f"look at {told(place)}", lambda: self._fs.info(self._inner))
            self.size, self.stamp, self._block = info.get("size"), _stamp_of_answer(info), REMOTE_BLOCK
            if self.size is None:  # a server that does not say how much comes gives no parts of it either
                self._take_whole(retry(f"read {told(place)}", lambda: self._fs.cat_file(self._inner)))
        else:
            if why := endless(place):
                raise SourceError(f"{why}: name a tar.")
            self._file = retry(f"open {place}", lambda: os.open(place, os.O_RDONLY))
            found = os.fstat(self._file)
            self.size, self.stamp, self._block = found.st_size, stamp_of(found), LOCAL_BLOCK
        try:
            self._check_unpacked()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Tar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @property
    def headers(self) -> str:
        """64 hex digits."""
        return self._digest.hexdigest()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the tar; fewer where it ends before."""
        begin = offset - self._at
        if begin < 0 or begin + size > len(self._buffer):
            self._fill(offset, size)
            begin = offset - self._at
        return self._buffer[begin : begin + size]

    def members(self) -> Iterator[Member]:
        """All members in order, as far as the tar can be read."""
        at = 0
        while True:
            block = self.read(at, BLOCK)
            if not block or block == END:
                self.broken = "it is empty" if at == 0 and not self.size else self._behind_end(at)
                return
            try:
                found, behind = self._plain(at, block) or self._special(at)
                if found.size < 0 or behind <= at:  # the same header would be read for ever
                    raise ValueError("its size is no size")
            except (tarfile.TarError, ValueError) as error:
                self.broken = f"no header of a member at byte {at}: {error}"
                return
            if found.is_file and found.offset + found.size > self.size:
                self.broken = f"it ends at byte {self.size}, inside of {found.name!a}"
                return
            at = behind
            yield found

    def _behind_end(self, at: int) -> str:
        """What is wrong with the mark of the end at a byte: only zeros belong behind it."""
        for start in range(at, self.size, REMOTE_BLOCK):
            part = self.read(start, REMOTE_BLOCK)
            if part.count(0) < len(part):
                return (
                    f"it has the mark of its end at byte {at}, and data behind it (if tars were joined, give each, or join them "
                    "with `tar -A`; else copy it again)"
                )
        return ""

    def _plain(self, at: int, block: bytes) -> tuple[Member, int] | None:
        """A plain file, whose name and times may stand in a header before it, and where the next header lies; None for what
        else a tar may hold. Python's own reader takes four times as long, as much as all else that is done to a sample.

        Raises ValueError for what is no header.
        """
        digest, named = [block], None
        _check(block)
        if (kind := block[156:157]) in b"xL":
            size = _octal(block[124:136])
            data = self.read(at + BLOCK, size)
            named = data.rstrip(b"\0") if kind == b"L" else _path_of(data)
            if named is None or len(data) < size:
                return None
            at += BLOCK + _padded(size)
            block = self.read(at, BLOCK)
            _check(block)
            digest += [data, block]
        if block[156:157] not in b"0\0" or block[124] & 0x80:  # a size of more than 8 GB is no octal number
            return None
        name = named or block[:100].partition(b"\0")[0]
        if not named and block[257:263] == b"ustar\0" and block[345]:
            name = block[345:500].partition(b"\0")[0] + b"/" + name
        if name.endswith(b"/"):  # a folder, as of old programs
            return None
        for part in digest:
            self._digest.update(part)
        size = _octal(block[124:136])
        return Member(name.decode("utf-8", "surrogateescape"), at + BLOCK, size, True, False), at + BLOCK + _padded(size)

    def _special(self, at: int) -> tuple[Member, int]:
        """Any member, as Python's own reader understands it, and where the next header lies."""
        tar = tarfile.TarFile(fileobj=_Reading(self, at), encoding="utf-8", errors="surrogateescape")
        info = tar.next()
        if info is None:
            raise tarfile.ReadError("nothing behind it")
        self._digest.update(f"{info.name}\0{info.size}\0{info.mtime}\0".encode("utf-8", "surrogateescape"))
        found = Member(info.name, info.offset_data, info.size, info.isreg() and not info.issparse(), info.isdir())
        return found, tar.offset

    def _fill(self, offset: int, size: int) -> None:
        wanted = max(size, self._block)
        if self._file >= 0:
            data = retry(f"read {self.place}", lambda: os.pread(self._file, wanted, offset))
        elif not self.ranges or offset >= self.size:  # some storages refuse a range behind the end
            return
        else:
            end = min(offset + wanted, self.size)
            if offset == 0 and BLOCK < end == self.size:  # less than all of it, to see whether parts are given
                end -= BLOCK
            data = retry(f"read {told(self.place)}", lambda: self._fs.cat_file(self._inner, start=offset, end=end))
            if len(data) > end - offset:
                self._take_whole(data)
                return
        self._buffer, self._at = data, offset

    def _take_whole(self, data: bytes) -> None:
        """A server has sent all of the tar where a part of it was asked for."""
        self._buffer, self._at, self.size, self.ranges = data, 0, len(data), False

    def _check_unpacked(self) -> None:
        begin = self.read(0, 8)
        kind = next((kind for magic, kind in PACKED.items() if begin.startswith(magic)), "")
        if kind:
            how = f"unpack it (`{UNPACK[kind]}`)" if kind in UNPACK else "make a tar of it"
            raise SourceError(
                f"{told(self.place)} is packed with {kind}, so no sample in it can be read alone: {how} and name the tar."
            )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _octal(field: bytes) -> int:
    digits = field.strip(b"\0 ") or b"0"
    if not digits.isdigit():  # Python would take a sign
        raise ValueError("a number of it is none")
    return int(digits, 8)


def _check(block: bytes) -> None:
    """Raise ValueError unless a block is a header: it holds the sum of its own bytes."""
    if len(block) < BLOCK or sum(block) - sum(block[148:156]) + 8 * 32 != _octal(block[148:156].partition(b"\0")[0]):
        raise ValueError("its sum is wrong")


def _path_of(records: bytes) -> bytes | None:
    """The name that attributes (pax) give a member, b"" where they leave it; None where they say more of it than times."""
    path, at = b"", 0
    while at < len(records):
        length, space, _ = records[at : at + 12].partition(b" ")
        if not space or not length.isdigit() or int(length) < 5:
            return None
        name, _, value = records[at + len(length) + 1 : at + int(length) - 1].partition(b"=")
        if name == b"path":
            path = value
        elif name not in TIMES:
            return None
        at += int(length)
    return path


class _Reading(io.RawIOBase):
    """A tar as a file that the standard library reads."""

    def __init__(self, tar: Tar, at: int) -> None:
        self._tar, self._position = tar, at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._tar.size}[whence] + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        data = self._tar.read(self._position, self._tar.size - self._position if size < 0 else size)
        self._position += len(data)
        return data
