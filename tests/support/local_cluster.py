"""Starts a local cluster and prints, as JSON, what others of the machine see of it. A process, with a home of its own."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import psutil

from mmref.cluster.connection import connect


def look() -> dict[str, object]:
    """Addresses that are listened on, variables of the processes, and modes of the folders above the session."""
    import ray

    @ray.remote(num_cpus=1)
    def worker() -> str:
        return os.environ["RAY_AUTH_MODE"]

    modes = ray.get([worker.remote() for _ in range(2)])
    me = psutil.Process()
    listening: list[str] = []
    for process in [me, *me.children(recursive=True)]:
        try:
            listening += [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        except psutil.Error:
            continue
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    exports = [file.read_text() for file in session.glob("metrics_export_port_*")]
    open_to_others = all(parent.stat().st_mode & 0o001 for parent in (session, *session.parents))
    token = Path.home() / ".ray" / "auth_token"
    return {
        "modes": modes,
        "listening": listening,
        "exports": exports,
        "open_to_others": open_to_others,
        "token": oct(stat.S_IMODE(token.stat().st_mode)),
        "on_clusters": ray._private.ray_constants.ENABLE_RAY_CLUSTER,
    }


if __name__ == "__main__":
    with connect(2, 0.1):
        print(json.dumps(look()))
