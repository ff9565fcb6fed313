"""`auto`: where training and encoding go by what is there."""

from __future__ import annotations

import pytest
import ray
import torch

from mmref.cluster.resources import gpus_for, with_gpus
from mmref.errors import ModelError
from mmref.model.device import chosen_device, described
from mmref.model.mmref import chosen_precision


@pytest.mark.parametrize("asked, have, workers, least, found", [
    ("auto", 0, 1, 0, False), ("auto", 1, 1, 0, True), ("auto", 1, 2, 0, False), ("auto", 1, 2, 1, True), ("auto", 2, 2, 0, True),
    (True, 0, 1, 0, True), (False, 8, 1, 0, False),
])  # fmt: skip
def test_auto_takes_gpus_where_each_worker_gets_one(asked, have, workers, least, found, make_config, monkeypatch):
    config = make_config({"train.gpu": asked, "train.workers": workers, "train.min_workers": least, "train.global_batch": 8})
    assert gpus_for(config.train, {"GPU": have} if have else {}) is found
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": float(have)})
    settled = with_gpus(config)
    assert settled.train.gpu is settled.train.on_gpu is found and config.train.gpu == asked


def test_until_it_is_settled_nothing_counts_on_a_gpu(make_config):
    config = make_config()
    assert config.train.gpu == "auto" and not config.train.on_gpu
    config.train.precision = "auto"
    assert ("GPU" in chosen_precision(config.train)[1]) is torch.cuda.is_available()


def test_the_device_that_is_there_is_taken_and_another_is_named(monkeypatch):
    assert chosen_device("cpu").type == "cpu" and described(chosen_device("cpu")) == "CPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device().type == "cpu"
    with pytest.raises(ModelError, match="cuda is not here: PyTorch sees no GPU"):
        chosen_device("cuda")
    with pytest.raises(ModelError, match="none that PyTorch knows"):
        chosen_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device().type == "cuda"
