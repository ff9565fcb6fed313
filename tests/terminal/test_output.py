"""The streams of a command (mmref/terminal/output.py). Each case is a process of its own, with the streams that it is about."""

import errno
import json
import os
import subprocess
import sys

import pytest

from mmref.cli import Command, main
from mmref.terminal.run_command import run_command

RUN = "import sys\nfrom mmref.terminal.run_command import run_command\nfrom mmref.errors import QueryError\n"
MANY = RUN + "sys.exit(run_command(lambda: [print('line', i) for i in range(100000)] and 0))"
ONE = RUN + "sys.exit(run_command(lambda: print('one') or 0))"


def shell(code, redirect, **variables):
    command = f'"$0" -c "$1" {redirect}'
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), **variables}
    return subprocess.run(["bash", "-c", command, sys.executable, code], capture_output=True, env=env, timeout=60)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_left_ends_a_command_quietly(unbuffered):
    found = shell(MANY, "| head -1; exit ${PIPESTATUS[0]}", PYTHONUNBUFFERED=unbuffered)
    assert (found.stdout, found.stderr, found.returncode) == (b"line 0\n", b"", 141)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("code", [MANY, ONE])
def test_a_full_device_is_named(code, unbuffered):
    found = shell(code, "> /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert found.returncode == 1
    assert found.stderr.startswith(b"mmref: OutputError: standard output cannot be written: [Errno 28]")
    assert found.stderr.count(b"\n") == 1


def test_only_a_command_that_resumes_says_so_when_it_is_interrupted(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Command, "__call__", interrupt)
    assert main(["shards", "build", "table", "t.csv"]) == main(["train", "data.root=x"]) == 130
    first, second = capsys.readouterr().err.splitlines()
    assert first == "mmref: interrupted." and second == "mmref: interrupted; the same command resumes from the last checkpoint."


def test_too_many_open_files_say_what_to_do(capsys):
    def fail():
        raise OSError(errno.EMFILE, "Too many open files", "/data/part")

    assert run_command(fail) == 1
    assert capsys.readouterr().err.endswith("/data/part: Too many open files. Raise the limit: `ulimit -n 4096`.\n")


def test_an_error_of_the_command_is_told_where_nobody_reads_its_output():
    code = RUN + "def fail():\n print('x')\n raise QueryError('of its own')\nsys.exit(run_command(fail))"
    found = shell(code, "> /dev/full")
    assert b"mmref: QueryError: of its own\n" in found.stderr and found.returncode == 1


def test_errors_of_other_files_keep_their_traceback():
    code = RUN + "sys.exit(run_command(lambda: open('/dev/full', 'w', buffering=1).write('x\\n')))"
    found = shell(code, "")
    assert b"Traceback" in found.stderr and b"No space left on device" in found.stderr


@pytest.mark.parametrize("closed", [">&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_takes_no_file_of_the_command(closed, tmp_path):
    path = tmp_path / "kept"
    code = (
        RUN + f"def run():\n f = open({str(path)!r}, 'w')\n print('to nobody', flush=True)\n"
        "print('to nobody', file=sys.stderr, flush=True)\n f.write('kept')\n f.close()\n return sys.stderr.isatty() + 0\n"
        "sys.exit(run_command(run))"
    ).replace("\nprint(", "\n print(")
    found = shell(code, closed)
    assert found.returncode == 0 and path.read_text() == "kept"


@pytest.mark.parametrize(("encoding", "text"), [("ascii", b"caf\\xe9 \\U0001f642\n"), ("latin-1", b"caf\xe9 \\U0001f642\n")])
def test_a_terminal_without_unicode_shows_every_text(encoding, text):
    code = RUN + "sys.exit(run_command(lambda: print('caf\\xe9 \\U0001f642') or 0))"
    found = shell(code, "", PYTHONIOENCODING=encoding)
    assert (found.stdout, found.stderr, found.returncode) == (text, b"", 0)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "UTF8"])
def test_json_is_json_in_every_encoding(encoding):
    code = RUN + "from mmref.terminal.output import to_json\n"
    code += "sys.exit(run_command(lambda: print(to_json({'caf\\xe9': '\\U0001f642'})) or 0))"
    found = shell(code, "", PYTHONIOENCODING=encoding)
    assert json.loads(found.stdout.decode(encoding)) == {"café": "🙂"}
    assert (b"\\u" in found.stdout) == (encoding in ("ascii", "latin-1"))


@pytest.mark.parametrize(
    ("use", "path"),
    [
        (lambda: open("/no/such/file"), "/no/such/file"),
        (lambda: os.mkdir("/proc"), "/proc"),
        (lambda: open("/"), "/"),
        (lambda: open("/" + "x" * 300), "/xxx"),
    ],
)
def test_files_that_cannot_be_used_are_named(use, path, capsys):
    assert run_command(use) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"mmref: FileError: {path}") and error.count("\n") == 1


def test_faults_of_our_own_keep_their_traceback():
    for fault in (OSError(5, "Input/output error"), OSError("of a library"), ValueError("ours")):
        with pytest.raises(type(fault)):
            run_command(lambda fault=fault: (_ for _ in ()).throw(fault))
