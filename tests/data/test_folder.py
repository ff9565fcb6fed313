"""What is found in a folder or below a URL prefix: every picture, and all else counted or named."""

from __future__ import annotations

import errno
import io
import os
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

from mmref.data.folder import Found
from mmref.data.folder import look_into as look_with
from mmref.errors import SearchIndexError, StorageError
from mmref.retrieval.images import list_images
from mmref.storage import retries
from mmref.storage.locations import read_bytes


def look_into(root: str) -> Found:
    return look_with(root, SearchIndexError)


def picture(kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (30, 20), (200, 90, 40)).save(file, kind)
    return file.getvalue()


def names(found) -> list[str]:
    return [name for name, _, _ in found.pictures]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "photos"
    (path / "deep").mkdir(parents=True)
    (path / "a.png").write_bytes(picture())
    (path / "deep" / "b.JPG").write_bytes(picture("JPEG"))
    return path


def test_pictures_are_told_by_what_they_are(root):
    for name, kind in {"saved.jfif": "JPEG", "old.jpe": "JPEG", "no-ending": "PNG", "a.jpg_large": "JPEG", "x.png.1": "PNG",
                       "space.png ": "PNG", "phone.avif": "AVIF", "really.heic": "JPEG"}.items():  # fmt: skip
        (root / name).write_bytes(picture(kind))
    others = (
        "v.mp4",
        "v.MP4",
        "notes.txt",
        "Thumbs.db",
        "IMG_1.aae",
        ".DS_Store",
        "empty",
        "data.dat",
        "a.name with a dot",
    )
    for name in others:
        (root / name).write_bytes(b"")
    (root / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (root / "IMG_1.CR2").write_bytes(picture("TIFF"))
    found = look_into(str(root))
    assert names(found) == sorted(
        ["a.png", "deep/b.JPG", "saved.jfif", "old.jpe", "no-ending", "a.jpg_large", "x.png.1", "space.png ", "phone.avif",
         "really.heic"]
    )  # fmt: skip
    assert [name for name, _ in found.skipped] == ["IMG_1.CR2", "IMG_1.HEIC"]
    assert found.skipped[1][1] == "not read here: needs pillow-heif"
    assert found.passed_over == {
        ".mp4": 2, ".txt": 1, ".db": 1, ".aae": 1, "hidden": 1, "without an ending": 2, ".dat": 1,
        ".heic (needs pillow-heif)": 1, ".cr2 (a camera's raw file: export it as JPEG, PNG or TIFF)": 1,
    }  # fmt: skip


def test_only_files_are_read_and_the_rest_is_named(root):
    os.mkfifo(root / "pipe.jpg")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(root / "socket.png"))
    os.symlink("/dev/zero", root / "endless.jpg")
    (root / "folder.jpg").mkdir()
    (root / "folder.jpg" / "c.png").write_bytes(picture())
    found = look_into(str(root))
    assert names(found) == ["a.png", "deep/b.JPG", "folder.jpg/c.png"]
    assert found.skipped == [
        ("endless.jpg", "a device, no file"), ("pipe.jpg", "a pipe, no file"), ("socket.png", "a socket, no file"),
    ]  # fmt: skip
    assert found.passed_over == {"no file": 1}


def test_links_are_followed_once_and_loops_end(root, tmp_path):
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "far" / "inner" / "far.png").write_bytes(picture())
    for target, name in ((tmp_path / "far", "far"), ("far", "far-again"), ("deep", "again"), ("..", "up"), ("/", "all"),
                         (".", "deep/self"), ("../a.png", "deep/file.png"), ("nothing", "gone.jpg"), ("loop.jpg", "loop.jpg"),
                         (tmp_path / "photos", "photos"), (tmp_path / "far" / "inner", "inner")):  # fmt: skip
        os.symlink(target, root / name)
    os.symlink(root, tmp_path / "far" / "back")
    found = look_into(str(root))
    assert names(found) == ["a.png", "deep/b.JPG", "deep/file.png", "far/inner/far.png"]
    assert found.skipped == [
        ("all/", "a link to a folder that holds this one"),
        ("gone.jpg", "a link to nothing"),
        ("loop.jpg", "cannot be looked at: Too many levels of symbolic links"),
        ("up/", "a link to a folder that holds this one"),
    ]
    assert found.passed_over == {"linked twice": 6}
    through = tmp_path / "through"
    os.symlink(root, through)
    assert names(look_into(str(through))) == names(found), "a source may be a link itself"


def test_an_index_in_the_folder_is_not_its_pictures(root):
    (root / "index" / "segments").mkdir(parents=True)
    (root / "index" / "manifest.json").write_text("{}")
    (root / "index" / "x.png").write_bytes(picture())
    found = look_into(str(root))
    assert names(found) == ["a.png", "deep/b.JPG"] and found.passed_over == {"search index": 1}


def refuse(monkeypatch, what: str, code: int) -> None:
    """Have the system refuse to list a folder, as it does to a user without rights to it."""
    scandir = os.scandir

    def scan(path):
        if str(path).endswith(what):
            raise OSError(code, os.strerror(code), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)


def test_a_folder_that_cannot_be_listed_costs_itself(root, monkeypatch):
    refuse(monkeypatch, "deep", errno.EACCES)
    found = look_into(str(root))
    assert names(found) == ["a.png"] and found.closed == [str(root / "deep")]
    assert found.skipped == [("deep/", "a folder that cannot be listed: Permission denied")]
    with pytest.raises(SearchIndexError, match="deep cannot be listed: Permission denied"):
        look_into(str(root / "deep"))


def test_storage_that_fails_ends_it(root, monkeypatch):
    monkeypatch.setattr(retries, "PATIENCE_S", 0.0)
    refuse(monkeypatch, "deep", errno.EIO)
    with pytest.raises(StorageError, match=r"cannot list .*deep"):
        look_into(str(root))


def test_what_goes_while_it_is_listed_is_not_there(root, monkeypatch):
    scandir = os.scandir

    def scan(path):
        entries = scandir(path)
        if str(path) == str(root):
            entries = [*entries]
            (root / "a.png").unlink()
            shutil.rmtree(root / "deep")
            (root / "c.png").write_bytes(picture())
            return _Entries([*entries, *scandir(path)])
        return entries

    monkeypatch.setattr(os, "scandir", scan)
    found = look_into(str(root))
    assert names(found) == ["c.png"] and not found.skipped


class _Entries(list):
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_a_url_prefix_is_looked_into_alike(root):
    import fsspec

    fs = fsspec.filesystem("memory")
    for name, data in {"a.png": picture(), "deep/no-ending": picture("JPEG"), "n.txt": b"", ".cache/x.png": picture(),
                       "IMG.HEIC": b"none", "odd name?#.jfif": picture("JPEG")}.items():  # fmt: skip
        fs.pipe(f"/kinds/{name}", data)
    found = look_into("memory://kinds")
    assert names(found) == ["a.png", "deep/no-ending", "odd name?#.jfif"]
    assert read_bytes(found.pictures[2][1]) == picture("JPEG")
    assert [name for name, _ in found.skipped] == ["IMG.HEIC"]
    assert found.passed_over == {".txt": 1, "hidden": 1, ".heic (needs pillow-heif)": 1}
    before = found.pictures[0][2]
    fs.pipe("/kinds/a.png", picture())
    assert look_into("memory://kinds").pictures[0][2] != before, "a changed object has another stamp"


def test_a_pipe_in_place_of_a_manifest_is_not_waited_for(root):
    before = names(look_into(str(root)))
    os.mkfifo(root / "manifest.json")
    assert sorted(list_images(str(root)).items["id"].to_pylist()) == sorted(before)
