"""How often a shard of object storage is fetched in an epoch of the windowed plan, over all nodes.

    python benchmarks/window.py --out window.json

The plan is the one that training reads (`data.window_shards`), over a set that is only numbers. Each node has its part of
every step, and keeps shards as its cache does: whole, `--cache-gb` of them, the least recently used goes. "drawn" is the same
plan with the objects of a step in the order in which they are drawn, as they were until version 0.2.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import OrderedDict

import numpy as np

from mmref.data.plan import Plan, WindowedOrder


class Node:
    """The shards that a node's cache holds, and how many it fetched."""

    def __init__(self, room: int) -> None:
        self.held: OrderedDict[int, None] = OrderedDict()
        self.room, self.fetched = room, 0

    def read(self, shards: list[int]) -> None:
        for shard in shards:
            if shard in self.held:
                self.held.move_to_end(shard)
                continue
            self.fetched += 1
            self.held[shard] = None
            if len(self.held) > self.room:
                self.held.popitem(last=False)


def reads(plan: Plan, shard_start: np.ndarray, nodes: int, room: int, epochs: int, drawn: bool) -> float:
    """Fetches of a shard in an epoch, over all nodes."""
    order = plan.order
    assert isinstance(order, WindowedOrder)
    count, per_epoch = plan.objects_per_step, plan.steps_per_epoch
    all_nodes = [Node(room) for _ in range(nodes)]
    for step in range(epochs * per_epoch):
        epoch, within = divmod(step, per_epoch)
        first = min(within * count, plan.n_objects - count)
        objects = order.at(epoch, first + np.arange(count)) if drawn else order(epoch, within * count, count)
        shards = np.searchsorted(shard_start, objects, side="right") - 1
        for node, own in zip(all_nodes, np.array_split(shards, nodes)):
            node.read(np.unique(own).tolist())
    return sum(node.fetched for node in all_nodes) / (len(shard_start) - 1) / epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--shards", type=int, default=4096, help="of the set")
    parser.add_argument("--objects-per-shard", type=int, default=1280, help="two images of 50 KB each make 128 MB")
    parser.add_argument("--images-per-object", type=int, default=2, help="in a step: train.images_per_object")
    parser.add_argument("--node-batch", type=int, default=512, help="images of a step that a node has: 64 on each of 8 GPUs")
    parser.add_argument("--steps-per-window", type=int, default=100, help="the window has the objects of so many steps")
    parser.add_argument("--shard-mb", type=float, default=128)
    parser.add_argument("--cache-gb", type=float, default=200, help="of a node: data.cache_gb")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    shard_start = np.arange(args.shards + 1) * args.objects_per_shard
    room = int(args.cache_gb * 1e3 / args.shard_mb)
    rows = []
    for nodes in args.nodes:
        began = time.perf_counter()
        count = nodes * args.node_batch // args.images_per_object
        window = min(args.shards, -(-count * args.steps_per_window // args.objects_per_shard))
        order = WindowedOrder(shard_start, window, 0)
        images = np.arange(int(shard_start[-1]) + 1) * args.images_per_object
        plan = Plan(images, count, args.images_per_object, 0, order)
        found = {drawn: reads(plan, shard_start, nodes, room, args.epochs, drawn) for drawn in (False, True)}
        rows.append({
            "nodes": nodes, "reads_per_epoch": found[False], "reads_per_epoch_drawn": found[True], "window_shards": window,
            "global_batch": nodes * args.node_batch, "steps_per_epoch": plan.steps_per_epoch,
        })  # fmt: skip
        print(
            f"{nodes:>4} nodes, a global batch of {nodes * args.node_batch:,}, a window of {window} shards: each is fetched "
            f"{found[False]:.2f} times an epoch, {found[True]:.2f} as drawn ({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    if args.out:
        setting = {name: value for name, value in vars(args).items() if name not in ("nodes", "out")}
        with open(args.out, "w") as file:
            json.dump({"rows": rows, "setting": setting}, file, indent=1)


if __name__ == "__main__":
    main()
