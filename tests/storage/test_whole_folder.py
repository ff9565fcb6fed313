"""Folders written whole: after a failure, a kill or a second writer there is the old one or the new one, and never a mixture."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mmref.errors import ExportError, StorageError
from mmref.storage import locks
from mmref.storage import whole_folder as module
from mmref.storage.whole_folder import check_output, exchange, whole_folder, write_output, write_whole

OLD = {"last": "old", "a/one": "old", "a/gone": "old"}
NEW = {"last": "new", "a/one": "new", "b/two": "new"}
USER = {"a/mine": "mine", ".hidden": "mine"}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def owned(folder: Path) -> set[str]:
    return {name for name in {*OLD, *NEW} if (folder / name).exists()}


def replace(target: Path, files: dict[str, str] = NEW) -> None:
    with whole_folder(str(target), ExportError, "last", owned) as folder:
        write(folder, files)


@pytest.fixture(params=["exchanged", "moved", "another disk"])
def way(request, monkeypatch):
    """How the old folder is replaced here: also as on systems and disks that can do less."""
    if request.param != "exchanged":
        monkeypatch.setattr(module, "exchange", lambda a, b: False)
    if request.param == "another disk":
        rename = os.rename

        def refused(a, b):
            if Path(a).parent == Path(b).parent.parent:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            rename(a, b)

        monkeypatch.setattr(os, "rename", refused)
    return request.param


def test_two_folders_are_exchanged_at_once(tmp_path):
    write(tmp_path, {"a/x": "a", "b/y": "b"})
    assert exchange(tmp_path / "a", tmp_path / "b") == (sys.platform == "linux")
    assert read(tmp_path) == ({"a/y": "b", "b/x": "a"} if sys.platform == "linux" else {"a/x": "a", "b/y": "b"})
    assert not exchange(tmp_path / "a", tmp_path / "nowhere")


@pytest.mark.parametrize("user", [{}, USER], ids=["alone", "with the user's files"])
def test_the_new_takes_the_place_of_the_old(tmp_path, way, user):
    target, link = tmp_path / "out", tmp_path / "link"
    replace(target, OLD)
    assert read(tmp_path) == {f"out/{name}": text for name, text in OLD.items()}
    write(target, user)
    target.chmod(0o750)
    link.symlink_to("out")
    replace(link)
    assert read(target) == NEW | user
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"] and link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o750


def test_a_failure_leaves_the_old(tmp_path, way):
    replace(tmp_path / "out", OLD)
    write(tmp_path / "out", USER)
    for problem, raised in [
        (RuntimeError("a fault"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
        (Exception("I/O error: No space left on device (os error 28)"), StorageError),  # of a library in Rust
    ]:
        for name in ("out", "another"):
            with pytest.raises(raised), whole_folder(str(tmp_path / name), ExportError, "last", owned) as folder:
                write(folder, {"a/one": "half"})
                raise problem
        assert read(tmp_path) == {f"out/{name}": text for name, text in (OLD | USER).items()}
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def replace_and_die(target: Path, calls: int) -> int:
    """Replace in a process that is killed at its n-th change of the disk; the exit status."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    left = calls

    def dying(function):
        def call(*args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("replace", "rename", "rmdir", "unlink", "mkdir"):
        setattr(os, name, dying(getattr(os, name)))
    module.exchange = dying(module.exchange)
    try:
        replace(target)
    finally:
        os._exit(0)


@pytest.mark.parametrize("user", [{}, USER], ids=["alone", "with the user's files"])
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, way, user, monkeypatch):
    """By the next start of the command, and before it wherever the folder counts as complete."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process takes no disk with it
    calls, status, seen = 0, -1, set()
    while status != 0:
        target = tmp_path / str(calls) / "out"
        replace(target, OLD)
        write(target, user)
        status = replace_and_die(target, calls)
        calls += 1
        found = {name: text for name, text in read(target).items() if not name.startswith(".partial/")}
        assert {name: found[name] for name in user} == user
        if "last" in found:
            assert found in (OLD | user, NEW | user)
            seen.add(found["last"])
        with (
            pytest.raises(RuntimeError),
            whole_folder(str(target), ExportError, "last", owned) as folder,
        ):  # the next start, which fails for its own reasons
            assert list(folder.iterdir()) == []
            raise RuntimeError
        assert read(target.parent) in ({f"out/{n}": t for n, t in (files | user).items()} for files in (OLD, NEW))
        assert [p.name for p in target.parent.iterdir()] == ["out"]
    assert calls > 5 and seen == {"old", "new"}


WRITE = """
import sys
from mmref.errors import ExportError
from mmref.storage.whole_folder import whole_folder
with whole_folder(sys.argv[1], ExportError, "last", lambda folder: ()) as folder:
    print("held", flush=True)
    sys.stdin.read()
    (folder / "last").write_text("other")
"""


def test_a_second_writer_is_refused_by_name(tmp_path):
    target = tmp_path / "out"
    other = subprocess.Popen([sys.executable, "-c", WRITE, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ExportError, match=rf"{target} is in use: process {other.pid} on .* writes it"):
            replace(target)
        other.communicate("")
        assert read(tmp_path) == {"out/last": "other"}, "the first was not disturbed"
    finally:
        other.kill()
        other.wait()


def test_a_lock_that_its_holder_has_removed_is_not_held(tmp_path, monkeypatch):
    """Who opened it before must not hold a file that nobody else sees."""
    path, taken = tmp_path / "lock", []
    lock = locks._lock

    def after_the_other(file):
        taken.append(file)
        if len(taken) == 1:
            path.unlink()
            path.write_text("")
        return lock(file)

    monkeypatch.setattr(locks, "_lock", after_the_other)
    with locks.held(str(path)):
        assert len(taken) == 2 and f"process {os.getpid()} " in path.read_text()


def test_what_mmref_did_not_make_is_not_touched(tmp_path):
    write(tmp_path, {"out.partial/mine": "mine", "file": "mine", "other/b/two": "mine"})
    for name, message in [
        ("out", r"out.partial, which is there already and was not made by mmref \(it holds 'mine'\)"),
        ("file", "it is no folder"),
        ("s3://bucket/out", "is a URL"),
    ]:
        with pytest.raises(ExportError, match=message):
            replace(tmp_path / name if "://" not in name else name)
    with (
        pytest.raises(ExportError, match=r"holds 'b/two', which this command did not make"),
        whole_folder(str(tmp_path / "other"), ExportError, "last", lambda folder: ()) as folder,
    ):
        write(folder, NEW)
    assert read(tmp_path) == {"out.partial/mine": "mine", "file": "mine", "other/b/two": "mine"}


def test_a_file_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / ("é" * 120 + ".html")
    write_whole(path, "first é")
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path.name)
    write_whole(tmp_path / "link", b"second")
    assert path.read_text() == "second" and path.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link").is_symlink()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "third")
    assert path.read_text() == "second" and len(list(tmp_path.iterdir())) == 2
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_whole(tmp_path / "pipe", "through")
    assert os.read(reader, 100) == b"through" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_an_error_is_told_where_what_was_begun_cannot_be_removed(tmp_path, monkeypatch):
    """As where a process may open no further file: the next start clears it."""

    def no_more(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(ValueError, match="of its own"), whole_folder(str(tmp_path / "set"), ExportError, "last", owned) as folder:
        (folder / "one").write_text("begun")
        monkeypatch.setattr(Path, "iterdir", no_more)
        monkeypatch.setattr(Path, "glob", no_more)
        raise ValueError("of its own")
    monkeypatch.undo()
    replace(tmp_path / "set")
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_file_that_cannot_be_written_is_named_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")
    for path, message in [
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "page.html", "there is no folder"),
        ("s3://bucket/page.html", "it is a URL"),
    ]:
        with pytest.raises(StorageError, match=f"--html .* cannot be written: {message}"):
            check_output("--html", str(path))
    check_output("--html", "/dev/null")
    write_output("--html", "/dev/null", "text")
    assert not Path("/dev/null").is_file()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"--html .*page.html cannot be written: .*No space left"):
        write_output("--html", str(tmp_path / "page.html"), "new")
    assert (tmp_path / "page.html").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("plan", [{"last": "last", "stale": ["../victim"]}, {"last": "../victim", "stale": []}])
def test_a_move_that_somebody_else_has_packed_stays_inside(tmp_path, plan):
    """A folder that came in an archive may hold the plan of a move that was never begun here."""
    (tmp_path / "victim").write_text("mine")
    partial = tmp_path / "set.partial"
    (partial / "new").mkdir(parents=True)
    (partial / ".lock").touch()
    (partial / "move.json").write_text(json.dumps(plan))
    with (
        pytest.raises(ExportError, match=r"move.json is not of mmref .*remove"),
        whole_folder(str(tmp_path / "set"), ExportError, "last", lambda folder: ()),
    ):
        pass
    assert (tmp_path / "victim").read_text() == "mine"
