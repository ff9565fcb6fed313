"""A step leaves the host of a GPU nothing to wait for, and the counter that says so counts what it should."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CONFIGS = (
    "clip_vit_b16", "cuhk_pedes", "cuhk_pedes, sampled negatives, reconstruction",
    "cuhk_pedes, sampled negatives, reconstruction, two micro-batches", "irra",
    "clip_vit_b16, jitter, weighted captions, soft targets",
)  # fmt: skip


@pytest.fixture
def syncs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.chdir(ROOT)
    return importlib.import_module("syncs")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_waits_for_nothing(syncs: Any, name: str) -> None:
    found = syncs.count(syncs.small(*syncs.CONFIGS[name]))
    assert found == {"sync_ops": 0, "pageable_copies": 0, "where": {}}


def test_every_config_is_counted(syncs: Any) -> None:
    assert set(CONFIGS) == set(syncs.CONFIGS)


def _if(x: torch.Tensor) -> int:
    return 1 if (x > 0).all() else 0


SYNCS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a number": lambda x, i: x.sum().item(),
    "a condition": lambda x, i: _if(x),
    "a copy to the host": lambda x, i: x.cpu(),
    "a copy into a tensor of the host": lambda x, i: torch.zeros(4).copy_(x),
    "places": lambda x, i: (x > 1).nonzero(),
    "a mask as index": lambda x, i: x[x > 1],
    "a mask that is set": lambda x, i: x.index_put((x > 1,), x[:1]),
    "different values": lambda x, i: i.unique(),
    "chosen values": lambda x, i: x.masked_select(x > 1),
    "counts": lambda x, i: i.bincount(),
    "the same": lambda x, i: torch.equal(x, x),
    "repeated": lambda x, i: x.repeat_interleave(i),
}
COPIES: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "a tensor": lambda x, i: x + torch.arange(4.0).to(x.device),
    "one that is not pinned": lambda x, i: x + torch.arange(4.0).to(x.device, non_blocking=True),
    "numbers": lambda x, i: x * torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
    "numbers as they are": lambda x, i: torch.as_tensor(3.0, device=x.device),
    "into a tensor": lambda x, i: x.copy_(torch.arange(4.0)),
    "an index": lambda x, i: x[torch.tensor([1, 0])],
}
NEITHER: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "sums": lambda x, i: (x.sum(), x.softmax(0), x.sort()),
    "an index of the device": lambda x, i: (x[i], x.index_put((i,), x)),
    "a place that is set": lambda x, i: x.__setitem__(2, 5.0),
    "a search": lambda x, i: torch.searchsorted(x, x),
    "one of two": lambda x, i: torch.where(x > 1, x, -x),
    "zeros": lambda x, i: torch.zeros(3, device=x.device) + torch.arange(3, device=x.device),
    "repeated so often": lambda x, i: x.repeat_interleave(i, output_size=6),
}


def counted(syncs: Any, ask: Callable[[torch.Tensor, torch.Tensor], Any]) -> tuple[int, int]:
    with syncs.SyncCounter() as counter:
        x, i = torch.arange(4.0).to(syncs.DEVICE), torch.arange(4).to(syncs.DEVICE)
        counter.copies.clear()
        ask(x, i)
    found = counter.result()
    return found["sync_ops"], found["pageable_copies"]


@pytest.mark.parametrize("what", SYNCS)
def test_a_sync_is_counted(syncs: Any, what: str) -> None:
    found, copies = counted(syncs, SYNCS[what])
    assert found >= 1 and copies == 0


@pytest.mark.parametrize("what", COPIES)
def test_a_copy_that_is_not_from_pinned_memory_is_counted(syncs: Any, what: str) -> None:
    assert counted(syncs, COPIES[what]) == (0, 1)


@pytest.mark.parametrize("what", NEITHER)
def test_what_runs_by_itself_is_not_counted(syncs: Any, what: str) -> None:
    assert counted(syncs, NEITHER[what]) == (0, 0)


def test_pinned_memory_is_told_from_other(syncs: Any) -> None:
    memory = torch.arange(4.0)
    with syncs.SyncCounter() as counter:
        counter.pinned.add(memory.untyped_storage().data_ptr())
        memory.to(syncs.DEVICE, non_blocking=True)
        assert counter.copies.total() == 0
        memory.to(syncs.DEVICE)  # the host waits for this one
    assert counter.copies.total() == 1


def test_the_made_up_device_has_the_numbers_of_the_host(syncs: Any) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with syncs.SyncCounter():
        y = x.detach().to(syncs.DEVICE).requires_grad_()
        (y.softmax(1)[:, 0] * y.sum()).sum().backward()
        found = y.grad.cpu()
    (x.softmax(1)[:, 0] * x.sum()).sum().backward()
    assert torch.equal(found, x.grad)


def test_tensors_of_two_devices_do_not_meet(syncs: Any) -> None:
    with syncs.SyncCounter(), pytest.raises(RuntimeError, match="two devices"):
        torch.arange(4.0).to(syncs.DEVICE) + torch.arange(4.0)
