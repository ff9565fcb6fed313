"""Leaving early: ranks agree on the step, and the driver's answer to SIGTERM and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from mmref.config import Config
from mmref.errors import ReaderLeftError, TrainingStoppedError
from mmref.run.directory import RunDir
from mmref.train import stop, trainer

STEPS = 500


def _rank(rank: int, world: int, folder: str, every: int) -> None:
    """Steps of different lengths on each rank until a request that rank 0 alone can see."""
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    began = time.monotonic()
    stop.POLL_S = 0.05
    stop._requested = lambda run: stop.TERMINATE if time.monotonic() - began > 0.3 else 0
    stop.node_is_drained = lambda: False
    notice = stop.StopNotice(RunDir(folder), every)
    reason, step = 0, 0
    while step < STEPS and not reason:
        time.sleep(0.002 * (1 + rank))
        reason = notice.agreed()
        step += 1
    notice.close()
    Path(folder, f"rank-{rank}").write_text(f"{step} {reason}")


@pytest.mark.parametrize("every", [1, 4])
def test_ranks_leave_after_the_same_step_for_the_same_reason(tmp_path: Path, every: int) -> None:
    mp.start_processes(_rank, (2, str(tmp_path), every), nprocs=2, start_method="fork")
    left = [tuple(map(int, (tmp_path / f"rank-{rank}").read_text().split())) for rank in range(2)]
    assert left[0] == left[1]
    step, reason = left[0]
    assert 0 < step < STEPS and reason == stop.TERMINATE and (step - 1) % every == 0


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Requests to stop that would go to a cluster."""
    found: list[int] = []
    monkeypatch.setattr(stop, "request_stop", lambda run, reason: found.append(reason))
    return found


@pytest.fixture(autouse=True)
def ctrl_c_acts() -> Iterator[None]:
    """Also where the tests themselves run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


def _wait_for(requests: list[int]) -> None:
    until = time.monotonic() + 60
    while not requests and time.monotonic() < until:
        time.sleep(0.01)


def _swallowed(number: int) -> None:
    """A signal inside a call to Ray, which passes on what ends a process, and no Exception."""
    with contextlib.suppress(Exception):
        os.kill(os.getpid(), number)
        time.sleep(1)


@BOTH
def test_a_signal_while_workers_train_asks_them_to_stop(number: int, tmp_path: Path, requests: list[int]) -> None:
    before = signal.getsignal(number)
    with (
        pytest.raises(TrainingStoppedError, match="same command resumes") as found,
        stop.Termination(RunDir(str(tmp_path))) as termination,
    ):
        termination.training = True
        _swallowed(number)
        _wait_for(requests)
        assert termination.received and requests == [stop.TERMINATE]
        _swallowed(number)  # the second one does not wait
        pytest.fail("the second signal did nothing")
    assert signal.getsignal(number) is before and found.value.exit_status == 128 + number


@BOTH
def test_a_signal_outside_training_ends_the_run_at_once(number: int, tmp_path: Path, requests: list[int]) -> None:
    with (
        pytest.raises(TrainingStoppedError, match="same command resumes") as found,
        stop.Termination(RunDir(str(tmp_path))),
    ):
        _swallowed(number)
        pytest.fail("the signal did nothing")
    assert not requests and found.value.exit_status == 128 + number


def test_an_interrupt_without_a_signal_stays_one(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), stop.Termination(RunDir(str(tmp_path))):
        raise KeyboardInterrupt


@BOTH
def test_a_signal_asks_the_workers_to_stop_where_nobody_reads_any_more(
    number: int, tmp_path: Path, requests: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind `| tee log`, which Ctrl-C ends first."""

    def gone(*args: object, **how: object) -> None:
        raise ReaderLeftError("nobody reads")

    monkeypatch.setattr("builtins.print", gone)
    with stop.Termination(RunDir(str(tmp_path))) as termination:
        termination.training = True
        os.kill(os.getpid(), number)
        _wait_for(requests)
    assert termination.received == number and requests == [stop.TERMINATE]


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path, requests: list[int]) -> None:
    """A shell sets it so for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop.Termination(RunDir(str(tmp_path))) as termination:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            assert not termination.received
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_in_the_last_step_ends_the_job_too(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loop is left to see it, and the evaluation would take its time."""
    run, config = RunDir(str(tmp_path / "run")), make_config({"train.gpu": False})
    termination, done = stop.Termination(run), [0]

    def fit() -> SimpleNamespace:
        done[0], termination.received = config.train.max_steps, signal.SIGTERM
        return SimpleNamespace(return_value=0)

    job = SimpleNamespace(fit=fit, train_run_context=SimpleNamespace(run_id="one"))
    monkeypatch.setattr(trainer, "_trainer", lambda *args: job)
    monkeypatch.setattr(trainer, "_latest_step", lambda run: done[0])
    for name in ("withdraw_request", "take_place"):
        monkeypatch.setattr(trainer, name, lambda *args: None)
    with pytest.raises(TrainingStoppedError, match=f"after step {config.train.max_steps}") as found:
        trainer.fit(config, run, termination=termination)
    assert found.value.exit_status == 143
