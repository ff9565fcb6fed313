"""One training step: features, losses, gradients, references. Gives the same result however the batch is cut.

`StepRunner` calls a model (engine or plain module) and a backward function, so that the arithmetic is the same inside
DeepSpeed and in a plain process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmref.config import Config, ramp
from mmref.data.augment import augment
from mmref.data.reader import Batch
from mmref.data.tokens import Tokens
from mmref.losses import infonce, reference_loss, scale_gradient, sdm
from mmref.model.mmref import Masked
from mmref.model.reconstruction import mask_words
from mmref.train import collectives
from mmref.train.bank import ReferenceBank

LOSSES = ("loss", "loss_align", "loss_fuse", "loss_rec", "loss_guide")


@dataclass
class MicroBatch:
    """A slice of this rank's samples on its device."""

    pixels: Tensor  # (b, 3, H, W)
    ids: Tensor  # (b, L)
    mask: Tensor  # (b, L)
    masked: tuple[Tensor, Tensor] | None  # masked ids and positions, (b, L) each
    objects: Tensor  # (b,) object rows


class StepRunner:
    """Runs steps. `model` gives an `Output`, `backward(loss)` adds to the gradients; `boundary()` follows each backward."""

    def __init__(
        self,
        config: Config,
        model: Callable[..., Any],
        backward: Callable[[Tensor], Any],
        boundary: Callable[[], Any],
        bank: ReferenceBank,
        tokens: Tokens,
        device: torch.device,
    ) -> None:
        self.config, self.model, self.backward, self.boundary = config, model, backward, boundary
        self.bank, self.tokens, self.device = bank, tokens, device
        self.special_ids = torch.as_tensor(tokens.special_ids, device=device)
        self.scale = torch.tensor([1 / config.loss.tau])  # inverse temperature of the last step
        self.needs_references = config.loss.w_guide > 0 or config.loss.w_rec > 0 or config.loss.w_fuse > 0

    def run(self, step: int, batch: Batch) -> Tensor:
        """Forward and backward of one step and the references' update: (5,) the LOSSES of this rank's share."""
        config = self.config
        ramped = ramp(step, config.train.max_steps, config.loss.guide_from, config.loss.guide_full)
        micro = self._micro_batches(step, batch, with_masks=config.loss.w_rec > 0)
        objects = torch.cat([m.objects for m in micro])
        all_objects = collectives.gather(objects)  # (N,)
        active, rows = self._references(all_objects, step)
        rec_count = self._masked_words(micro)
        self._seed_dropout(step)
        if len(micro) == 1:
            values, image, text = self._plain(micro[0], all_objects, active, rows, ramped, rec_count)
        else:
            values, image, text = self._cached(micro, all_objects, active, rows, ramped, rec_count)
        if rows is not None and rows.requires_grad:
            assert active is not None
            self.bank.apply_gradient(active, rows.grad, config.reference.lr * self._lr_share(step))
        elif self.needs_references:
            self.bank.follow(image, text, objects, all_objects)
        return values

    def _lr_share(self, step: int) -> float:
        """References anneal with the encoders."""
        from mmref.train.engine import learning_rate

        return learning_rate(step, self.config.train) / self.config.train.lr

    # -- the two ways to a gradient ------------------------------------------------------------------------------

    def _plain(self, m: MicroBatch, all_objects, active, rows, ramped: float, rec_count: Tensor):  # type: ignore[no-untyped-def]
        out = self.model(m.pixels, m.ids, m.mask, self._masked(m, active, rows))
        loss, values = self._objective(out.image, out.text, out.scale, m.objects, all_objects, active, rows, ramped)
        loss, values = self._add_reconstruction(loss, values, out.rec_sum, rec_count)
        self.backward(loss)
        self.boundary()
        self.scale = out.scale.detach()
        return values, out.image.detach(), out.text.detach()

    def _cached(self, micro: list[MicroBatch], all_objects, active, rows, ramped: float, rec_count: Tensor):  # type: ignore[no-untyped-def]
        """Gradient caching (Gao et al. 2021): the losses see the features of the whole batch, the towers one micro-batch.

        Pass 1 computes all features without a graph, the losses give the gradient at the features, pass 2 repeats each
        micro-batch with a graph and feeds it its rows of that gradient.
        """
        states, images, texts = [], [], []
        with torch.no_grad():
            for m in micro:
                states.append(_random_state(self.device))
                out = self.model(m.pixels, m.ids, m.mask)
                images.append(out.image)
                texts.append(out.text)
        image = torch.cat(images).requires_grad_()
        text = torch.cat(texts).requires_grad_()
        scale = out.scale.detach().clone().requires_grad_()
        self.scale = scale.detach()
        objects = torch.cat([m.objects for m in micro])
        loss, values = self._objective(image, text, scale, objects, all_objects, active, rows, ramped)
        loss.backward()  # down to the features (and the references); the towers follow below
        first = 0
        for state, m in zip(states, micro):
            _set_random_state(self.device, state)
            out = self.model(m.pixels, m.ids, m.mask, self._masked(m, active, rows))
            own = slice(first, first + len(m.objects))
            first += len(m.objects)
            surrogate = (out.image * image.grad[own]).sum() + (out.text * text.grad[own]).sum()  # type: ignore[index]
            surrogate = surrogate + (out.scale * scale.grad).sum() / len(micro)
            surrogate, values = self._add_reconstruction(surrogate, values, out.rec_sum, rec_count)
            self.backward(surrogate)
            self.boundary()
        return values, image.detach(), text.detach()

    # -- losses --------------------------------------------------------------------------------------------------

    def _objective(self, image, text, scale, objects, all_objects, active, rows, ramped: float):  # type: ignore[no-untyped-def]
        """Loss of this rank's rows (n) against the global batch (N), and the values to log."""
        c = self.config
        all_image, all_text = collectives.gather_with_gradient(image), collectives.gather_with_gradient(text)
        align_loss = infonce if c.loss.align == "infonce" else sdm
        align = 0.5 * (
            align_loss(image, all_text, objects, all_objects, scale)
            + align_loss(text, all_image, objects, all_objects, scale)
        )
        if c.loss.align == "sdm":
            align = 2 * align  # IRRA adds the two directions
        zero = torch.zeros((), device=align.device)
        if rows is None:
            values = torch.stack([align, align, zero, zero, zero]).detach()
            return align, values
        w_fuse = c.loss.w_fuse if rows.requires_grad else 0.0
        w_guide = c.loss.w_guide * ramped
        reference = reference_loss(
            torch.cat([scale_gradient(image, w_guide), scale_gradient(text, w_guide)]),
            scale_gradient(rows, w_fuse),
            torch.searchsorted(active, objects).repeat(2),
            1 / c.reference.tau,
            c.reference.score,
        )
        # fusion and guidance are one value with two gradient paths, each scaled by its weight above
        value = reference.detach()
        total = align.detach() + (w_fuse + w_guide) * value
        return align + reference, torch.stack([total, align.detach(), value, zero, value])

    def _add_reconstruction(self, loss, values, rec_sum, count: Tensor):  # type: ignore[no-untyped-def]
        if rec_sum is None:
            return loss, values
        # the mean over ranks is taken by the engine: the sum over this rank's words is scaled up by the world size
        rec = rec_sum * (collectives.world_size() / count)
        weighted = self.config.loss.w_rec * rec
        added = torch.stack([weighted.detach(), values.new_zeros(()), values.new_zeros(()), rec.detach(),
                             values.new_zeros(())])  # fmt: skip
        return loss + weighted, values + added

    # -- inputs --------------------------------------------------------------------------------------------------

    def _micro_batches(self, step: int, batch: Batch, with_masks: bool) -> list[MicroBatch]:
        c, n = self.config, len(batch["step"])
        first, total = int(batch["position"][0]), c.train.global_batch
        images = torch.from_numpy(_writable(batch["image"])).to(self.device)
        pixels = augment(images, c.data, c.train.seed, step, first, total)
        ids = torch.from_numpy(_writable(batch["ids"])).to(self.device).long()
        mask = torch.from_numpy(_writable(batch["mask"])).to(self.device).long()
        objects = torch.from_numpy(_writable(batch["object"])).to(self.device)
        masked = self._mask(step, ids, first, total) if with_masks else None
        size = n // c.train.accumulation
        return [
            MicroBatch(pixels[s], ids[s], mask[s], None if masked is None else (masked[0][s], masked[1][s]), objects[s])
            for s in (slice(i * size, (i + 1) * size) for i in range(c.train.accumulation))
        ]

    def _mask(self, step: int, ids: Tensor, first: int, total: int) -> tuple[Tensor, Tensor]:
        """Masks of this rank's captions, drawn for the global batch so that they do not depend on its partition."""
        generator = torch.Generator().manual_seed((self.config.train.seed * 5_000_011 + step) % (1 << 62))
        padded = torch.full((total, ids.shape[1]), self.tokens.mask_id, dtype=ids.dtype, device=ids.device)
        padded[first : first + len(ids)] = ids
        special = torch.isin(padded, self.special_ids)
        masked, at = mask_words(
            padded, special, self.config.loss.mask_rate, self.tokens.mask_id, self.tokens.vocab_size, generator
        )
        own = slice(first, first + len(ids))
        return masked[own], at[own]

    def _masked_words(self, micro: list[MicroBatch]) -> Tensor:
        """Number of masked words in the global batch, at least 1."""
        if micro[0].masked is None:
            return torch.ones((), device=self.device)
        count = torch.stack([m.masked[1].sum() for m in micro if m.masked is not None]).sum().float()
        return collectives.sum_over_ranks(count[None])[0].clamp(min=1)

    def _masked(self, m: MicroBatch, active: Tensor | None, rows: Tensor | None) -> Masked | None:
        if m.masked is None or active is None or rows is None:
            return None
        own = rows[torch.searchsorted(active, m.objects)]  # (b, K, d)
        return Masked(m.masked[0], m.masked[1], m.ids, torch.nn.functional.normalize(own, dim=-1))

    def _references(self, all_objects: Tensor, step: int) -> tuple[Tensor | None, Tensor | None]:
        if not self.needs_references:
            return None, None
        active = self.bank.select(all_objects, step)
        return active, self.bank.fetch(active)

    def _seed_dropout(self, step: int) -> None:
        """Dropout depends on (seed, step, rank): a resumed run draws what the undisturbed one would have drawn."""
        torch.manual_seed((self.config.train.seed * 7_000_003 + step) * 4096 + collectives.rank())


def _writable(array: Any) -> Any:
    """Ray Data's arrays are views of shared memory, which torch must not be given to write to."""
    return array if array.flags.writeable else array.copy()


def _random_state(device: torch.device) -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
