"""What a person sees while a run goes on: a bar on a terminal, log lines elsewhere, both read from metrics.jsonl."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from mmref.errors import OutputError, StorageError
from mmref.losses.objective import LOSSES
from mmref.run.directory import NewLines, RunDir
from mmref.terminal.progress import clock, terminal_bar

POLL_S, POLL_URL_S = 0.5, 5.0


def log_line(record: dict[str, Any], max_steps: int, eta_s: float | None) -> str:
    """One line for one record: losses, speed, data wait and time left; or the val scores."""
    head = f"step {record['step']:>6}/{max_steps}"
    if "val_R@1" in record:
        ranked = f", {record['eval_rank_seconds']:.1f} of them to rank" if "eval_rank_seconds" in record else ""
        return (
            f"{head}  val R@1 {record['val_R@1']:.1f}  mAP {record['val_mAP']:.1f}  "
            f"(evaluated in {record['eval_seconds']:.1f} s{ranked}, "
            f"stopped {record['checkpoint_blocking_seconds']:.2f} s for the checkpoint)"
        )
    if "started" in record:
        return start_line(record)
    if "pace" in record:
        return f"{head}  about {record['pace']:.0f} images/s here{'' if eta_s is None else f', {clock(eta_s)} to go'}"
    if "sink_failure" in record:
        return f"{head}  {record['sink']} of `train.sinks` gets nothing more: {record['sink_failure']}. The run goes on"
    if "checkpoint_seconds" in record:
        return f"{head}  checkpoint complete after {record['checkpoint_seconds']:.1f} s"
    if "loss" not in record:  # no val split
        return f"{head}  stopped {record['checkpoint_blocking_seconds']:.2f} s for the checkpoint"
    parts = "  ".join(f"{name.removeprefix('loss_')} {record[name]:.3f}" for name in LOSSES if record.get(name))
    left = "" if eta_s is None else f"  eta {clock(eta_s)}"
    return (
        f"{head}  {parts}  {record['images_per_second']:.0f} images/s{_of_gpu(record)}  wait {100 * record['data_wait']:.1f} %  "
        f"{record['memory_gb']:.1f} GB{left}"
    )


def _of_gpu(record: dict[str, Any]) -> str:
    """What a log line makes of a GPU: its MFU, or TFLOP/s where nobody knows what it can do; "" on a CPU."""
    if "mfu" not in record:
        return ""
    mfu = record["mfu"]
    return f"  {record['tflops_per_worker']:.0f} TFLOP/s" if mfu is None else f"  MFU {100 * mfu:.1f} %"


def start_line(record: dict[str, Any]) -> str:
    """Where the workers of a run begin, and why not later: the one place that says so."""
    workers = f"{record['workers']} worker{'' if record['workers'] == 1 else 's'}"
    if threads := record.get("threads"):
        workers += f" of {threads} thread{'' if threads == 1 else 's'}"
    how = f" in {record['precision']} ({record['precision_why']})" if "precision" in record else ""
    where = f"resuming at step {record['step']}" if record["step"] else "from the beginning"
    damaged = record["passed_over"]
    why = f"; newer checkpoints cannot be used: {'; '.join(damaged)}" if damaged else ""
    return f"training on {workers}{how}, {where}{why}"


class Progress:
    """Follows a run's metrics.jsonl from a thread of the driver."""

    def __init__(self, run: RunDir, max_steps: int, start: int = 0) -> None:
        self.run, self.max_steps, self.start = run, max_steps, start
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        # Lines from before a resume are old news. A line of the same step and kind is shown once.
        self._new_lines = NewLines(run)
        self._seen = {_identity(r) for r in self._new_lines()}

    def __enter__(self) -> Progress:
        print(f"training to {self.run.path}; starting workers ...", flush=True)
        self._bar = terminal_bar(self.max_steps, "step", done=self.start)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._show()
        if self._bar is not None:
            self._bar.close()

    def _follow(self) -> None:
        while not self._stop.wait(POLL_S if self.run.local else POLL_URL_S):
            self._show()

    def _show(self) -> None:
        try:
            records = self._new_lines()
        except (OSError, StorageError):
            return  # being replaced, or out of reach for now
        for record in records:
            if _identity(record) in self._seen:
                continue
            if "started" in record:  # what earlier workers did after this step is done again
                self._seen = {one for one in self._seen if one[0] <= record["step"]}
            self._seen.add(_identity(record))
            left = record.get("step_seconds", record.get("pace_seconds", 0)) * (self.max_steps - record["step"]) or None
            line = log_line(record, self.max_steps, left)
            if self._bar is None or "loss" not in record:
                self.say(line)
            else:
                self._bar.n = record["step"]
                self._bar.set_postfix_str(line.split("  ", 1)[1])

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one. A run goes on where nobody reads it any more."""
        with contextlib.suppress(OutputError):
            if self._bar is None:
                print(line, flush=True)
            else:
                self._bar.write(line)


def _identity(record: dict[str, Any]) -> tuple[int, str]:
    if "started" in record:
        return record["step"], f"started {record['started']}"
    if "sink_failure" in record:
        return record["step"], f"sink {record['sink']}"
    return record["step"], next((kind for kind in ("loss", "checkpoint_seconds", "pace") if kind in record), "")
