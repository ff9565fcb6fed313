"""Memory of a worker: its peak, and what is left of a run that ran out of it."""

from __future__ import annotations

import contextlib
import os
import tempfile

import torch

from mmref.config import Config, check_batch
from mmref.data.shard_set import train_index
from mmref.errors import BatchArithmeticError, DeviceMemoryError, StorageError
from mmref.run.directory import RunDir

FOLDER = "out_of_memory"  # of a run
GB = 1e9


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory so far: allocated on a GPU, of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def memory_snapshot() -> bytes:
    """The allocator's blocks as https://pytorch.org/memory_viz reads them, with who asked for them where that was recorded."""
    handle, path = tempfile.mkstemp(prefix="mmref-memory-")
    os.close(handle)
    try:
        torch.cuda.memory._dump_snapshot(path)
        with open(path, "rb") as file:
            return file.read()
    finally:
        os.unlink(path)


def out_of_memory(error: torch.OutOfMemoryError, config: Config, run: RunDir, rank: int) -> DeviceMemoryError:
    """The named error for a worker whose GPU has no memory left; what lay there goes to `out_of_memory/` of the run.

    Nothing is recorded beforehand, which would cost every step: the snapshot has the blocks and their sizes. With
    `train.profile` it also says which lines of code asked for them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # Ray shows a worker its own GPU alone
    where = "its device"
    with contextlib.suppress(StorageError):  # the error below says more
        run.write_text(f"{FOLDER}/rank-{rank}.txt", f"{error}\n")
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory / GB
            where = f"its {torch.cuda.get_device_name(device)} of {total:.1f} GB"
            run.write_text(f"{FOLDER}/rank-{rank}.txt", f"{error}\n\n{torch.cuda.memory_summary(device)}\n")
            run.write_bytes(f"{FOLDER}/rank-{rank}.pickle", memory_snapshot())
    t = config.train
    objects = train_index(config).n_objects
    return DeviceMemoryError(
        f"worker {rank} of {t.workers} has no memory left on {where}: its peak was {peak_memory_gb(device):.1f} GB, with "
        f"{t.global_batch // t.workers} pairs a worker in micro-batches of {config.micro_batch}, in {t.precision}. "
        f"{_remedies(config)} In an evaluation it is `eval.batch` that helps. What a run needs is said beforehand by "
        f"`mmref sizing --objects {objects} --workers {t.workers}` with its flags. What lay in memory is in "
        f"{run.join(FOLDER)}; the last checkpoint is untouched."
    )


def _remedies(config: Config) -> str:
    """What to change, in the order of what it costs."""
    t = config.train
    ways = []
    if more := _more_accumulation(config):
        size = t.global_batch // (t.workers * more)
        ways.append(f"`--train.accumulation {more}` (the same results in micro-batches of {size})")
    if not t.gradient_checkpointing:
        ways.append("`--train.gradient_checkpointing true` (the same results, more time)")
    if t.precision == "fp32":
        ways.append("`--train.precision bf16` (another run)")
    ways.append(f"a smaller `train.global_batch` than {t.global_batch} (another run)")
    return f"Resume with {', or '.join(ways)}."


def _more_accumulation(config: Config) -> int | None:
    """The next larger `train.accumulation` that divides the batch, None where there is none."""
    t = config.train
    for more in range(t.accumulation + 1, t.global_batch // t.workers + 1):
        with contextlib.suppress(BatchArithmeticError):
            check_batch(t.global_batch, t.workers, more, t.images_per_object)
            return more
    return None
