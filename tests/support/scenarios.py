"""Faults done to a training run on a cluster of several nodes, and what became of it. For the tests and for `make chaos`.

Each scenario starts a run of two workers on two nodes, does one thing to it, and ends with the run at its last step. The
outcome holds the ledger against the plan, and the losses against those of a run that nobody disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from mmref.run.directory import RunDir
from mmref.train.ledger import Seen, audit_run, plan_of, read_ledger
from support.jobs import Job, losses, records, wait_for, write_config
from support.nodes import Nodes
from support.tiny_set import damage_image, tiny_config

STEPS, EVERY = 240, 40
DRIVE = str(Path(__file__).parent / "drive.py")
RELATIVE = 1e-4  # largest relative difference of a step's loss on another number of workers


@dataclass
class Outcome:
    """One line of the table. A fault that ends a run has no time of recovery."""

    fault: str
    recovered_s: float | None
    samples_lost: int
    samples_repeated: int
    passed: bool
    remark: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Chaos:
    """A cluster, a tiny set and the undisturbed run on it."""

    def __init__(self, nodes: Nodes, tiny_set: Path, folder: Path) -> None:
        self.nodes, self.tiny_set, self.folder = nodes, tiny_set, folder
        overrides = {
            "train.workers": 2, "train.cpus_per_worker": 2, "train.max_steps": STEPS, "train.log_every": 1,
            "train.eval_every": EVERY, "loss.w_rec": 0.2,
        }  # fmt: skip
        self.config = write_config(tiny_config(tiny_set, overrides), folder)
        self.undisturbed = folder / "undisturbed"
        status, output = self.start(self.undisturbed).wait()
        assert status == 0, output

    def start(self, run: Path, *flags: str) -> Job:
        """The command of a run; again, it resumes the run."""
        return Job(DRIVE, "--config", str(self.config), "--run_dir", str(run), *flags, address=self.nodes.address)

    def until(self, run: Path, step: int, job: Job) -> None:
        wait_for(lambda: last_step(run) >= step, job)

    def outcome(self, fault: str, run: Path, seconds: float | None, remark: str) -> Outcome:
        """Compare a finished run with the undisturbed one."""
        audit = audit_run(str(run))
        same_samples = samples_of(run) == samples_of(self.undisturbed)
        mine, theirs = losses(run), losses(self.undisturbed)
        far = [s for s in theirs if s not in mine or abs(mine[s] - theirs[s]) > RELATIVE * abs(theirs[s])]
        passed = audit.sound and audit.steps == STEPS and same_samples and not far
        if far:
            remark += f"; {len(far)} steps have another loss, the first is {far[0]}"
        return Outcome(fault, seconds, audit.lost, audit.repeated, passed, remark)


def samples_of(run: Path) -> list[Seen]:
    """The ledger of a run."""
    opened = RunDir(str(run))
    return list(read_ledger(opened, lambda: plan_of(opened)))


def last_step(run: Path) -> int:
    return max((r["step"] for r in records(run) if "loss" in r), default=0)


def _log_file(run: Path) -> int:
    """Identity of metrics.jsonl: workers that start replace the file."""
    try:
        return (run / "metrics.jsonl").stat().st_ino
    except FileNotFoundError:
        return 0


@contextlib.contextmanager
def recovery(run: Path) -> Iterator[Callable[[Job], float]]:
    """Around a fault: a function that waits for the first step beyond the one at the fault, and returns the seconds."""
    before, began = _log_file(run), time.monotonic()
    found: dict[str, int] = {}

    def wait(job: Job) -> float:
        wait_for(lambda: _log_file(run) != before and last_step(run) > found["step"], job)
        return time.monotonic() - began

    yield wait
    found["step"] = last_step(run)


def _finish(job: Job, expect: int = 0) -> str:
    status, output = job.wait()
    assert status == expect, f"exit status {status}: {output[-3000:]}"
    return output


def worker_killed(chaos: Chaos) -> Outcome:
    run = chaos.folder / "worker_killed"
    job = chaos.start(run)
    chaos.until(run, EVERY + 5, job)
    victim = next(found[0] for found in chaos.nodes.workers().values() if found)
    with recovery(run) as recovered:
        victim.kill()
    seconds = recovered(job)
    _finish(job)
    return chaos.outcome("worker killed", run, seconds, "replaced on the same nodes")


def node_killed_with_spare(chaos: Chaos) -> Outcome:
    run = chaos.folder / "node_killed_with_spare"
    chaos.nodes.ensure(3)
    job = chaos.start(run)
    chaos.until(run, EVERY + 5, job)
    victim = chaos.nodes.busy()[0]
    with recovery(run) as recovered:
        chaos.nodes.kill(victim)
    seconds = recovered(job)
    assert len(chaos.nodes.busy()) == 2, "a worker on each of the nodes that are left"
    _finish(job)
    return chaos.outcome("node killed, a spare one there", run, seconds, "two workers again")


def node_killed_elastic(chaos: Chaos) -> Outcome:
    run = chaos.folder / "node_killed_elastic"
    chaos.nodes.ensure(2)
    job = chaos.start(run, "--train.min_workers", "1")
    chaos.until(run, EVERY + 5, job)
    victim = chaos.nodes.busy()[0]
    with recovery(run) as recovered:
        chaos.nodes.kill(victim)
    seconds = recovered(job)
    assert sum(map(len, chaos.nodes.workers().values())) == 1
    _finish(job)
    return chaos.outcome("node killed, none spare", run, seconds, "one worker of two went on (train.min_workers 1)")


def node_added(chaos: Chaos) -> Outcome:
    """A run that began with fewer workers than asked for grows when a node comes."""
    run = chaos.folder / "node_added"
    chaos.nodes.ensure(1)
    job = chaos.start(run, "--train.min_workers", "1")
    chaos.until(run, 5, job)
    with recovery(run) as recovered:
        chaos.nodes.ensure(2)
    seconds = recovered(job)
    assert sum(map(len, chaos.nodes.workers().values())) == 2
    output = _finish(job)
    assert "places for more workers" in output
    return chaos.outcome("node added", run, seconds, "from one worker to two, by a checkpoint in between")


def node_drained(chaos: Chaos) -> Outcome:
    run = chaos.folder / "node_drained"
    chaos.nodes.ensure(3)
    job = chaos.start(run)
    chaos.until(run, EVERY + 5, job)
    victim = chaos.nodes.busy()[0]
    with recovery(run) as recovered:
        chaos.nodes.drain(victim, seconds=120)
    seconds = recovered(job)
    assert victim not in chaos.nodes.busy()
    output = _finish(job)
    assert "a node is being taken away" in output and "workers started; going on" not in output, output
    chaos.nodes.kill(victim)
    return chaos.outcome("notice that a node goes", run, seconds, "checkpoint, no step repeated, on to a spare node")


def driver_terminated(chaos: Chaos) -> Outcome:
    run = chaos.folder / "driver_terminated"
    chaos.nodes.ensure(2)
    job = chaos.start(run)
    chaos.until(run, EVERY + 5, job)
    with recovery(run) as recovered:
        job.process.send_signal(signal.SIGTERM)
    output = _finish(job, expect=143)
    assert "TrainingStoppedError" in output and "The same command resumes it" in output, output
    stopped = last_step(run)
    again = chaos.start(run)
    seconds = recovered(again)
    output = _finish(again)
    assert f"resuming at step {stopped}" in output, "no step was lost"
    return chaos.outcome("SIGTERM to the driver", run, seconds, "checkpoint, exit status 143, same command, no step repeated")


def driver_killed(chaos: Chaos) -> Outcome:
    run = chaos.folder / "driver_killed"
    chaos.nodes.ensure(2)
    job = chaos.start(run)
    chaos.until(run, EVERY + 5, job)
    with recovery(run) as recovered:
        job.process.kill()
        job.process.wait()
    again = chaos.start(run)
    seconds = recovered(again)
    output = _finish(again)
    assert f"resuming at step {EVERY}" in output
    return chaos.outcome("driver killed", run, seconds, "same command again")


def killed_while_saving(chaos: Chaos) -> Outcome:
    """The second worker is frozen with its part of a checkpoint unwritten; then everything is killed."""
    run = chaos.folder / "killed_while_saving"
    chaos.nodes.ensure(2)
    job = chaos.start(run)
    chaos.until(run, EVERY + 1, job)
    half = None
    for step in range(2 * EVERY, STEPS, EVERY):
        chaos.until(run, step - 10, job)
        workers = [found[0] for found in chaos.nodes.workers().values() if found]
        if half := _freeze_in(run / "checkpoints", f"step-{step:08d}-", workers[1], job):
            break
    assert half is not None, "every checkpoint was written too fast to be caught"
    with recovery(run) as recovered:
        for worker in workers:
            worker.kill()
    seconds = recovered(job)
    _finish(job)
    steps = [json.loads(p.read_text())["step"] for p in run.glob("checkpoints/step-*/meta.json")]
    assert steps[-1:] and not half.exists(), "what was left of the half checkpoint is removed"
    return chaos.outcome("killed while a checkpoint is written", run, seconds, "the one before was used")


def _freeze_in(folder: Path, prefix: str, worker: psutil.Process, job: Job) -> Path | None:
    """Freeze a worker as soon as a checkpoint appears; its folder if it is still half, else None (and go on)."""
    while job.process.poll() is None:
        found = next((n for n in os.listdir(folder) if n.startswith(prefix)), None)
        if found:
            os.kill(worker.pid, signal.SIGSTOP)
            time.sleep(1.0)  # what is already written gets committed in this time
            if not (folder / found / "meta.json").exists():
                return folder / found
            os.kill(worker.pid, signal.SIGCONT)
            return None
    return None


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own of this size, with an empty file `ballast`. Needs to be root, as in a container."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        (folder / "ballast").touch()  # there is room for a new file's own page now
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _fill(disk: Path) -> Path:
    """Write into the ballast of `small_disk` until nothing is left: the run writes meanwhile, so what is free is not known."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(b"\0" * size):
                    pass
    return ballast


def storage_full_for_a_while(chaos: Chaos) -> Outcome:
    chaos.nodes.ensure(2)
    with small_disk(chaos.folder / "disk_for_a_while", 32) as disk:
        run = disk / "run"
        job = chaos.start(run)
        chaos.until(run, EVERY + 5, job)
        wait_for(lambda: list(run.glob(f"checkpoints/step-{EVERY:08d}-*/meta.json")), job)
        ballast, began = _fill(disk), time.monotonic()
        at = wait_for(_standstill(run, 8), job)
        ballast.unlink()
        wait_for(lambda: last_step(run) > at, job)
        seconds = time.monotonic() - began
        output = _finish(job)
        assert len(re.findall(r"^training on \d+ workers?\b", output, re.MULTILINE)) == 1, "no worker was lost"
        return chaos.outcome("storage full for a while", run, seconds, "8 s at a standstill, then went on by itself")


def _standstill(run: Path, seconds: float) -> Callable[[], int | None]:
    """A function that returns the last step once it has been that for some seconds: the file's last page fills up first."""
    seen = [0, time.monotonic()]

    def look() -> int | None:
        if last_step(run) != seen[0]:
            seen[:] = last_step(run), time.monotonic()
        return int(seen[0]) if time.monotonic() - seen[1] > seconds else None

    return look


def storage_full(chaos: Chaos) -> Outcome:
    chaos.nodes.ensure(2)
    with small_disk(chaos.folder / "disk_full", 32) as disk:
        run = disk / "run"
        job = chaos.start(run)
        chaos.until(run, EVERY + 5, job)
        wait_for(lambda: list(run.glob(f"checkpoints/step-{EVERY:08d}-*/meta.json")), job)
        with recovery(run) as recovered:
            ballast = _fill(disk)
        output = _finish(job, expect=1)
        assert "StorageError" in output and "No space left" in output and "Traceback" not in output, output
        ballast.unlink()
        again = chaos.start(run)
        seconds = recovered(again)
        assert f"resuming at step {EVERY}" in _finish(again)
        return chaos.outcome(
            "storage full", run, seconds, "StorageError after a minute of trying, same command once there was space"
        )


def loss_not_finite(chaos: Chaos) -> Outcome:
    run = chaos.folder / "loss_not_finite"
    chaos.nodes.ensure(2)
    output = _finish(chaos.start(run, "--train.lr", "1e30", "--train.clip_norm", "0"), expect=1)
    offenders = json.loads((run / "nonfinite.json").read_text())
    passed = "NonFiniteLossError" in output and len(offenders["image_ids"]) == 8 and not list(run.glob("checkpoints/step-*"))
    return Outcome("loss not finite", None, 0, 0, passed, "stopped by name, nothing overwritten, the step's images named")


def _with_broken_images(chaos: Chaos, run: Path, allowed: float) -> Job:
    broken = run.parent / f"{run.name}-set"
    shutil.copytree(chaos.tiny_set, broken)
    for image in (4, 9):
        damage_image(broken, image)
    chaos.nodes.ensure(2)
    return chaos.start(run, "--data.root", str(broken), "--data.max_bad_fraction", str(allowed))


def broken_images_tolerated(chaos: Chaos) -> Outcome:
    run = chaos.folder / "broken_images_tolerated"
    _finish(_with_broken_images(chaos, run, 0.2))
    audit = audit_run(str(run))
    passed = audit.sound and audit.steps == STEPS and audit.replaced > 0
    remark = f"{audit.replaced} samples replaced by others of their objects"
    return Outcome("2 broken images, tolerated", None, audit.lost, audit.repeated, passed, remark)


def broken_images_too_many(chaos: Chaos) -> Outcome:
    run = chaos.folder / "broken_images_too_many"
    output = _finish(_with_broken_images(chaos, run, 0.001), expect=1)
    passed = "TooManyBadSamplesError" in output and "train-00000" in output
    return Outcome("2 broken images, none tolerated", None, 0, 0, passed, "stopped by name")


SCENARIOS: list[Callable[[Chaos], Outcome]] = [
    worker_killed, driver_terminated, driver_killed, killed_while_saving, storage_full_for_a_while, storage_full,
    loss_not_finite, broken_images_tolerated, broken_images_too_many,
    # those that kill nodes come last: each may cost the start of new ones
    node_killed_with_spare, node_killed_elastic, node_added, node_drained,
]  # fmt: skip


@contextlib.contextmanager
def chaos_on(tiny_set: Path, folder: Path) -> Iterator[Chaos]:
    """A cluster and the undisturbed run; everything of it is gone afterwards but the folder."""
    with Nodes(2) as nodes:
        yield Chaos(nodes, tiny_set, folder)


def run_all(tiny_set: Path, report: Callable[[Outcome], None]) -> list[Outcome]:
    """Every scenario once; one that raises is an outcome that did not pass."""
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="mmref-chaos-") as folder, chaos_on(tiny_set, Path(folder)) as chaos:
        for scenario in SCENARIOS:
            try:
                outcome = scenario(chaos)
            except Exception as error:  # the others are still worth knowing
                outcome = Outcome(scenario.__name__, None, 0, 0, False, f"{type(error).__name__}: {error}")
            report(outcome)
            outcomes.append(outcome)
    return outcomes
