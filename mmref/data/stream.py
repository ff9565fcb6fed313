"""Ray Data executes the plan: rows of tasks -> an actor pool that reads, decodes and tokenises -> whole steps, in order.

Every worker runs a dataset of its own over its slice of the plan. So a worker needs no agreement with the others to
know its samples, a restart on another number of workers starts at the right step, and what arrives is checked.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from mmref.cluster.ray_private import ExecutionCallback, RangeDatasource
from mmref.cluster.reservations import take_reader_place
from mmref.config import Config
from mmref.data.reader import Batch, TaskReader
from mmref.errors import ShardSetError

SCHEDULING_PAUSE_S = 0.02


class Breathe(ExecutionCallback):
    """Makes Ray Data's scheduling loop wait between its rounds.

    The loop waits for finished tasks; when the reader is ahead and its finished blocks are held back, there is always
    one, and the loop spins: on a small machine it takes half of the cores from the training beside it.
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(SCHEDULING_PAUSE_S)


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
    return context


def build_dataset(config: Config, rank: int, world: int, start: int) -> Any:
    """The ray.data.Dataset of one rank's samples from step `start` to the end of training, in order."""
    import ray.data

    context = quiet_ray_data()
    context.execution_options.preserve_order = True
    steps = config.train.max_steps - start
    tasks = -(-steps // config.data.steps_per_task)
    # This stands for ray.data.range, whose tasks would wait for ever for a CPU where workers and readers have them all.
    numbers = RangeDatasource(n=tasks, block_format="arrow", column_name="id")
    return ray.data.read_datasource(numbers, num_cpus=0, concurrency=2, override_num_blocks=tasks).map_batches(
        TaskReader,
        batch_size=1,
        fn_constructor_args=(config, rank, world, start),
        compute=ray.data.ActorPoolStrategy(size=config.data.readers),
        num_cpus=1,
        max_restarts=-1,
        max_task_retries=-1,
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
