"""Which numbers of workers a run may have, how each cuts the batch, and what the command line says of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mmref.config import Config, config_hash
from mmref.errors import BatchArithmeticError, ConfigError
from mmref.train.elastic import accumulation_for, largest_count, worker_counts


def test_numbers_of_workers_divide_the_batch(make_config: Callable[..., Config]) -> None:
    config = make_config({"train.global_batch": 24, "train.workers": 8, "train.min_workers": 2})
    assert worker_counts(config) == [2, 3, 4, 6, 8]
    fixed = make_config({"train.global_batch": 24, "train.workers": 8})
    assert worker_counts(fixed) == [8]


def test_fewer_workers_have_no_larger_micro_batches(make_config: Callable[..., Config]) -> None:
    config = make_config({"train.global_batch": 24, "train.workers": 6, "train.min_workers": 1, "train.accumulation": 2})
    assert config.micro_batch == 2
    assert accumulation_for(config, 6) == 2, "as configured"
    for workers in worker_counts(config):
        micro_batches = workers * accumulation_for(config, workers)
        assert 24 % micro_batches == 0 and 24 // micro_batches <= 2
    assert accumulation_for(config, 4) == 3, "24 / (4 x 3) = 2"


def test_largest_number_with_places_and_cpus_for_the_readers(make_config: Callable[..., Config]) -> None:
    config = make_config({"train.global_batch": 8, "train.workers": 4, "train.min_workers": 1, "data.readers": 1})
    assert largest_count(config, places=4, cpus=8) == 4
    assert largest_count(config, places=3, cpus=8) == 2, "8 does not divide by 3"
    assert largest_count(config, places=4, cpus=4) == 2, "4 workers would leave their readers no CPU"
    assert largest_count(config, places=4, cpus=1) == 0


def test_a_smallest_number_that_cannot_be_is_refused(make_config: Callable[..., Config]) -> None:
    with pytest.raises(BatchArithmeticError, match=r"8 / 3 = 2\.67\); it does over \[1, 2, 4\]"):
        make_config({"train.global_batch": 8, "train.workers": 4, "train.min_workers": 3})
    with pytest.raises(ConfigError, match=r"between 0 and `train.workers` 2, found 4"):
        make_config({"train.workers": 2, "train.min_workers": 4})


def test_the_number_of_workers_is_not_part_of_a_run(make_config: Callable[..., Config]) -> None:
    assert config_hash(make_config({"train.workers": 2, "train.min_workers": 1})) == config_hash(make_config())
