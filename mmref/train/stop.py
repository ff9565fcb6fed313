"""Leaving early without losing a step: every worker checkpoints at the same step and returns.

Asked for by SIGTERM to the driver (spot instances, `ray job stop`) or Ctrl-C, by Ray's notice that a node is being drained, or by
the scaling policy when nodes for more workers have come. The request lies in the cluster's key-value store, where rank 0
looks for it; ranks agree on it by a reduction that runs beside the next step, so no step waits for it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mmref.cluster.ray_private import get_note, node_is_drained, put_note, remove_note
from mmref.errors import OutputError, TrainingStoppedError
from mmref.run.directory import RunDir

DRAIN, GROW, TERMINATE = 1, 2, 3  # why a run leaves early; where several hold, the highest counts
POLL_S = 0.5
SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


def request_stop(run: RunDir, reason: int) -> None:
    """Ask the workers of a run to checkpoint and leave. Needs a connection to the run's cluster."""
    put_note(_key(run), str(reason))


def withdraw_request(run: RunDir) -> None:
    """Remove a request that has been answered, or that nobody was there to answer."""
    remove_note(_key(run))


def _requested(run: RunDir) -> int:
    return int(get_note(_key(run)) or 0)


def _key(run: RunDir) -> str:
    return f"mmref-stop:{run.path}"


class StopNotice:
    """A worker's view of requests to stop, the same on every rank at the same step."""

    def __init__(self, run: RunDir, every: int = 1) -> None:
        """Collective where there are several ranks, which agree at every so many steps."""
        self._every = every
        self._several = dist.is_initialized() and dist.get_world_size() > 1
        # The ranks agree on CPU tensors, also where training is on GPUs: reading the answer synchronises no device.
        self._group = dist.new_group(backend="gloo") if self._several else None
        self._answer = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None
        self._step = 0  # counted from the start of this worker, at the same step on every rank
        self._seen = 0
        self._closed = threading.Event()
        if not self._several or dist.get_rank() == 0:
            threading.Thread(target=self._watch, args=(run,), daemon=True).start()

    def agreed(self) -> int:
        """Once a step (collective): the reason to leave after this step, 0 for none.

        Where there are several ranks it is known one step after they were to agree.
        """
        self._step += 1
        if not self._several:
            return self._wanted()
        before = 0
        if self._work is not None:  # begun a step ago
            self._work.wait()
            before, self._work = int(self._answer), None
        if self._step % self._every == 0:
            self._answer = torch.tensor([self._wanted()], dtype=torch.int32)
            self._work = dist.all_reduce(self._answer, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return before

    def _wanted(self) -> int:
        return max(self._seen, DRAIN if node_is_drained() else 0)

    def close(self) -> None:
        """Stop watching, and take part in the last reduction to its end."""
        self._closed.set()
        if self._work is not None:
            self._work.wait()

    def _watch(self, run: RunDir) -> None:
        while not self._closed.wait(POLL_S):
            self._seen = max(self._seen, _requested(run))


class Termination:
    """The driver's answer to SIGTERM and Ctrl-C, as a context: a checkpoint first while workers train, else the end at once.

    What ends at once raises TrainingStoppedError; a second signal does not wait for the checkpoint. Outside the main thread (a
    trial of a sweep) signals are left alone, and so is one that is ignored, as Ctrl-C is by what a shell runs in the background.
    """

    def __init__(self, run: RunDir) -> None:
        self.run, self.received, self.training = run, 0, False

    def __enter__(self) -> Termination:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received and kind is not None and issubclass(kind, KeyboardInterrupt):
            raise self.error() from None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.received = self.received, number
        if again or not self.training:
            raise KeyboardInterrupt  # a call to Ray, which the main thread is mostly in, swallows an Exception
        # The request comes before all that may fail, in a thread of its own, since the main one is inside a call to Ray.
        threading.Thread(target=request_stop, args=(self.run, TERMINATE), daemon=True).start()
        how = ", again to stop at once" if number == signal.SIGINT else ""
        with contextlib.suppress(OutputError):  # Ctrl-C ends the `tee` behind a command too
            print(f"{SIGNALS[number]}: the workers finish their step and write a checkpoint{how} ...", flush=True)

    def error(self, step: int | None = None) -> TrainingStoppedError:
        """What the run ends with; `step`: the steps its last checkpoint holds."""
        held = "" if step is None else f" after step {step}, which its checkpoint holds"
        text = f"{self.run.path} stopped on {SIGNALS[self.received]}{held}. The same command resumes it."
        stopped = TrainingStoppedError(text)
        stopped.exit_status = 128 + self.received
        return stopped
