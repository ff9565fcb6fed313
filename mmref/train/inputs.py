"""What a step takes, made ready on its device: copies, augmentation, masked words, and which references it contrasts.

All that can be known before the step is worked out here, in host memory. So the step itself reads nothing back from the
device. On a GPU copies come from pinned memory and run, as the augmentation does, on a stream of their own, beside the step
before (mmref/train/ahead.py). On a CPU the same is done without a stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmref.config import Config
from mmref.data.augment import augment, augmentation_draws
from mmref.data.reader import Batch
from mmref.data.tokens import Tokens
from mmref.model.text_groups import TextGroup, group_texts
from mmref.model.word_decoder import mask_words, places_of
from mmref.randomness import RandomStream, uniform_tensor
from mmref.train import collectives
from mmref.train.bank import ReferenceBank, Rows
from mmref.train.division import Division


class MaskedWords(NamedTuple):
    """Masked words of a micro-batch's captions (b, L)."""

    ids: Tensor  # (b, L) with the masks
    at: Tensor  # (M,) places of the masked words in the flattened captions, ascending
    words: Tensor  # (M,) what stood there


@dataclass
class MicroBatch:
    """A slice of this rank's samples on its device."""

    pixels: Tensor  # (b, 3, H, W)
    ids: Tensor  # (b, L)
    mask: Tensor  # (b, L)
    masked: MaskedWords | None
    objects: Tensor  # (b,) object rows
    targets: Tensor | None  # (b,) of these among the references that are contrasted; None for a run without references
    groups: list[TextGroup]  # of its captions


class Contrast(NamedTuple):
    """References of a step, and where the objects of this rank's samples are among them."""

    rows: Rows
    targets: Tensor  # (n,)


class PairRows(NamedTuple):
    """The pairs of the global batch by their numbers in `Division`."""

    everyone: Tensor  # (N,)
    once: Tensor  # (u,) each once
    last: Tensor  # (u,) where each stands in the batch for the last time


@dataclass
class StepInputs:
    """What a step takes of its batch."""

    micro: list[MicroBatch]
    objects: Tensor  # (n,) object rows of this rank's samples
    all_objects: Tensor  # (N,) of the global batch
    contrasted: Contrast | None  # None for a run without references
    followed: Contrast | None  # of the batch's objects alone; None where no reference follows its object
    words: int  # masked in the global batch, at least 1
    pairs: PairRows | None = None  # where pairs are divided
    copied: torch.cuda.Event | None = None  # after the last operation that made these tensors

    def take(self) -> StepInputs:
        """Before the step uses them: the device's work waits for what is under way on the other stream, the host does not."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.objects.device)
            stream.wait_event(self.copied)
            for tensor in _tensors(self):
                if tensor.is_cuda:
                    tensor.record_stream(stream)  # its memory is not given away before the step is done with it
        return self


def _tensors(found: Any) -> Iterator[Tensor]:
    """All tensors in dataclasses, tuples and lists."""
    if isinstance(found, Tensor):
        yield found
    elif dataclasses.is_dataclass(found):
        for field in dataclasses.fields(found):
            yield from _tensors(getattr(found, field.name))
    elif isinstance(found, (list, tuple)):
        for part in found:
            yield from _tensors(part)


def host_memory(size: int, device: torch.device) -> Tensor:
    """Bytes (size,) that copies to the device start from: pinned where it is a GPU, which then reads them by itself."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")


class Staging:
    """Copies arrays to a device by way of host memory that is used again every second step.

    The copies of one step may be under way while the next is laid out.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._halves: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        self._copied: list[torch.cuda.Event | None] = [None, None]
        self._half = 0

    def begin(self) -> None:
        """Before the first array of a step: waits until the copies of the step before the last are done."""
        self._half = 1 - self._half
        if (event := self._copied[self._half]) is not None:
            event.synchronize()

    def __call__(self, name: str, array: NDArray[Any] | Tensor) -> Tensor:
        """A copy on the device. `name` tells the arrays of a step from each other."""
        source = array.numpy() if isinstance(array, Tensor) else array
        buffers = self._halves[self._half]
        if name not in buffers or len(buffers[name]) < source.nbytes:
            buffers[name] = host_memory(source.nbytes, self.device)
        there = buffers[name][: source.nbytes]
        np.copyto(there.numpy().view(source.dtype).reshape(source.shape), source)
        kind = torch.from_numpy(np.empty(0, source.dtype)).dtype
        return there.view(kind).view(source.shape).to(self.device, non_blocking=True, copy=True)

    def end(self) -> torch.cuda.Event | None:
        """After the last array of a step: an event on the current stream, None on a CPU."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        self._copied[self._half] = event
        return event


class Preparation:
    """Makes batches ready for `StepRunner.run`, in the order of their steps (collective)."""

    def __init__(
        self, config: Config, bank: ReferenceBank, tokens: Tokens, device: torch.device, division: Division | None = None
    ) -> None:
        """Collective where there are several ranks."""
        self.config, self.bank, self.tokens, self.device, self.division = config, bank, tokens, device, division
        self.special_ids = torch.as_tensor(tokens.special_ids)
        self.ranks = collectives.HostGroup()
        self.stage = Staging(device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, step: int, batch: Batch) -> StepInputs:
        """Inputs of a step. It returns before the device has them: `StepInputs.take` is to be called before they are used."""
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            self.stage.begin()
            made = self._make(step, batch)
            made.copied = self.stage.end()
        return made

    def _make(self, step: int, batch: Batch) -> StepInputs:
        config, stage = self.config, self.stage
        ids, mask = (torch.from_numpy(batch[name].astype(np.int64)) for name in ("ids", "mask"))  # (n, L)
        masked = self._mask(step, ids, batch["position"]) if config.loss.masks_words else None
        # A broken image may bring another object than the plan's, and its rank alone knows.
        known = [np.array([0 if masked is None else int(masked[1].sum())]), batch["object"]]
        if self.division is not None:
            known.append(self.division.pairs(batch["image_index"], batch["caption_number"]))
        of_ranks = self.ranks.gather(np.concatenate(known))  # (world, 1 + n), or (world, 1 + 2n) with pairs
        n = len(ids)
        words, everyone = int(of_ranks[:, 0].sum()), of_ranks[:, 1 : 1 + n].reshape(-1)
        pairs = None if self.division is None else self._pairs(of_ranks[:, 1 + n :].reshape(-1))
        contrasted = followed = None
        if config.loss.uses_references:
            contrasted = self._contrast("contrasted", self.bank.select(everyone, step), batch["object"])
            if config.reference.update == "moving_average" or config.reference.init == "mean":
                followed = self._contrast("followed", self.bank.rows_of(everyone), batch["object"])
        objects = stage("objects", batch["object"])
        draws = stage("draws", augmentation_draws(config.train.seed, step, batch["position"]))
        pixels = augment(stage("images", batch["image"]), draws, config.data)
        ids_there, mask_there = stage("ids", ids), stage("mask", mask)
        size = n // config.train.accumulation
        micro = [
            MicroBatch(
                pixels[s],
                ids_there[s],
                mask_there[s],
                None if masked is None else self._masked_words(i, ids[s], masked[0][s], masked[1][s]),
                objects[s],
                None if contrasted is None else contrasted.targets[s],
                group_texts(batch["mask"][s], self.device),
            )
            for i, s in enumerate(slice(i * size, (i + 1) * size) for i in range(config.train.accumulation))
        ]
        return StepInputs(micro, objects, stage("all objects", everyone), contrasted, followed, max(1, words), pairs)

    def _pairs(self, everyone: NDArray[np.int64]) -> PairRows:
        """Of the pairs (N,) of the global batch. One that is there twice keeps its last loss, however a device writes."""
        once, from_end = np.unique(everyone[::-1], return_index=True)
        last = len(everyone) - 1 - from_end
        return PairRows(self.stage("pairs", everyone), self.stage("pairs once", once), self.stage("pairs last", last))

    def _contrast(self, name: str, rows: Rows, objects: NDArray[np.int64]) -> Contrast:
        own = rows.own
        if isinstance(own, Tensor) and self.bank.home == self.device:
            own = self.stage(f"{name} rows", own)
        return Contrast(rows._replace(own=own), self.stage(f"{name} targets", rows.targets(objects)))

    def _mask(self, step: int, ids: Tensor, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Masks of this rank's captions (n, L). A caption's depend on the step and its place in the batch."""
        tokens, loss = np.arange(ids.shape[1])[:, None], self.config.loss
        draws = uniform_tensor(
            RandomStream.WORD_MASKS, self.config.train.seed, step, positions[:, None, None], tokens, np.arange(3)
        )  # (n, L, 3)
        special = torch.isin(ids, self.special_ids)
        return mask_words(ids, special, loss.mask_rate, self.tokens.mask_id, self.tokens.vocab_size, draws)

    def _masked_words(self, number: int, ids: Tensor, masked: Tensor, chosen: Tensor) -> MaskedWords:
        """Of micro-batch `number`, on the device: ids, masked ids and chosen places (b, L) of its captions."""
        at = places_of(chosen)
        parts = {"masked": masked, "at": at, "words": ids.flatten()[at]}
        return MaskedWords(*(self.stage(f"{name} {number}", part) for name, part in parts.items()))
