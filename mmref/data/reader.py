"""Reads what the plan asks for: byte ranges -> pixels and tokens, broken samples replaced by a seeded rule.

A broken sample's place is taken by another image of its object, and where the object has none that can be read, by an image
of another object. Who takes it is a function of the plan and of what is broken, so it is the same on any number of workers
and after a resume; a batch says whose samples it really holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmref.config import Config
from mmref.data.captions import CaptionNoise, usable_captions
from mmref.data.decode import calm_opencv
from mmref.data.fit import Fit
from mmref.data.plan import Step, build_plan
from mmref.data.sample_reader import RawSample, sound
from mmref.data.shard_set import open_reader, train_index
from mmref.data.tokens import load_tokens
from mmref.errors import SampleError
from mmref.storage.secrets import told

Batch = dict[str, NDArray[Any]]
Sample = tuple[
    int, NDArray[np.uint8], int, str, str
]  # image of the index, pixels, number of the caption, caption, what was broken
SHOWN = 5  # broken images in an error message


class StepReader:
    """Samples of global steps, for the slice of the global batch that belongs to one rank.

    The same class runs inside Ray Data's actors and, in tests, in process.
    """

    def __init__(self, config: Config, rank: int = 0, world: int = 1) -> None:
        self.config, self.index = config, train_index(config)
        self.samples = open_reader(config, self.index)
        self.plan = build_plan(config, self.index)
        self.tokens, self.fit = load_tokens(config), Fit.of(config.data)
        self.noise = CaptionNoise(config.data, config.train.seed, self.index, self.samples)
        per_rank = config.train.global_batch // world
        self.positions = range(rank * per_rank, (rank + 1) * per_rank)

    def read_step(self, step: int) -> Batch:
        """One step of this rank: step, position, object, image_index, caption_number (n,), image (n, H, W, 3) uint8, ids and mask
        (n, L), bad (n,) the description of a broken sample that was replaced, or ""."""
        planned = self.plan(step)
        images, captions, numbers, used, bad = [], [], [], [], []
        first = self.samples.read_all(planned.images[self.positions.start : self.positions.stop].tolist())
        for position, raw in zip(self.positions, first):
            index, pixels, number, caption, problem = self._read(planned, step, position, raw)
            images.append(pixels)
            captions.append(caption)
            numbers.append(number)
            used.append(index)
            bad.append(problem)
        ids, mask = self.tokens(captions)
        n = len(images)
        return {
            "step": np.full(n, step, dtype=np.int64),
            "position": np.arange(self.positions.start, self.positions.stop, dtype=np.int64),
            "object": self.index.object_row[used].astype(np.int64),
            "image_index": np.array(used, dtype=np.int64),
            "caption_number": np.array(numbers, dtype=np.int64),
            "image": np.stack(images),
            "ids": ids,
            "mask": mask,
            "bad": np.array(bad, dtype=object),
        }

    def _read(self, planned: Step, step: int, position: int, raw: RawSample | SampleError) -> Sample:
        """A sample of a step, of what was read of the planned image; of another image where that one is broken."""
        problems: list[str] = []
        index, attempt = int(planned.images[position]), 0
        while True:
            try:
                found = self.read_image(index) if attempt else self._decoded(index, sound(raw))
                return self._sample(planned, position, index, *found, problems)
            except SampleError as error:
                problems.append(str(error))
                other = self.plan.substitute(step, position, attempt)
                attempt += 1
                if other is None:
                    return self._stand_in(planned, step, position, problems)
                index = other

    def _stand_in(self, planned: Step, step: int, position: int, problems: list[str]) -> Sample:
        """An image of another object, for an object that has none: `problems` says what is wrong with each.

        The positions of the object get different images of the one that stands in, as far as it has so many.
        """
        slot, nth = divmod(position, self.plan.images_per_object)
        tried = 0
        for images in self.plan.stand_ins(step, slot):
            tried += 1
            readable = []
            for index in images.tolist():
                try:
                    readable.append((index, *self.read_image(index)))
                except SampleError as error:
                    problems.append(str(error))
                if len(readable) > nth:
                    break
            if readable:
                return self._sample(planned, position, *readable[nth % len(readable)], problems)
        raise SampleError(
            f"object {self.index.object_ids[int(planned.objects[position])]} has no usable image left, and none of the {tried} "
            f"objects tried in its place has one: {'; '.join(problems[:SHOWN])}{'; ...' if len(problems) > SHOWN else ''} "
            "Run `mmref shards verify` on the set."
        )

    def _sample(
        self,
        planned: Step,
        position: int,
        index: int,
        pixels: NDArray[np.uint8],
        captions: list[str],
        problems: list[str],
    ) -> Sample:
        number = int(planned.captions[position]) % len(captions)
        return index, pixels, number, self.noise(captions[number], index, number), "\n".join(problems)

    def read_image(self, index: int) -> tuple[NDArray[np.uint8], list[str]]:
        """Pixels and usable captions of one image of the index. Raises SampleError."""
        return self._decoded(index, self.samples.read(index))

    def _decoded(self, index: int, raw: RawSample) -> tuple[NDArray[np.uint8], list[str]]:
        name = f"{told(self.index.shard_paths[int(self.index.shard[index])])}:{raw.meta.get('image_id', index)}"
        captions = [c for c, _ in usable_captions(raw.meta, name)]
        return self.fit.decode(raw.image_bytes, name), captions


class TaskReader:
    """Ray Data's side of StepReader: a row is a task, a task is `steps_per_task` consecutive steps of one rank."""

    def __init__(self, config: Config, rank: int, world: int, start: int) -> None:
        calm_opencv()
        self.reader, self.config, self.start = StepReader(config, rank, world), config, start

    def __call__(self, rows: dict[str, NDArray[np.int64]]) -> Batch:
        steps: list[int] = []
        for task in rows["id"]:
            first = self.start + int(task) * self.config.data.steps_per_task
            steps += range(first, min(first + self.config.data.steps_per_task, self.config.train.max_steps))
        return concatenate([self.reader.read_step(s) for s in steps])


def concatenate(batches: Sequence[Batch]) -> Batch:
    """Batches end to end."""
    return {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
