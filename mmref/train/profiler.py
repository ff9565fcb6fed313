"""`train.profile`: what a few steps of rank 0 spend their time on, as a trace and as a table of operators."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from mmref.run.directory import RunDir
from mmref.train.memory import memory_snapshot

FOLDER = "profile"  # of a run
WARM_UP = 10  # steps before, in which kernels are chosen, towers compiled, and the reader fills its buffers
OPERATORS = 50  # of the table
ALLOCATIONS = 100_000  # kept of the latest


class StepProfiler:
    """Traces steps WARM_UP + 1 to WARM_UP + `steps` after the start; of 0 steps it does nothing.

    `trace.json.gz` opens in https://ui.perfetto.dev and chrome://tracing. On a GPU `memory.pickle` has every allocation of the
    traced steps with the code that asked for it, for https://pytorch.org/memory_viz. Of a run that ends earlier it is the steps
    that there were, or nothing.
    """

    def __init__(self, run: RunDir, steps: int, device: torch.device) -> None:
        self.run, self.steps, self.on_gpu = run, steps, device.type == "cuda"
        self._profile: Any = None

    def __enter__(self) -> StepProfiler:
        if self.steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
            # The profiler's own first step is slow, and is thrown away.
            plan = schedule(wait=WARM_UP - 1, warmup=1, active=self.steps, repeat=1)
            self._profile = profile(activities=activities, schedule=plan, on_trace_ready=self._write, record_shapes=True)
            self._profile.__enter__()
            if self.on_gpu:
                torch.cuda.memory._record_memory_history(stacks="python", max_entries=ALLOCATIONS)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if self._profile is not None:
            self._close(recording=kind is torch.OutOfMemoryError)  # whose snapshot has them

    def step(self) -> None:
        """Say that a step is over."""
        if self._profile is not None:
            self._profile.step()
            if self._profile.step_num == WARM_UP + self.steps:
                self._close()

    def _close(self, recording: bool = False) -> None:
        """recording: go on keeping allocations."""
        finished, self._profile = self._profile, None
        finished.__exit__(None, None, None)
        if self.on_gpu and not recording:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, finished: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="mmref-profile-") as folder:
            trace = os.path.join(folder, "trace.json.gz")
            finished.export_chrome_trace(trace)
            with open(trace, "rb") as file:
                self.run.write_bytes(f"{FOLDER}/trace.json.gz", file.read())
        by = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
        table = finished.key_averages().table(sort_by=by, row_limit=OPERATORS, max_name_column_width=60)
        self.run.write_text(f"{FOLDER}/operators.txt", f"{finished.step_num - WARM_UP} steps after {WARM_UP}\n\n{table}\n")
        if self.on_gpu:
            self.run.write_bytes(f"{FOLDER}/memory.pickle", memory_snapshot())
