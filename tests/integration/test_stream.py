"""The samples of a step through the real Ray Data stream: any number of ranks, nodes, delays, killed readers, restarts."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.stream_ranks import Killer, ledger, planned, streamed

from mmref.cluster.connection import SETTINGS, START_ATTEMPTS, connect
from mmref.config import Config
from mmref.data import stream
from mmref.data.reader import concatenate
from mmref.data.stream import Stream


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every sample of every step: which, with which caption, and its pixels."""
    assert found.keys() == expected.keys()
    for name, column in expected.items():
        assert np.array_equal(found[name], column), name


def test_one_rank_stopped_and_resumed_on_two_gets_the_plan(make_config: Callable[..., Config]) -> None:
    config = make_config({"train.max_steps": 12, "data.steps_per_task": 2})
    with connect(4, storage_gb=0.2):
        one = Stream(config, 0, 1, 0)
        before = [ledger(next(one)) for _ in range(7)]  # the reader is ahead: what it read is lost with it
        del one
        two = [Stream(config, rank, 2, 7) for rank in range(2)]
        after = [ledger(next(stream)) for _ in range(7, 12) for stream in two]
        for stream in two:
            with pytest.raises(StopIteration):
                next(stream)
    assert_same(concatenate([*before, *after]), planned(config, 0, 12))


def test_pieces_follow_each_other_without_a_seam(make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """11 tasks in pieces of four, by two readers that race, listed no further than two tasks ahead."""
    monkeypatch.setattr(stream, "PIECE", 4)
    monkeypatch.setattr(stream, "AHEAD", 2)
    config = make_config({"train.max_steps": 22, "data.steps_per_task": 2, "data.readers": 2})
    with connect(4, storage_gb=0.2):
        found = [ledger(batch) for batch in Stream(config, 0, 1, 0)]
    assert_same(concatenate(found), planned(config, 0, 22))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Ray cluster of two nodes; yields the folder in which readers name themselves."""
    import ray
    from ray.cluster_utils import Cluster

    folder = tmp_path_factory.mktemp("readers")
    support = str(Path(__file__).parents[1])
    path = os.pathsep.join([support, *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {**SETTINGS, "PYTHONPATH": path, "MMREF_TEST_READERS": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        cluster = Cluster()
        try:
            for _ in range(2):
                add_node(cluster)
            cluster.wait_for_nodes()
            ray.init(address=cluster.address, log_to_driver=False)
            yield folder
        finally:
            ray.shutdown()
            cluster.shutdown()


def add_node(cluster: Any) -> None:
    """Ray gives a node 30 s to come up, too short on a busy machine: try again."""
    for attempt in range(START_ATTEMPTS):
        try:
            cluster.add_node(num_cpus=5, object_store_memory=200_000_000, include_dashboard=False)
            return
        except Exception as error:  # Ray raises a bare Exception here
            if "timed out during startup" not in str(error) or attempt == START_ATTEMPTS - 1:
                raise


@pytest.fixture
def readers(nodes: Path) -> Path:
    """The folder, without the readers of tests before."""
    for path in nodes.iterdir():
        path.unlink()
    return nodes


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_on_two_nodes_with_delays(readers: Path, make_config: Callable, world: int) -> None:
    config = make_config({"train.max_steps": 24, "data.steps_per_task": 2})
    assert_same(streamed(config, world, 0, 24, spread=True), planned(config, 0, 24))
    if world == 4:  # 4 ranks and 4 readers do not fit on one node of 5
        assert len({path.name.split("-")[0] for path in readers.iterdir()}) == 2, "readers ran on both nodes"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_readers_killed_at_random_moments(readers: Path, make_config: Callable, seed: int) -> None:
    config = make_config({"train.max_steps": 80, "data.steps_per_task": 2, "train.global_batch": 16})
    with Killer(readers, kills=4, seed=seed) as killer:
        found = streamed(config, 2, 0, 80)
    assert killer.killed, "the stream ended before a reader was killed"
    assert_same(found, planned(config, 0, 80))


@pytest.mark.slow
def test_stopped_at_random_steps_and_resumed_on_other_numbers_of_ranks(readers: Path, make_config: Callable) -> None:
    config = make_config({"train.max_steps": 40, "data.steps_per_task": 3})
    stops = [0, *sorted(random.Random(3).sample(range(1, 40), 3)), 40]
    parts = [streamed(config, world, *span) for world, span in zip((2, 4, 1, 2), pairwise(stops))]
    assert_same(concatenate(parts), planned(config, 0, 40))
