"""The next step's inputs, made ready in a thread while a step runs: reading, copies and augmentation take none of its time."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator

from mmref.data.reader import Batch
from mmref.train.inputs import StepInputs


class Ahead:
    """Batches of steps with their inputs, in order, one step ahead of who takes them.

    A step is begun when the one before is taken. So all ranks have begun the same steps whenever they stop, and what they
    gather in doing so comes to its end.
    """

    def __init__(self, batches: Iterator[Batch], prepare: Callable[[int, Batch], StepInputs], first: int, end: int) -> None:
        """Steps `first` to `end` - 1 of `batches`."""
        self.waited_s = 0.0  # of the time of who takes them
        self._batches, self._prepare, self._end = batches, prepare, end
        self._begun = first
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._made: queue.SimpleQueue[tuple[Batch, StepInputs] | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="mmref-ahead", daemon=True)
        self._thread.start()
        self._begin()

    def __iter__(self) -> Iterator[tuple[Batch, StepInputs]]:
        return self

    def __next__(self) -> tuple[Batch, StepInputs]:
        """Raises what reading or preparing the step has raised."""
        began = time.perf_counter()
        made = self._made.get()
        self.waited_s += time.perf_counter() - began
        if isinstance(made, BaseException):
            self._made.put(made)  # for whoever asks again
            raise made
        self._begin()
        return made

    def close(self) -> None:
        """Finish the step that was begun, and no other (collective)."""
        self._asked.put(None)
        self._thread.join()

    def _begin(self) -> None:
        if self._begun < self._end:
            self._asked.put(self._begun)
            self._begun += 1
        else:
            self._made.put(StopIteration())

    def _work(self) -> None:
        while (step := self._asked.get()) is not None:
            try:
                if (batch := next(self._batches, None)) is None:
                    raise RuntimeError(f"the stream of samples has ended before step {step}")
                self._made.put((batch, self._prepare(step, batch)))
            except BaseException as error:  # of foreign readers: it is raised where the step is taken
                self._made.put(error)
                return
