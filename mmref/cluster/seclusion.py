"""What keeps a Ray cluster that we start on this machine to its user: loopback, a token, a private folder, no exports."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmref.cluster import ray_private

# With 0 nodes bind to 127.0.0.1, as Ray does by itself on macOS and Windows.
ON_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextlib.contextmanager
def secluded() -> Iterator[dict[str, Any]]:
    """More arguments for `ray.init(address="local")`, called inside. What is started there listens on 127.0.0.1 alone.

    Ray has no argument for that: `_node_ip_address="127.0.0.1"` is replaced by an address that others reach, except where
    its constant says that no cluster is wanted.
    """
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        write_token()
    ray_private.read_settings_anew()  # or this process keeps the mode that it read when Ray was imported
    before = ray_private.enable_cluster(False), os.environ.get(ON_LOOPBACK)  # of this process, of those it starts
    os.environ[ON_LOOPBACK] = "0"
    try:
        # Metrics would be readable on their port without the token.
        yield {"_system_config": {"enable_metrics_collection": False}}
    finally:
        ray_private.enable_cluster(before[0])
        if before[1] is None:
            del os.environ[ON_LOOPBACK]
        else:
            os.environ[ON_LOOPBACK] = before[1]


def private_folder(base: str) -> str:
    """A folder for Ray's sessions below another, which no other user can look into. Ray opens its folders to everybody: the one
    above them is closed. Raises OSError."""
    closed = Path(base) / f"mmref-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        closed.mkdir(mode=0o700)
    found = closed.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:  # another's, or opened
        closed = Path(tempfile.mkdtemp(prefix="mmref-", dir=base))
    return str(closed / "ray")


def write_token() -> None:
    """Have a token where Ray looks for it, readable to this user alone: Ray would write it for everybody to read.

    In the home directory, or, where nothing can be written there (a container's user without one), in a private folder.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        path = Path.home() / ".ray" / "auth_token"
        _have_token(path)
    except (OSError, RuntimeError):  # RuntimeError: no home directory is known
        path = Path(private_folder(tempfile.gettempdir())).parent / "auth_token"
        _have_token(path)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)


def _have_token(path: Path) -> None:
    """A token in a file of this user alone, the one that is there or a new one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent) as file:  # of mode 0600
            file.write(ray_private.new_token())
            file.flush()
            with contextlib.suppress(FileExistsError):  # of another start at the same time: that one counts for both
                os.link(file.name, path)
    if path.stat().st_mode & 0o077 and path.stat().st_uid == os.getuid():
        path.chmod(0o600)
