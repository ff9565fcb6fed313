from pathlib import Path

import pytest

from mmref.cluster import resources
from mmref.config import Config, load_config
from mmref.errors import ConfigError
from mmref.tuning.capacity import sharing, side_by_side


@pytest.fixture
def machine(monkeypatch):
    """Sets the cores that the process is bound to, and the quota of its container."""

    def set_to(bound, quota):
        monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: set(range(bound)))
        monkeypatch.setattr(resources, "container_cpus", lambda: quota)

    return set_to


@pytest.mark.parametrize("bound, quota, processes, threads", [(8, 16, 1, 8), (16, 4, 1, 4), (16, 16, 3, 5), (2, 2, 4, 1)])
def test_the_cores_of_a_node_are_shared_out(machine, bound, quota, processes, threads):
    machine(bound, quota)
    assert resources.torch_threads("auto", processes) == threads
    assert resources.torch_threads(7, processes) == 7


def test_trainings_at_a_time_share_them_too(machine, make_config):
    machine(8, 8)
    assert side_by_side(make_config({"train.threads": "auto"}), 8) == 8
    assert sharing(make_config({"train.threads": "auto"}), 3, 8).train.threads == 2
    assert sharing(make_config({"train.threads": "auto", "train.workers": 2}), 2, 8).train.threads == 2
    assert sharing(make_config({"train.threads": 4}), 3, 8).train.threads == 4


def test_trainings_on_other_nodes_take_no_threads(machine, make_config):
    machine(8, 8)
    one_reader = {"train.threads": "auto", "train.cpus_per_worker": 1.0, "data.readers": 1}
    assert sharing(make_config(one_reader), 20, 8).train.threads == 2  # a node has CPUs for four of them
    assert sharing(make_config({**one_reader, "data.readers": 7}), 20, 8).train.threads == 8
    assert sharing(make_config({**one_reader, "data.readers": 30}), 20, 8).train.threads == 8  # workers and readers apart


def test_the_machine_is_told_with_the_threads_that_are_used(machine, make_config):
    machine(6, 8)
    assert resources.machine(make_config({"train.threads": "auto", "train.workers": 2})).endswith("workers: 2 of 3 threads")


def test_threads_are_a_number_or_auto():
    assert Config().train.threads == "auto"
    flags = ["--config", str(Path(__file__).parents[2] / "configs" / "smoke.yaml"), "--train.threads"]
    assert load_config([*flags, "3"]).train.threads == 3 and load_config([*flags, "auto"]).train.threads == "auto"
    for wrong in ("0", "all", "1.5"):
        with pytest.raises(ConfigError, match=r"train\.threads"):
            load_config([*flags, wrong])
