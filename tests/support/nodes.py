"""A Ray cluster of several nodes on this machine, whose nodes can be killed, drained and added."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from mmref.cluster.connection import SETTINGS
from support.jobs import titled

STORE_BYTES = 100 * 1024**2
START_ATTEMPTS = 3
# a raylet that was killed refuses connections: Ray takes five refusals, one a period, as the loss of the node
NODE_SETTINGS = {"RAY_health_check_period_ms": "1000"}


class Nodes:
    """A head without CPUs, where drivers run, and nodes that take one training worker and its reader each."""

    CPUS = 3.0  # of a node: 2 of a worker, 1 of its reader; a second worker does not fit

    def __init__(self, count: int) -> None:
        self._environment = dict(os.environ)
        os.environ.update(SETTINGS | NODE_SETTINGS)  # raylets hand theirs on to the workers
        self.cluster = Cluster(shutdown_at_exit=True)
        self._start(num_cpus=0, include_dashboard=False)
        self.nodes: list[Any] = []
        self.ensure(count)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self) -> Any:
        """Start one more node; a busy machine gets more than one attempt."""
        node = self._start(num_cpus=self.CPUS)
        self.nodes.append(node)
        return node

    def _start(self, **arguments: Any) -> Any:
        for attempt in range(START_ATTEMPTS):
            try:
                return self.cluster.add_node(object_store_memory=STORE_BYTES, **arguments)
            except Exception:
                if attempt == START_ATTEMPTS - 1:
                    raise

    def ensure(self, count: int) -> None:
        """Have this many nodes: start what is missing, take away what is idle and too many."""
        while len(self.nodes) > count:
            self.kill(next(n for n in self.nodes if n not in self.busy()))
        while len(self.nodes) < count:
            self.add()

    def kill(self, node: Any) -> None:
        """Kill everything on a node at once, as a machine that loses power does."""
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)

    def drain(self, node: Any, seconds: int) -> None:
        """Announce that a node will be taken away, as clouds do of spot instances."""
        client = GcsClient(address=self.address)
        until_ms = int(1000 * (time.time() + seconds))
        accepted, why = client.drain_node(node.node_id, DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), "spot", until_ms)
        assert accepted, why

    def workers(self) -> dict[Any, list[psutil.Process]]:
        """The training workers on each node."""
        return {node: _training_workers(node) for node in self.nodes}

    def busy(self) -> list[Any]:
        """The nodes that have training workers."""
        return [node for node, found in self.workers().items() if found]

    def close(self) -> None:
        """Kill the nodes, then the head: asked to leave, each would first wait for the others."""
        for node in [*self.nodes]:
            self.kill(node)
        self.cluster.remove_node(self.cluster.head_node, allow_graceful=False)
        os.environ.clear()
        os.environ.update(self._environment)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _training_workers(node: Any) -> list[psutil.Process]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return titled(raylet.children(recursive=True), "RayTrainWorker")
