"""What a place means, and reading from it: see mmref/storage/locations.py."""

import errno
import os
import socket
from unittest.mock import Mock

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmref.errors import FileSystemMissingError, StorageError
from mmref.storage import retries
from mmref.storage.locations import absolute, file_system, folder_name, from_text, join, read_bytes, size_of, to_text
from mmref.storage.secrets import told


def test_places_mean_the_same_in_another_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert absolute("~/set") == str(tmp_path / "home" / "set")
    assert absolute("a/../set/") == str(tmp_path / "set")
    assert absolute("s3://bucket/set/") == "s3://bucket/set"
    assert join("s3://bucket/set/", "a", "b") == "s3://bucket/set/a/b" and join("/set", "a") == "/set/a"
    assert folder_name("s3://bucket/set/") == folder_name("/x/set") == "set"


@pytest.mark.parametrize(("place", "text"), [
    ("https://bob:word@a.b:80/c@d.png?key=1", "https://a.b:80/c@d.png"), (" HTTP://bob@a.b?key", " HTTP://a.b"),
    ("http://bob:w@rd@a.b/c", "http://a.b/c"), ("abfs://box@a.b/c?d", "abfs://box@a.b/c?d"), ("c@d?e", "c@d?e"),
])  # fmt: skip
def test_messages_tell_no_keys_of_urls(place, text):
    assert told(place) == text


@pytest.mark.parametrize("kind", ["file", "url"])
def test_whole_files_and_parts(tmp_path, kind):
    place = str(tmp_path / "x.bin") if kind == "file" else "memory://locations/x.bin"
    with fsspec.open(place, "wb") as file:
        file.write(b"0123456789")
    assert (read_bytes(place), read_bytes(place, 3), read_bytes(place, 3, 4)) == (b"0123456789", b"3456789", b"3456")
    assert (read_bytes(place, 0, 2), read_bytes(place, 8, 9), read_bytes(place, 0, 0)) == (b"01", b"89", b"")
    assert size_of(place) == 10 and size_of(place + ".not") is None and size_of(os.path.dirname(place)) is None
    with pytest.raises(FileNotFoundError):
        read_bytes(place + ".not")


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOSPC])
def test_mounted_storage_is_waited_for_as_a_network_is(tmp_path, monkeypatch, code):
    (tmp_path / "x").write_bytes(b"whole")
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    failures = [3, 3]

    def failing(call, number):
        def attempt(*args, **kwargs):
            if failures[number]:
                failures[number] -= 1
                raise OSError(code, os.strerror(code))
            return call(*args, **kwargs)

        return attempt

    monkeypatch.setattr("builtins.open", failing(open, 0))
    monkeypatch.setattr(os, "stat", failing(os.stat, 1))
    assert size_of(str(tmp_path / "x")) == 5 and read_bytes(str(tmp_path / "x")) == b"whole" and failures == [0, 0]
    failures[:] = [10**9, 0]
    monkeypatch.setattr(retries, "PATIENCE_S", 0.01)
    with pytest.raises(StorageError, match=f"cannot read {tmp_path}/x: "):
        read_bytes(str(tmp_path / "x"))


@pytest.mark.parametrize("library", ["aiohttp", "httpx"])
def test_libraries_below_urls_with_errors_of_their_own_are_waited_for(library, monkeypatch):
    failed = {"aiohttp": "ClientConnectionError", "httpx": "ConnectError"}[library]
    error = getattr(pytest.importorskip(library), failed)("no way there")
    memory = file_system("memory://bucket")[0]
    monkeypatch.setattr(retries, "PATIENCE_S", 0.01)
    monkeypatch.setattr(type(memory), "cat_file", Mock(side_effect=error))
    with pytest.raises(StorageError, match=f"cannot read memory://bucket/x: {failed}: no way there"):
        read_bytes("memory://bucket/x")


def test_a_host_that_does_not_answer_is_named(monkeypatch):
    """fsspec calls everything that fails behind an http URL a file that is not there."""
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(retries, "PATIENCE_S", 0.01)
    with socket.socket() as sock:  # bound and not listening: nobody else can take the port
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        with pytest.raises(StorageError, match=rf"cannot look at http://127\.0\.0\.1:{port}/x: .*Cannot connect to host"):
            size_of(f"http://127.0.0.1:{port}/x")


@pytest.mark.parametrize("named", ["NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"])
def test_storage_that_does_not_know_who_asks_is_not_waited_for(named, monkeypatch):
    """Of the libraries' own errors, which else are waited for."""
    wanted = {"PartialCredentialsError": {"provider": "env", "cred_var": "x"}, "ProfileNotFound": {"profile": "x"}}
    error = getattr(pytest.importorskip("botocore.exceptions"), named)(**wanted.get(named, {}))
    memory = file_system("memory://bucket")[0]
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: pytest.fail("waited"))
    monkeypatch.setattr(type(memory), "info", Mock(side_effect=error))
    with pytest.raises(StorageError, match=rf"cannot look at memory://bucket/x: {named}: .*AWS_ACCESS_KEY_ID"):
        size_of("memory://bucket/x")


def test_answers_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: pytest.fail("waited"))
    os.symlink("loop", tmp_path / "loop")
    for name in ("no-such-file", "n" * 300, "loop"):
        with pytest.raises(OSError):
            read_bytes(str(tmp_path / name))


@pytest.mark.parametrize(("url", "package"), [("gs://bucket/x", "gcsfs"), ("abfs://a@b/x", "adlfs"), ("nosuch://x", "nosuch")])
def test_a_file_system_that_is_not_installed_is_named(url, package):
    for use in (file_system, read_bytes, size_of):
        with pytest.raises(FileSystemMissingError, match=rf"{url} needs a file system that is not installed: .*{package}"):
            use(url)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (b"plain.png", "plain.png"),
        ("caf\u00e9 \u2603.png".encode(), "caf\u00e9 \u2603.png"),
        (rb"back\slash.png", r"back\slash.png"),
        (b"caf\xe9.png", r"caf\xe9.png"),
        (rb"caf\xe9.png", r"caf\\xe9.png"),
        (b"a\\\xff.png", r"a\\\xff.png"),
    ],
)
def test_names_that_are_no_text_have_one(name, text):
    assert to_text(os.fsdecode(name)) == text and os.fsencode(from_text(text)) == name


@given(st.lists(st.sampled_from([b"\\", b"x", b"e9", b"\xe9", b"\xc3\xa9", b"a", b"/", b"\n"]), max_size=8).map(b"".join))
def test_every_name_has_a_text_of_its_own(name):
    text = to_text(os.fsdecode(name))
    text.encode()
    assert os.fsencode(from_text(text)) == name
