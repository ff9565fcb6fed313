"""Inputs are made one step ahead, in order, and what goes wrong there is raised where the step is taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.plain_training import PlainTraining

from mmref.errors import SampleError
from mmref.train.ahead import Ahead
from mmref.train.bank import ReferenceBank
from mmref.train.inputs import Preparation, Staging


def numbers(first: int, end: int) -> Iterator[Any]:
    yield from range(first, end)


def ahead(batches: Iterator[Any], first: int, end: int, begun: list[int]) -> Any:
    def prepare(step: int, batch: Any) -> Any:
        begun.append(step)
        return step, batch, threading.current_thread().name

    return Ahead(batches, prepare, first, end)


def until(condition: Any) -> None:
    stop = time.monotonic() + 30
    while not condition() and time.monotonic() < stop:
        time.sleep(0.001)
    assert condition()


def test_steps_come_in_order_one_ahead() -> None:
    begun: list[int] = []
    taken = []
    made = ahead(numbers(3, 9), 3, 9, begun)
    for batch, (step, of, thread) in made:
        assert batch == of == step and thread == "mmref-ahead" != threading.current_thread().name
        taken.append(step)
        until(lambda step=step: begun[-1] == min(step + 1, 8))
        time.sleep(0.005)
        assert begun[-1] == min(step + 1, 8), "no more than one step ahead: ranks that stop have begun the same"
    assert taken == list(range(3, 9)) == begun
    made.close()


def test_nothing_is_asked_for_where_no_step_is_left() -> None:
    begun: list[int] = []
    made = ahead(iter(()), 5, 5, begun)
    assert list(made) == [] and begun == []
    made.close()


def test_closing_finishes_the_step_that_was_begun() -> None:
    begun: list[int] = []
    made = ahead(numbers(0, 9), 0, 9, begun)
    next(made)
    made.close()
    assert begun == [0, 1]


def test_an_error_is_raised_where_its_step_is_taken() -> None:
    def batches() -> Iterator[Any]:
        yield 0
        raise SampleError("object 7 has no usable image left.")

    made = ahead(batches(), 0, 9, [])
    next(made)
    for _ in range(2):
        with pytest.raises(SampleError, match="object 7"):
            next(made)


def test_a_stream_that_ends_early_is_an_error() -> None:
    made = ahead(numbers(0, 2), 0, 9, [])
    next(made), next(made)
    with pytest.raises(RuntimeError, match="ended before step 2"):
        next(made)


def test_time_is_counted_that_the_loop_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ahead(numbers(0, 3), 0, 3, [])
    clock = iter([10.0, 13.0, 20.0, 20.5])
    monkeypatch.setattr("mmref.train.ahead.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    next(made)
    assert made.waited_s == 3.0
    next(made)
    assert made.waited_s == 3.5


def test_what_is_made_ahead_is_what_is_made_in_turn(make_config: Any) -> None:
    """Buffers are used again; a step's inputs are its own for as long as it runs."""
    config = make_config({"loss.w_rec": 0.3, "reference.negatives": "sampled", "reference.sampled_negatives": 3})
    one, other = PlainTraining(config), PlainTraining(config)
    made = Ahead((one.reader.read_step(step) for step in range(5)), one.runner.prepare, 0, 5)
    for step, (batch, inputs) in enumerate(made):
        time.sleep(0.02)  # the next is being made
        losses = one.runner.run(step, inputs)
        expected = other.runner.run(step, other.runner.prepare(step, other.reader.read_step(step)))
        assert torch.equal(losses, expected) and (batch["step"] == step).all()
    made.close()


def test_staged_arrays_have_memory_of_their_own() -> None:
    stage, kept = Staging(torch.device("cpu")), []
    for step in range(4):
        stage.begin()
        kept.append((stage("a", np.arange(6 + step).reshape(2, -1) + 10 * step if step % 2 == 0 else np.arange(2) + step),
                     stage("b", torch.full((3,), float(step)))))  # fmt: skip
        assert stage.end() is None
    assert [a.sum().item() for a, _ in kept] == [15, 3, 28 + 160, 7]
    assert kept[0][0].tolist() == [[0, 1, 2], [3, 4, 5]] and kept[0][0].dtype == torch.int64
    assert [b.tolist() for _, b in kept] == [[float(step)] * 3 for step in range(4)]


def test_memory_is_used_again_every_second_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stage, made = Staging(torch.device("cpu")), []
    monkeypatch.setattr("mmref.train.inputs.host_memory", lambda n, _: made.append(n) or torch.empty(n, dtype=torch.uint8))
    for count in (4, 4, 4, 3, 5, 5):
        stage.begin()
        stage("a", np.zeros(count, np.int32))
        stage.end()
    assert made == [16, 16, 20, 20], "a larger array takes new memory"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies beside a step are a GPU's")
def test_a_gpu_is_given_what_the_host_makes(make_config: Any) -> None:
    """From pinned memory, on a stream of their own, while the GPU is busy with the step before."""
    overrides = {"loss.w_rec": 0.3, "reference.negatives": "sampled", "reference.sampled_negatives": 3}
    near, device = PlainTraining(make_config(overrides)), torch.device("cuda")
    config, tokens = near.config, near.reader.tokens
    bank = ReferenceBank(near.reader.index.n_objects, 8, config.reference, config.train.seed, device)
    made = Ahead((near.reader.read_step(step) for step in range(6)), Preparation(config, bank, tokens, device), 0, 6)
    busy = torch.randn(4096, 4096, device=device)
    for step, (_, inputs) in enumerate(made):
        busy = (busy @ busy).clamp(-1, 1)
        (found,), (expected,) = inputs.take().micro, near.runner.prepare(step, near.reader.read_step(step)).micro
        torch.testing.assert_close(found.pixels.cpu(), expected.pixels)
        for name in ("ids", "mask", "objects", "targets"):
            assert torch.equal(getattr(found, name).cpu(), getattr(expected, name))
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found.masked, expected.masked))
    made.close()
