"""Ray Data executes the plan: rows of tasks -> an actor pool that reads, decodes and tokenises -> whole steps, in order.

Every worker runs a dataset of its own over its slice of the plan. So a worker needs no agreement with the others to
know its samples, a restart on another number of workers starts at the right step, and what arrives is checked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmref.cluster.ray_private import (
    ENABLED_BACKPRESSURE_POLICIES,
    ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    BackpressurePolicy,
    ExecutionCallback,
    preferably_here,
)
from mmref.cluster.reservations import take_reader_place
from mmref.config import Config
from mmref.data.reader import Batch, TaskReader
from mmref.errors import ShardSetError

SCHEDULING_PAUSE_S = 0.02
PIECE = 256  # tasks that Ray Data is handed as one object: at 240,000 steps of four a task that makes 235 objects, not 60,000
AHEAD = 16  # tasks that wait for a reader: more of them would only cost memory


class Breathe(ExecutionCallback):
    """Makes Ray Data's scheduling loop wait between its rounds.

    The loop waits for finished tasks; when the reader is ahead and its finished blocks are held back, there is always
    one, and the loop spins: on a small machine it takes half of the cores from the training beside it.
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(SCHEDULING_PAUSE_S)


class StayClose(BackpressurePolicy):
    """Keeps the source of tasks a little ahead of the readers, where Ray Data would run through all of them.

    It counts bytes, and a task is a number.
    """

    def can_add_input(self, op: Any) -> bool:
        return not self._far_ahead(op)

    def max_task_output_bytes_to_read(self, op: Any) -> int | None:
        return 0 if self._far_ahead(op) else None

    def _far_ahead(self, op: Any) -> bool:
        return sum(self._topology[after].total_enqueued_input_blocks() for after in op.output_dependencies) >= AHEAD


def quiet_ray_data() -> Any:
    """Ray Data's context without its bars and notices, which would flood the log of a run; errors stay."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # Ray Data's own around it would hide a named error
    if Breathe not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Breathe)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*ENABLED_BACKPRESSURE_POLICIES, StayClose])
    return context


def tasks_source(tasks: int) -> Any:
    """The ray.data.Datasource of the numbers 0 .. tasks - 1, which lists them PIECE at a time as they are asked for."""
    import pyarrow as pa
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Tasks(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return 8 * tasks

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            """As many whatever `parallelism` is, by which Ray Data then cuts what each gives."""
            pieces = [np.arange(first, min(first + PIECE, tasks)) for first in range(0, tasks, PIECE)]
            return [task(ids) for ids in pieces]

    def task(ids: NDArray[np.int64]) -> ReadTask:
        found = BlockMetadata(num_rows=len(ids), size_bytes=ids.nbytes, input_files=None, exec_stats=None)
        return ReadTask(lambda: [pa.table({"id": ids})], found)

    return Tasks()


def build_dataset(config: Config, rank: int, world: int, start: int) -> Any:
    """The ray.data.Dataset of one rank's samples from step `start` to the end of training, in order."""
    import ray.data

    context = quiet_ray_data()
    context.execution_options.preserve_order = True
    steps = config.train.max_steps - start
    tasks = -(-steps // config.data.steps_per_task)
    blocks = -(-tasks // PIECE) * PIECE  # PIECE of each piece: so each task is a block of its own, and any free reader takes it
    # Without a CPU: where workers and readers have them all, what needed one more would wait for ever.
    source = ray.data.read_datasource(tasks_source(tasks), num_cpus=0, concurrency=1, override_num_blocks=blocks)
    # Each rank reads the same part of a window's shards at every step: on the node of its rank they are fetched once.
    place = {"scheduling_strategy": preferably_here()} if config.data.window_shards and config.data.cache_gb else {}
    return source.map_batches(
        TaskReader,
        batch_size=1,
        fn_constructor_args=(config, rank, world, start),
        compute=ray.data.ActorPoolStrategy(size=config.data.readers),
        num_cpus=1,
        max_restarts=-1,
        max_task_retries=-1,
        **place,
    )


class Stream:
    """Steps of one rank, in order, with the time spent waiting for them."""

    def __init__(self, config: Config, rank: int, world: int, start: int) -> None:
        self.waited_s = 0.0
        self._next_step = start
        self._rows = config.train.global_batch // world
        dataset = build_dataset(config, rank, world, start)
        execution = dataset.get_dataset_id().rsplit("_", 1)[0] + "_0"  # as its first execution will be called
        take_reader_place(config.run_dir, rank, world, f"data-{execution}")
        self._batches = iter(
            dataset.iter_batches(batch_size=self._rows, batch_format="numpy", prefetch_batches=2, drop_last=False)
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch = next(self._batches)
        self.waited_s += time.perf_counter() - began
        steps, expected = batch["step"], self._next_step
        if len(steps) != self._rows or not (steps == expected).all():
            raise ShardSetError(
                f"the stream delivered {len(steps)} samples of steps {sorted(set(steps.tolist()))} where "
                f"{self._rows} of step {expected} were due: Ray Data did not keep its order."
            )
        self._next_step += 1
        return batch
