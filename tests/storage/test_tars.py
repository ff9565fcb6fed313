"""The reader of tars' headers finds what Python's own finds, whoever wrote the tar, and says where a tar is damaged."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from support.ranges import range_server

from mmref.errors import SourceError
from mmref.storage import tars
from mmref.storage.tars import Tar, tar_stamp

LONG = "folder/" * 30 + "long.jpg"  # longer than the fields of a plain header


def write(path: Path, form: int, members: dict[str, bytes], mtime: float = 1.5) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(place: str) -> tuple[dict[str, bytes], str]:
    with Tar(place) as tar:
        return {member.name: tar.read(member.offset, member.size) for member in tar.members() if member.is_file}, tar.broken


MEMBERS = {"a.jpg": b"x" * 1000, "é 1.txt": "é".encode(), LONG: b"", "b.json": b"{}" * 5000, "big.png": os.urandom(40_000)}


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("mtime", [0, 1.5])
def test_members_are_those_of_pythons_reader(tmp_path: Path, form: int, mtime: float) -> None:
    members = {n: d for n, d in MEMBERS.items() if form != tarfile.USTAR_FORMAT or n != LONG} | {"d" * 90 + "/" + "e" * 90: b"e"}
    path = write(tmp_path / "a.tar", form, members, mtime if form == tarfile.PAX_FORMAT else int(mtime))
    assert contents(str(path)) == (members, "")
    with tarfile.open(path) as expected, Tar(str(path)) as tar:
        assert [(m.name, m.offset_data, m.size) for m in expected] == [(m.name, m.offset, m.size) for m in tar.members()]


def test_links_folders_and_attributes_of_other_programs(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "global"}) as tar:
        folder, link = tarfile.TarInfo("folder"), tarfile.TarInfo("link.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(folder)
        tar.addfile(link)
        info = tarfile.TarInfo("x.jpg")
        info.size, info.pax_headers = 3, {"SCHILY.xattr.user.a": "b", "path": "renamed.jpg"}
        tar.addfile(info, io.BytesIO(b"abc"))
    with Tar(str(path)) as found:
        members = list(found.members())
        assert [(m.name, m.is_file, m.is_folder) for m in members] == [
            ("folder", False, True), ("link.jpg", False, False), ("renamed.jpg", True, False),
        ]  # fmt: skip
        assert found.read(members[-1].offset, 3) == b"abc" and not found.broken


def test_sizes_of_eight_gigabytes_are_understood(tmp_path: Path) -> None:
    info = tarfile.TarInfo("large.jpg")
    info.size = 9 << 30
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + (9 << 30) + 1024)  # of holes
    with Tar(str(path)) as tar:
        assert [(m.name, m.size) for m in tar.members()] == [("large.jpg", 9 << 30)] and not tar.broken


def test_damage_is_located_and_what_lies_before_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", tarfile.GNU_FORMAT, {"a.jpg": b"a" * 600, "b.jpg": b"b" * 600})
    data = path.read_bytes()
    path.write_bytes(data[: 1536 + 512 + 100])
    assert contents(str(path)) == ({"a.jpg": b"a" * 600}, f"it ends at byte {1536 + 512 + 100}, inside of 'b.jpg'")
    path.write_bytes(data[:1600] + b"\xff" + data[1601:])
    assert contents(str(path)) == ({"a.jpg": b"a" * 600}, "no header of a member at byte 1536: its sum is wrong")
    path.write_bytes(b"")
    assert contents(str(path)) == ({}, "it is empty")
    path.write_bytes(b"a page, not a tar" * 100)
    assert contents(str(path))[1].startswith("no header of a member at byte 0")


@pytest.mark.parametrize("size", [b"-0000001000\0", b"\xff" * 10 + b"\xfe\0", b"0000001_000\0"])
@pytest.mark.parametrize("kind", [b"0", b"x", b"L"])
def test_a_size_that_is_none_ends_the_tar(tmp_path: Path, size: bytes, kind: bytes) -> None:
    """A negative one would lead back to the same header, for ever."""
    path = write(tmp_path / "a.tar", tarfile.GNU_FORMAT, {"a.jpg": b"a" * 600, "b.jpg": b"b" * 600})
    data = bytearray(path.read_bytes())
    data[1536 + 124 : 1536 + 136], data[1536 + 156 : 1536 + 157] = size, kind
    data[1536 + 148 : 1536 + 156] = b" " * 8
    data[1536 + 148 : 1536 + 156] = b"%06o\0 " % sum(data[1536 : 1536 + 512])
    path.write_bytes(data)
    found, broken = contents(str(path))
    assert found == {"a.jpg": b"a" * 600} and broken.startswith("no header of a member at byte 1536: ")


def test_data_behind_the_mark_of_the_end_is_told(tmp_path: Path) -> None:
    first = write(tmp_path / "a.tar", tarfile.GNU_FORMAT, {"a.jpg": b"a" * 600})
    second = write(tmp_path / "b.tar", tarfile.GNU_FORMAT, {"b.jpg": b"b" * 600})
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    found, broken = contents(str(joined))
    assert found == {"a.jpg": b"a" * 600} and broken.startswith("it has the mark of its end at byte 1536, and data behind it")
    holes = bytearray(write(joined, tarfile.GNU_FORMAT, {"a.jpg": b"a" * 600, "b.jpg": b"b" * 9000}).read_bytes())
    holes[1536:4096] = bytes(2560)  # as a download that stopped leaves a file
    joined.write_bytes(holes)
    assert "mark of its end at byte 1536" in contents(str(joined))[1]
    joined.write_bytes(first.read_bytes() + bytes(50_000))
    assert contents(str(joined)) == ({"a.jpg": b"a" * 600}, ""), "padding"


def test_packed_tars_and_pipes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(SourceError, match=r"packed with gzip.*`gunzip`"):
        Tar(str(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SourceError, match="is no file but a pipe"):
        Tar(str(path))


def test_the_hash_of_headers_and_the_stamp_tell_of_changes(tmp_path: Path) -> None:
    def headers(members: dict[str, bytes], mtime: float = 1.5) -> str:
        with Tar(str(write(tmp_path / "a.tar", tarfile.PAX_FORMAT, members, mtime))) as tar:
            list(tar.members())
            return tar.headers

    found = [headers({"a.jpg": b"1"}), headers({"a.jpg": b"1"}, 2.5), headers({"a.jpg": b"12"}), headers({"b.jpg": b"1"})]
    assert len(set(found)) == 4 and headers({"a.jpg": b"1"}) == found[0]
    before = tar_stamp(str(tmp_path / "a.tar"))
    os.utime(tmp_path / "a.tar", (5, 5))
    assert tar_stamp(str(tmp_path / "a.tar")) != before
    with pytest.raises(FileNotFoundError):
        tar_stamp(str(tmp_path / "b.tar"))


def test_large_members_are_stepped_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", tarfile.PAX_FORMAT, {f"{i}.jpg": bytes(1_000_000) for i in range(5)})
    read, pread = [], os.pread

    def counted(file: int, size: int, offset: int) -> bytes:
        data = pread(file, size, offset)
        read.append(len(data))
        return data

    monkeypatch.setattr(os, "pread", counted)
    assert len(contents(str(path))[0]) == 5  # each is read here
    whole = sum(read)
    read.clear()
    with Tar(str(path)) as tar:
        assert len(list(tar.members())) == 5
    assert sum(read) < 100_000 < 5_000_000 <= whole


@pytest.mark.parametrize("ranges", [True, False])
def test_over_http_by_ranges_or_as_a_whole(tmp_path: Path, ranges: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.tar", tarfile.PAX_FORMAT, MEMBERS)
    monkeypatch.setattr(tars, "REMOTE_BLOCK", 2000)
    with range_server(tmp_path, ranges) as url:
        assert contents(f"{url}/a.tar") == (MEMBERS, "")
        with Tar(f"{url}/a.tar") as tar:
            list(tar.members())
            assert tar.ranges == ranges and tar.size == (tmp_path / "a.tar").stat().st_size
        before = tar_stamp(f"{url}/a.tar")
        os.utime(tmp_path / "a.tar", (5, 5))
        assert tar_stamp(f"{url}/a.tar") != before


def test_on_s3(tmp_path: Path, s3_bucket: str) -> None:
    import fsspec

    path = write(tmp_path / "a.tar", tarfile.PAX_FORMAT, MEMBERS)
    fsspec.filesystem("s3").put(str(path), f"{s3_bucket}/tars/a.tar")
    assert contents(f"{s3_bucket}/tars/a.tar") == (MEMBERS, "")
    before = tar_stamp(f"{s3_bucket}/tars/a.tar")
    fsspec.filesystem("s3").put(str(write(path, tarfile.PAX_FORMAT, {"a.jpg": b"2"})), f"{s3_bucket}/tars/a.tar")
    fsspec.filesystem("s3").invalidate_cache()
    assert tar_stamp(f"{s3_bucket}/tars/a.tar") != before
