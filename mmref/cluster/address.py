"""Which cluster a command joins: what RAY_ADDRESS says, checked before Ray is asked, which would wait for minutes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

from mmref.cluster import ray_private
from mmref.errors import ClusterStartError

VARIABLE = "RAY_ADDRESS"
HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
CONNECT_S = 5.0  # for one connection to the address
ANSWER_S = 20.0  # for an answer of Ray itself; on an idle machine half a second
ALONE = f"or `unset {VARIABLE}` to use this machine alone"


def cluster_address() -> str | None:
    """HOST:PORT of the cluster that RAY_ADDRESS names, None for this machine alone; never one that nobody named.

    Raises ClusterStartError for an address of another kind, and for `auto` where no cluster runs.
    """
    given = os.environ.get(VARIABLE, "").strip()
    if given in ("", "local"):
        return None
    if given == "auto":
        return _running()
    if given.startswith(("http://", "https://")):
        raise ClusterStartError(
            f"{VARIABLE}={given} is the address of a cluster's jobs service: start this as a job with `ray job submit -- ...`, "
            f"set the variable to HOST:PORT of the cluster's head on one of its nodes (its port is 6379 by default), {ALONE}."
        )
    if given.startswith("ray://"):
        raise ClusterStartError(
            f"{VARIABLE}={given} is Ray Client's, which cannot train or serve: start this as a job with `ray job submit -- ...`, "
            f"set the variable to HOST:PORT on a node of the cluster, {ALONE}."
        )
    found = HOST_PORT.fullmatch(given)
    if found is None or not 0 < int(found[2]) < 65536:
        raise ClusterStartError(f"{VARIABLE}={given} is no address: give HOST:PORT of a cluster's head, {ALONE}.")
    return given


def check_answers(address: str) -> None:
    """Raise ClusterStartError where no cluster answers at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise _silent(address, f"{error}") from None
    try:
        # This is asked in a process of its own, since Ray tries for longer than anybody waits and cannot be told to
        # stop.
        asked = subprocess.run([sys.executable, "-c", ray_private.PROBE, address], capture_output=True, timeout=ANSWER_S)
    except subprocess.TimeoutExpired:
        raise _silent(
            address, f"something listens, and is no cluster's head or does not answer within {ANSWER_S:.0f} s"
        ) from None
    if asked.returncode:
        said = asked.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise _silent(address, said[-1])


def _silent(address: str, why: str) -> ClusterStartError:
    return ClusterStartError(
        f"no Ray cluster answers at {VARIABLE}={address}: {why}. It may have ended, or have another port: `ray status "
        f"--address {address}` asks it. Name one that runs, {ALONE}."
    )


def _running() -> str:
    try:
        return ray_private.running_cluster()
    except (ConnectionError, ValueError):
        raise ClusterStartError(
            f"{VARIABLE}=auto, and no Ray cluster runs on this machine: start one with `ray start --head`, {ALONE}."
        ) from None
