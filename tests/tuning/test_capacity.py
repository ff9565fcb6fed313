"""How many trials fit a cluster, and the error with the arithmetic where none do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmref.config import Config
from mmref.errors import ClusterTooSmallError
from mmref.tuning.capacity import concurrency


@pytest.mark.parametrize(
    ("cpus", "workers", "readers", "cores", "trials"),
    [
        (8, 1, 1, None, 3),  # (8 - 1) / 2.1
        (8, 1, 1, 2, 2),  # a local cluster on two cores
        (8, 2, 1, 2, 1),
        (64, 4, 2, None, 5),  # (64 - 1) / 12.1
        (3.1, 1, 1, None, 1),
    ],
)
def test_trials_at_a_time(
    cpus: float, workers: int, readers: int, cores: int | None, trials: int, make_config: Callable[..., Config]
) -> None:
    config = make_config({"train.workers": workers, "data.readers": readers})
    assert concurrency({"CPU": cpus}, config, None, cores) == trials


def test_torch_threads_of_a_local_trial_take_cores_too(make_config: Callable[..., Config]) -> None:
    config = make_config({"train.threads": 2})
    assert concurrency({"CPU": 8}, config, None, 2) == 1
    assert concurrency({"CPU": 8}, config, None, 4) == 2
    assert concurrency({"CPU": 8}, config, None, None) == 3, "on a cluster its CPUs are what counts"


def test_gpus_bound_the_trials(make_config: Callable[..., Config]) -> None:
    config = make_config({"train.workers": 2, "train.gpu": True})
    assert concurrency({"CPU": 100, "GPU": 7}, config, None, None) == 3
    with pytest.raises(ClusterTooSmallError, match="1 GPUs / 2 workers"):
        concurrency({"CPU": 100, "GPU": 1}, config, None, None)


def test_a_sweep_that_cannot_fit_says_so_with_the_arithmetic(make_config: Callable[..., Config]) -> None:
    with pytest.raises(ClusterTooSmallError, match=r"only 0.*3 CPUs - 1 for Ray Data.*1 workers x \(1 CPU \+ 1 readers"):
        concurrency({"CPU": 3}, make_config(), None, None)
    with pytest.raises(ClusterTooSmallError, match="5 trainings at a time do not fit, only 3") as raised:
        concurrency({"CPU": 8}, make_config(), 5, None)
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
    assert " ".join(f"ClusterTooSmallError: {raised.value}".split()) in " ".join(page.split()), "as the manual quotes it"
