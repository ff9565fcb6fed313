"""One training step: features, losses, gradients, references. Gives the same result however the batch is cut.

`StepRunner` calls a model (engine or plain module) and a backward function, so that the arithmetic is the same inside
DeepSpeed and in a plain process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmref.config import Config
from mmref.data.augment import augment
from mmref.data.reader import Batch
from mmref.data.tokens import Tokens
from mmref.losses.agreement import agreement, agreement_weights
from mmref.losses.objective import TOTAL, References, Share, loss_weights, objective, pack, ramp
from mmref.model.mmref import Masked, Output
from mmref.model.text_groups import TextGroup, group_texts
from mmref.model.word_decoder import mask_words
from mmref.randomness import RandomStream, torch_seed, uniform_tensor
from mmref.train import collectives
from mmref.train.bank import ReferenceBank


@dataclass
class MicroBatch:
    """A slice of this rank's samples on its device."""

    pixels: Tensor  # (b, 3, H, W)
    ids: Tensor  # (b, L)
    mask: Tensor  # (b, L)
    masked: tuple[Tensor, Tensor] | None  # masked ids and positions, (b, L) each
    objects: Tensor  # (b,) object rows
    groups: list[TextGroup]  # of its captions


class Common(NamedTuple):
    """What all micro-batches of a step have in common."""

    all_objects: Tensor  # (N,) object rows of the global batch
    active: Tensor | None  # (A,) sorted object rows whose references are contrasted; None for a run without references
    rows: Tensor | None  # (A, K, d) their references
    ramped: float  # of guidance and caption weights
    words: Tensor  # () masked words in the global batch


class StepRunner:
    """Runs steps. `model` gives an `Output`, `backward(loss)` adds to the gradients; `boundary()` follows each backward."""

    def __init__(
        self,
        config: Config,
        model: Callable[..., Output],
        backward: Callable[[Tensor], Any],
        boundary: Callable[[], Any],
        bank: ReferenceBank,
        tokens: Tokens,
        device: torch.device,
    ) -> None:
        self.config, self.model, self.backward, self.boundary = config, model, backward, boundary
        self.bank, self.tokens, self.device = bank, tokens, device
        self.special_ids = torch.as_tensor(tokens.special_ids, device=device)
        self.logits: list[Tensor] = []  # of the last step: the alignment's inverse temperature, and its bias where it has one
        self.reference_norm = torch.zeros((), device=device)  # of the references' gradient in the last step
        self.with_masks = config.loss.masks_words

    def run(self, step: int, batch: Batch) -> Tensor:
        """Forward and backward of one step and the references' update: this rank's losses, as `objective.pack` lays them out."""
        config = self.config
        micro = self._micro_batches(step, batch, self.with_masks)
        objects = torch.cat([m.objects for m in micro])
        common = self._common(step, objects, micro)
        self._seed_dropout(step)
        run = self._plain if len(micro) == 1 else self._cached
        losses, image, text = run(micro, common)
        if common.rows is not None and common.rows.requires_grad:
            assert common.active is not None
            lr = config.reference.lr * self._lr_share(step)
            self.reference_norm = self.bank.apply_gradient(common.active, common.rows.grad, lr)
            if config.reference.init == "mean":
                self.bank.follow(image, text, objects, common.all_objects, momentum=1.0)
        elif config.loss.uses_references:
            self.bank.follow(image, text, objects, common.all_objects)
        return pack(losses)

    def _lr_share(self, step: int) -> float:
        """References anneal with the encoders."""
        from mmref.train.engine import learning_rate

        return learning_rate(step, self.config.train) / self.config.train.lr

    # -- the two ways to a gradient ------------------------------------------------------------------------------

    def _plain(self, micro: list[MicroBatch], common: Common) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Losses by name, and the features (n, d) of both modalities."""
        (m,) = micro
        out = self._forward(m, common)
        image, text = _features(out)
        losses = self._objective(image, text, out, m.objects, common) | self._head_losses(out, common.words)
        total = self._weighted(losses, common.ramped)
        self.backward(total)
        self.boundary()
        self.logits = [x.detach() for x in _logits(out)]
        return {TOTAL: total, **losses}, image.detach(), text.detach()

    def _cached(self, micro: list[MicroBatch], common: Common) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """As `_plain`, by gradient caching (Gao et al. 2021): the losses see the features of the whole batch, the towers one
        micro-batch.

        Pass 1 computes all features without a graph, the losses give the gradient at the features, pass 2 repeats each
        micro-batch with a graph and feeds it its rows of that gradient.
        """
        states, images, texts = [], [], []
        with torch.no_grad():
            for m in micro:
                states.append(_random_state(self.device))
                out = self.model(m.pixels, m.ids, m.mask, groups=m.groups)
                image, text = _features(out)
                images.append(image)
                texts.append(text)
        image, text = torch.cat(images).requires_grad_(), torch.cat(texts).requires_grad_()
        self.logits = [x.detach() for x in _logits(out)]
        logits = [x.clone().requires_grad_() for x in self.logits]
        objects = torch.cat([m.objects for m in micro])
        losses = self._objective(image, text, out._replace(**dict(zip(("scale", "bias"), logits))), objects, common)
        total = self._weighted(losses, common.ramped)
        total.backward()  # down to the features (and the references); the towers follow below
        total = total.detach()
        assert image.grad is not None and text.grad is not None
        first = 0
        for state, m in zip(states, micro):
            _set_random_state(self.device, state)
            out = self._forward(m, common)
            own_image, own_text = _features(out)
            own = slice(first, first + len(m.objects))
            first += len(m.objects)
            surrogate = (own_image * image.grad[own]).sum() + (own_text * text.grad[own]).sum()
            for number, leaf in zip(_logits(out), logits):
                assert leaf.grad is not None
                surrogate = surrogate + (number * leaf.grad).sum() / len(micro)
            heads = self._head_losses(out, common.words)
            if heads:
                of_heads = self._weighted(heads, common.ramped)
                surrogate, total = surrogate + of_heads, total + of_heads.detach()
            for name, part in heads.items():
                losses[name] = losses.get(name, 0.0) + part.detach()
            self.backward(surrogate)
            self.boundary()
        return {TOTAL: total, **losses}, image.detach(), text.detach()

    def _forward(self, m: MicroBatch, common: Common) -> Output:
        return self.model(m.pixels, m.ids, m.mask, self._masked(m, common), m.objects, m.groups)

    # -- losses --------------------------------------------------------------------------------------------------

    def _objective(self, image: Tensor, text: Tensor, out: Output, objects: Tensor, common: Common) -> dict[str, Tensor]:
        """Losses of this rank's rows (n) against the global batch (N); of `out` the scale and bias of the logits."""
        config, references = self.config, None
        if common.active is not None and common.rows is not None:
            references = References(common.rows, torch.searchsorted(common.active, objects))
        all_weights = self._caption_weights(text, references, common.ramped)
        first = collectives.rank() * len(text)
        share = Share(
            image,
            text,
            objects,
            collectives.gather_with_gradient(image),
            collectives.gather_with_gradient(text),
            common.all_objects,
            out.scale,
            None if all_weights is None else all_weights[first : first + len(text)],
            all_weights,
            out.bias,
        )
        return objective(share, references, config.loss, config.reference, common.ramped)

    def _weighted(self, losses: dict[str, Tensor], ramped: float) -> Tensor:
        weights = loss_weights(self.config.loss, ramped)
        return torch.stack([weights[name] * part for name, part in losses.items()]).sum()

    def _caption_weights(self, text: Tensor, references: References | None, ramped: float) -> Tensor | None:
        """(N,) weights of the global batch's captions, 1 on average; None where all weigh alike."""
        sharpness = self.config.loss.caption_weight * ramped
        if sharpness == 0 or references is None:
            return None
        own = agreement(text, references.rows, references.targets, self.config.reference.score)
        return agreement_weights(collectives.gather(own), sharpness)

    def _head_losses(self, out: Output, words: Tensor) -> dict[str, Tensor]:
        """The heads' losses, which come as sums over a micro-batch: `words` masked in the global batch.

        The mean over ranks is taken by the engine: the sum over this rank's share is scaled up by the world size.
        """
        world = collectives.world_size()
        sums: dict[str, tuple[Tensor | None, Tensor | int]] = {
            "loss_rec": (out.rec_sum, words),
            "loss_mlm": (out.mlm_sum, words),
            "loss_id": (out.id_sum, 2 * self.config.train.global_batch),
        }
        return {name: part * (world / count) for name, (part, count) in sums.items() if part is not None}

    # -- inputs --------------------------------------------------------------------------------------------------

    def _micro_batches(self, step: int, batch: Batch, with_masks: bool) -> list[MicroBatch]:
        c, n = self.config, len(batch["step"])
        images = torch.from_numpy(_writable(batch["image"])).to(self.device)
        pixels = augment(images, c.data, c.train.seed, step, batch["position"])
        ids = torch.from_numpy(_writable(batch["ids"])).to(self.device).long()
        mask = torch.from_numpy(_writable(batch["mask"])).to(self.device).long()
        objects = torch.from_numpy(_writable(batch["object"])).to(self.device)
        masked = self._mask(step, ids, batch["position"]) if with_masks else None
        size = n // c.train.accumulation
        return [
            MicroBatch(
                pixels[s],
                ids[s],
                mask[s],
                None if masked is None else (masked[0][s], masked[1][s]),
                objects[s],
                group_texts(batch["mask"][s], self.device),
            )
            for s in (slice(i * size, (i + 1) * size) for i in range(c.train.accumulation))
        ]

    def _mask(self, step: int, ids: Tensor, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Masks of this rank's captions (n, L). A caption's depend on the step and its place in the batch."""
        tokens, loss = np.arange(ids.shape[1])[:, None], self.config.loss
        draws = uniform_tensor(
            RandomStream.WORD_MASKS, self.config.train.seed, step, positions[:, None, None], tokens, np.arange(3)
        )  # (n, L, 3)
        special = torch.isin(ids, self.special_ids)
        return mask_words(ids, special, loss.mask_rate, self.tokens.mask_id, self.tokens.vocab_size, draws.to(ids.device))

    def _common(self, step: int, objects: Tensor, micro: list[MicroBatch]) -> Common:
        c = self.config
        ramped = ramp(step, c.train.max_steps, c.loss.guide_from, c.loss.guide_full)
        all_objects = collectives.gather(objects)
        active = rows = None
        if c.loss.uses_references:
            active = self.bank.select(all_objects, step)
            rows = self.bank.fetch(active)
            if c.reference.init == "mean" and step < c.loss.guide_from * c.train.max_steps:
                rows = rows.detach()  # they follow first
        return Common(all_objects, active, rows, ramped, self._masked_words(micro))

    def _masked_words(self, micro: list[MicroBatch]) -> Tensor:
        """Number of masked words in the global batch, at least 1: ()."""
        masks = [m.masked[1] for m in micro if m.masked is not None]
        if not masks:
            return torch.ones((), device=self.device)
        count = torch.stack([mask.sum() for mask in masks]).sum().float()
        return collectives.sum_over_ranks(count[None])[0].clamp(min=1)

    def _masked(self, m: MicroBatch, common: Common) -> Masked | None:
        if m.masked is None:
            return None
        own = None
        if common.active is not None and common.rows is not None:
            own = common.rows[torch.searchsorted(common.active, m.objects)]
            own = torch.nn.functional.normalize(own, dim=-1)  # (b, K, d)
        return Masked(m.masked[0], m.masked[1], m.ids, own)

    def _seed_dropout(self, step: int) -> None:
        """Dropout depends on (seed, step, rank): a resumed run draws what the undisturbed one would have drawn."""
        torch.manual_seed(torch_seed(RandomStream.DROPOUT, self.config.train.seed, step, collectives.rank()))


def _features(out: Output) -> tuple[Tensor, Tensor]:
    assert out.image is not None and out.text is not None
    return out.image, out.text


def _logits(out: Output) -> list[Tensor]:
    return [x for x in (out.scale, out.bias) if x is not None]


def _writable(array: NDArray[Any]) -> NDArray[Any]:
    """Ray Data's arrays are views of shared memory, which torch must not be given to write to."""
    return array if array.flags.writeable else array.copy()


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the generators that dropout draws from: of the CPU, and of the device where it is a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
