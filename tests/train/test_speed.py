"""TFLOP/s and MFU of a log line."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmref.sizing.estimate import flops_of_a_pair
from mmref.train import speed as module
from mmref.train.speed import Speed

CPU = torch.device("cpu")
BATCH = {"mask": (np.arange(10) < np.array([[3], [5], [4], [8]])).astype(np.int32)}  # 5 tokens on average


def test_a_cpu_says_what_it_computes_alone(make_config):
    config = make_config()
    speed = Speed(config, CPU, False, True, 14)
    assert speed(1000.0) == {}, "nothing counted yet"
    speed.learn(BATCH)
    assert speed(1000.0) == {"tflops_per_worker": pytest.approx(1000 * flops_of_a_pair(config, 5, 14) / 1e12)}


def test_towers_that_read_padding_compute_all_of_it(make_config):
    config = make_config()
    speed = Speed(config, CPU, False, False, 14)
    speed.learn(BATCH)
    assert speed.flops == flops_of_a_pair(config, 10, 14)


@pytest.mark.parametrize(
    ("name", "bf16", "peak"), [("NVIDIA H200", True, 989.5), ("NVIDIA H200", False, 67), ("Unheard Of", True, None)]
)
def test_a_gpu_says_its_share_of_the_peak_where_that_is_known(make_config, monkeypatch, name, bf16, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    gpu: Any = SimpleNamespace(type="cuda")
    speed = Speed(make_config(), gpu, bf16, True, 14)
    speed.flops = 100e9
    share = None if peak is None else pytest.approx(30 / peak)
    assert speed(300.0) == {"tflops_per_worker": pytest.approx(30), "mfu": share}


def test_kept_features_are_not_counted(make_config, tmp_path):
    frozen = {"model.freeze_backbone": True, "model.adapter_layers": 1, "data.crop_padding": 0}
    speed = Speed(make_config({**frozen, "model.feature_cache": str(tmp_path)}), CPU, False, True, 14)
    speed.learn(BATCH)
    assert speed(1000.0) == {}


def test_towers_that_cannot_be_counted_end_no_run(make_config, monkeypatch, caplog):
    def fail(*_: Any) -> float:
        raise NotImplementedError("no shape")

    monkeypatch.setattr(module, "flops_of_a_pair", fail)
    speed = Speed(make_config(), CPU, False, True, 14)
    with caplog.at_level(logging.WARNING):
        speed.learn(BATCH)
    assert speed(1000.0) == {} and "no shape" in caplog.text
