"""The run directory: whole files or none, JSON lines that survive a crash, URLs."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import uuid

import pytest

from mmref.errors import RunDirectoryError, StorageError
from mmref.run import directory
from mmref.run.directory import JsonLines, NewLines, RunDir, read_jsonl
from mmref.storage import locks, retries


@pytest.fixture(params=["local", "memory"])
def run(request, tmp_path, monkeypatch):
    """A run directory on disk and one behind a URL."""
    monkeypatch.setattr(directory, "UPLOAD_EVERY_S", 0.0)
    return RunDir(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


def test_files_are_written_read_listed_and_removed(run):
    run.check_writable()
    assert run.list("") == [], "the probe is gone"
    run.write_text("config.yaml", "a: é\n")
    run.write_text("checkpoints/step-1/meta.json", "{}")
    run.write_text("config.yaml", "b: 2\n")
    assert run.read_text("config.yaml") == "b: 2\n" and run.size("config.yaml") == 5
    assert run.list("") == ["checkpoints", "config.yaml"] and run.list("checkpoints") == ["step-1"]
    assert run.exists("checkpoints/step-1/meta.json") and not run.exists("metrics.json")
    assert run.size("metrics.json") is None and run.list("nothing") == []
    run.remove("checkpoints")
    run.remove("checkpoints")
    assert run.list("") == ["config.yaml"]
    assert run.join("a", "b") == f"{run.path}/a/b"


def test_text_is_utf8_whatever_the_locale(run):
    run.write_text("report.html", "é – 鳥")
    with run.fs.open(f"{run.root}/report.html", "rb") as file:
        assert file.read() == "é – 鳥".encode()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    run = RunDir(str(tmp_path))
    run.write_text("metrics.json", "old")

    def crash(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    monkeypatch.setattr(retries, "PATIENCE_S", 0.1)
    with pytest.raises(StorageError, match=r"cannot write .*metrics.json: OSError: power cut.*resumes"):
        run.write_text("metrics.json", "new and longer")
    assert run.read_text("metrics.json") == "old"
    assert run.list("") == ["metrics.json"], "nothing half-written is left behind"


def test_written_files_can_be_read_by_others(tmp_path):
    RunDir(str(tmp_path)).write_text("config.yaml", "a")
    assert (tmp_path / "config.yaml").stat().st_mode & 0o777 == 0o644


def test_local_paths_become_absolute_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunDir("runs/a").path == f"{tmp_path}/runs/a" and RunDir("runs/a").local
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunDir("~/a").path == f"{tmp_path}/a"
    assert RunDir("memory://x/run/").path == "memory://x/run" and not RunDir("memory://x/run/").local


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunDirectoryError, match=rf"{tmp_path}/file/run cannot be written.*--run_dir"):
        RunDir(str(tmp_path / "file" / "run")).check_writable()
    with pytest.raises(RunDirectoryError, match=rf"{tmp_path}/file cannot be written"):
        RunDir(str(tmp_path / "file")).check_writable()


HOLD = """
import sys, time
from mmref.run.directory import RunDir
with RunDir(sys.argv[1]).held():
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_job_at_a_time_and_a_killed_one_holds_nothing(tmp_path):
    run = RunDir(str(tmp_path / "run"))
    other = subprocess.Popen([sys.executable, "-c", HOLD, run.path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        said = rf"{run.path} is in use: process {other.pid} on {socket.gethostname()} since 2.*--run_dir"
        with pytest.raises(RunDirectoryError, match=said), run.held():
            pass
        with RunDir(str(tmp_path / "run2")).held():
            pass  # another directory is free
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    for _ in range(2):
        with run.held():
            pass


def test_a_lost_machine_s_lock_is_waited_for(tmp_path, monkeypatch, caplog):
    """A network file system gives it up after a while."""
    monkeypatch.setattr(locks, "LOOK_S", 0.05)
    run = RunDir(str(tmp_path / "run"))
    other = subprocess.Popen([sys.executable, "-c", HOLD, run.path], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr(locks.socket, "gethostname", lambda: "elsewhere")
        monkeypatch.setattr(locks, "LEASE_S", 0.3)
        with pytest.raises(RunDirectoryError, match="is in use"), run.held():
            pass
        monkeypatch.setattr(locks, "LEASE_S", 60.0)
        threading.Timer(0.5, other.kill).start()
        with run.held():
            assert caplog.text.count("waiting up to 60 s") == 1
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


def test_a_file_system_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", no_locks)
    with RunDir(str(tmp_path / "run")).held():
        assert "cannot be locked" in caplog.text


def append(lines, record):
    """A line that is there on return, also behind a URL."""
    lines.append(record)
    lines.flush()


def test_lines_are_appended_and_read_back(run):
    lines = JsonLines(run, keep_below_step=0)
    records = [{"step": s, "loss": 0.5 / (s + 1), "name": "é"} for s in range(3)]
    for record in records:
        append(lines, record)
        assert read_jsonl(run)[-1] == record
    assert read_jsonl(run) == records and read_jsonl(run, "other.jsonl") == []


def test_a_resumed_run_drops_the_steps_it_repeats(run):
    for step in range(6):
        append(JsonLines(run, keep_below_step=step), {"step": step, "try": 1})
    lines = JsonLines(run, keep_below_step=3)
    assert [r["step"] for r in read_jsonl(run)] == [0, 1, 2], "dropped at once, not at the next line"
    append(lines, {"step": 3, "try": 2})
    assert [(r["step"], r["try"]) for r in read_jsonl(run)] == [(0, 1), (1, 1), (2, 1), (3, 2)]


def test_without_a_step_everything_is_kept(run):
    append(JsonLines(run), {"step": 0})
    append(JsonLines(run), {"step": 1})
    assert [r["step"] for r in read_jsonl(run)] == [0, 1]


def test_a_cut_last_line_is_left_out_and_repaired(run):
    run.write_bytes("metrics.jsonl", b'{"step": 1}\n{"step": "\xff"}\n{"step": 2}\n{"step": 3, "lo')
    assert [r["step"] for r in read_jsonl(run)] == [1, 2]
    append(JsonLines(run, keep_below_step=10), {"step": 3})
    assert [r["step"] for r in read_jsonl(run)] == [1, 2, 3]
    assert run.read_text("metrics.jsonl").count("\n") == 3


def test_lines_are_followed_as_they_come(run, monkeypatch):
    """What was read is not read again, but for the last line: it tells whether the file is still the same."""
    new, read, read_from = NewLines(run), [], RunDir.read_from
    monkeypatch.setattr(RunDir, "read_from", lambda *args: read.append(read_from(*args)) or read[-1])
    assert new() == []
    lines = JsonLines(run)
    for step in range(100):
        append(lines, {"step": step})
    assert [r["step"] for r in new()] == list(range(100))
    append(lines, {"step": 100})
    read.clear()
    assert new() == [{"step": 100}] and new() == []
    assert read == [b'{"step": 99}\n{"step": 100}\n', b'{"step": 100}\n']
    run.write_bytes("metrics.jsonl", run.read_bytes("metrics.jsonl") + b'{"step": 101, "lo')
    assert new() == [], "half a line"


@pytest.mark.parametrize("more", [0, 1, 9])
def test_a_file_that_was_written_anew_is_followed_from_its_beginning(run, more):
    """Shorter or longer than before, as after a resume that dropped lines and has written others."""
    new, lines = NewLines(run), JsonLines(run)
    for step in range(5):
        append(lines, {"step": step})
    assert len(new()) == 5
    lines = JsonLines(run, keep_below_step=3)
    for step in range(3, 3 + more):
        append(lines, {"step": step, "again": True})
    assert [r["step"] for r in new()] == list(range(3 + more))
    append(lines, {"step": 50})
    assert new() == [{"step": 50}]


def test_behind_a_url_lines_are_uploaded_together():
    run = RunDir(f"memory://{uuid.uuid4().hex}/run")
    lines = JsonLines(run)
    for step in range(3):
        lines.append({"step": step})
    assert read_jsonl(run) == [], "an object is replaced as a whole: not at every line"
    lines.flush()
    assert [r["step"] for r in read_jsonl(run)] == [0, 1, 2]


def test_a_line_that_the_disk_took_half_of_is_written_again(tmp_path, monkeypatch):
    run = RunDir(str(tmp_path))
    lines = JsonLines(run)
    lines.append({"step": 1})
    whole, calls = os.fdopen, []

    def full_disk(descriptor, mode):
        file = whole(descriptor, mode)
        if not calls:
            calls.append(file)
            os.pwrite(descriptor, b'{"st', lines._end)
            raise OSError(28, "No space left on device")
        return file

    monkeypatch.setattr(os, "fdopen", full_disk)
    lines.append({"step": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_storage_that_is_back_soon_is_waited_for(run, monkeypatch):
    """Of the first three attempts of each kind the storage refuses two."""
    monkeypatch.setattr(retries, "FIRST_DELAY_S", 0.001)
    calls = {"open": 0, "info": 0}

    def failing(name):
        original = getattr(run.fs, name)

        def call(*args, **kwargs):
            calls[name] += 1
            if calls[name] <= 2:
                raise OSError(5, "Input/output error")
            return original(*args, **kwargs)

        return call

    run.write_text("old.txt", "old")
    with monkeypatch.context() as patch:
        for name in calls:
            patch.setattr(run.fs, name, failing(name))
        assert run.write_stream("new.txt", lambda file: file.write(b"new")) == 3
        assert run.exists("old.txt"), "a storage that does not answer is no missing file"
    assert run.read_text("new.txt") == "new" and calls["open"] == calls["info"] == 3


def test_a_permanent_answer_is_not_waited_for(run):
    with pytest.raises(FileNotFoundError):
        run.read_text("nothing.txt")


@pytest.mark.parametrize("name", ["run-*", "run-?", "run-[ab]"])
def test_a_url_that_storage_takes_for_a_pattern_is_refused(name):
    """fsspec expands it: removing a checkpoint of one run would remove those of others."""
    root = f"memory://{uuid.uuid4().hex}"
    RunDir(f"{root}/run-a").write_text("checkpoints/x", "kept")
    with pytest.raises(RunDirectoryError, match="takes for a pattern"):
        RunDir(f"{root}/{name}").remove("checkpoints")
    assert RunDir(f"{root}/run-a").read_text("checkpoints/x") == "kept"


def test_odd_names_are_names_on_disk(tmp_path):
    run, other = RunDir(str(tmp_path / "a\nb [*]? #1 %20 é🙂 .")), RunDir(str(tmp_path / "a\nb 1"))
    for one in (run, other):
        one.write_text("checkpoints/x", one.path)
    run.remove("checkpoints")
    assert run.list("") == [] and other.read_text("checkpoints/x") == other.path


def test_damaged_files_are_named(run):
    for text in ("- a\n", "", "a: [", "text"):
        run.write_text("config.yaml", text)
        with pytest.raises(RunDirectoryError, match=r"(?s)config\.yaml cannot be read .*: give the run directory"):
            run.read_config()
    run.write_text("metrics.json", "{")
    with pytest.raises(RunDirectoryError, match=r"metrics\.json is damaged"):
        run.read_json("metrics.json")
    with pytest.raises(FileNotFoundError):
        run.read_json("none.json")


@pytest.fixture
def memory_run(monkeypatch):
    """A run behind a URL, whose every upload of metrics.jsonl is noted: the thread, and how many lines."""
    run, seen = RunDir(f"memory://{uuid.uuid4().hex}"), []
    write = run.write_bytes

    def noted(name, data):
        seen.append((threading.current_thread().name, data.count(b"\n")))
        write(name, data)

    monkeypatch.setattr(run, "write_bytes", noted)
    return run, seen


def test_behind_a_url_lines_are_uploaded_beside_the_one_who_writes_and_rarer_as_they_grow(memory_run, monkeypatch):
    monkeypatch.setattr(directory, "UPLOAD_EVERY_S", 0.0)
    monkeypatch.setattr(directory, "UPLOAD_BYTES_PER_S", 1e-3)  # after the first upload none is due for a day
    run, seen = memory_run
    lines = JsonLines(run)
    for step in range(200):
        lines.append({"step": step})
    lines.upload()
    lines.flush()
    assert [r["step"] for r in read_jsonl(run)] == list(range(200))
    assert len(seen) <= 4 and all(name.startswith("mmref-upload") for name, _ in seen[1:]), seen
    assert seen[-1][1] == 200


def test_a_copy_of_what_writes_lines_goes_on_without_its_thread(tmp_path):
    """Ray Tune pickles what records a sweep."""
    lines = JsonLines(RunDir(str(tmp_path)))
    lines.append({"step": 1})
    copy = pickle.loads(pickle.dumps(lines))
    copy.append({"step": 2})
    assert [r["step"] for r in read_jsonl(copy.run)] == [1, 2]


def test_an_upload_that_fails_is_told_to_who_writes_and_made_up_for(memory_run, monkeypatch):
    monkeypatch.setattr(directory, "UPLOAD_EVERY_S", 0.0)
    run, _ = memory_run
    lines, write = JsonLines(run), run.write_bytes

    def away(name, data):
        raise StorageError("cannot write")

    monkeypatch.setattr(run, "write_bytes", away)
    lines.append({"step": 1})
    with pytest.raises(StorageError, match="cannot write"):
        while True:
            lines.append({"step": 2})
    with pytest.raises(StorageError, match="cannot write"):
        lines.flush()
    monkeypatch.setattr(run, "write_bytes", write)
    lines.flush()
    steps = [r["step"] for r in read_jsonl(run)]
    assert steps[0] == 1 and set(steps[1:]) == {2}
