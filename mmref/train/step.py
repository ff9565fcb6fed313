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

from mmref.config import Config
from mmref.data.augment import augment
from mmref.data.reader import Batch
from mmref.data.tokens import Tokens
from mmref.losses import agreement, agreement_weights, infonce, reference_loss, sdm, soft_targets
from mmref.model.mmref import Masked
from mmref.model.reconstruction import mask_words
from mmref.train import collectives
from mmref.train.bank import ReferenceBank

LOSSES = ("loss", "loss_align", "loss_fuse", "loss_rec", "loss_guide", "loss_id", "loss_mlm")


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
        self.reference_norm = torch.zeros((), device=device)  # of the references' gradient in the last step
        c = config.loss
        self.with_masks = max(c.w_rec, c.w_mlm) > 0
        self.needs_references = max(c.w_guide, c.w_rec, c.w_fuse, c.caption_weight) > 0

    def run(self, step: int, batch: Batch) -> Tensor:
        """Forward and backward of one step and the references' update: the LOSSES of this rank's share, one each."""
        config = self.config
        ramped = ramp(step, config.train.max_steps, config.loss.guide_from, config.loss.guide_full)
        micro = self._micro_batches(step, batch, self.with_masks)
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
            self.reference_norm = self.bank.apply_gradient(
                active, rows.grad, config.reference.lr * self._lr_share(step)
            )
            if config.reference.init == "mean":
                self.bank.follow(image, text, objects, all_objects, momentum=1.0)
        elif self.needs_references:
            self.bank.follow(image, text, objects, all_objects)
        return values

    def _lr_share(self, step: int) -> float:
        """References anneal with the encoders."""
        from mmref.train.engine import learning_rate

        return learning_rate(step, self.config.train) / self.config.train.lr

    # -- the two ways to a gradient ------------------------------------------------------------------------------

    def _plain(self, m: MicroBatch, all_objects, active, rows, ramped: float, rec_count: Tensor):  # type: ignore[no-untyped-def]
        out = self.model(m.pixels, m.ids, m.mask, self._masked(m, active, rows), m.objects)
        loss, values = self._objective(out.image, out.text, out.scale, m.objects, all_objects, active, rows, ramped)
        loss, values = self._add_sums(loss, values, out, rec_count)
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
            out = self.model(m.pixels, m.ids, m.mask, self._masked(m, active, rows), m.objects)
            own = slice(first, first + len(m.objects))
            first += len(m.objects)
            surrogate = (out.image * image.grad[own]).sum() + (out.text * text.grad[own]).sum()  # type: ignore[index]
            surrogate = surrogate + (out.scale * scale.grad).sum() / len(micro)
            surrogate, values = self._add_sums(surrogate, values, out, rec_count)
            self.backward(surrogate)
            self.boundary()
        return values, image.detach(), text.detach()

    # -- losses --------------------------------------------------------------------------------------------------

    def _objective(self, image, text, scale, objects, all_objects, active, rows, ramped: float):  # type: ignore[no-untyped-def]
        """Loss of this rank's rows (n) against the global batch (N), and the values to log."""
        c = self.config
        all_image, all_text = collectives.gather_with_gradient(image), collectives.gather_with_gradient(text)
        # (n,) rows of the own objects among the references
        targets = None if active is None else torch.searchsorted(active, objects)
        all_weights = self._caption_weights(text, rows, targets, ramped)
        first = collectives.rank() * len(text)
        weights = None if all_weights is None else all_weights[first : first + len(text)]
        align_loss = infonce if c.loss.align == "infonce" else sdm
        align = 0.5 * (
            align_loss(image, all_text, objects, all_objects, scale, other_weights=all_weights)
            + align_loss(text, all_image, objects, all_objects, scale, weights)
        )
        if c.loss.align == "sdm":
            align = 2 * align  # IRRA adds the two directions
        if rows is None:
            return align, _values(loss=align, loss_align=align)
        assert targets is not None
        weight = c.loss.w_guide * ramped
        guide = fuse = torch.zeros_like(align)  # what is switched off is logged as 0
        if c.loss.w_guide > 0:
            with torch.set_grad_enabled(weight > 0):
                guide = self._guidance(image, text, rows.detach(), targets, weights)
        total = align + weight * guide
        if rows.requires_grad:
            both = torch.cat([image, text]).detach()
            fuse = reference_loss(
                both,
                rows,
                targets.repeat(2),
                1 / c.reference.tau,
                c.reference.score,
                weights=None if weights is None else torch.cat([torch.ones_like(weights), weights]),
            )
            total = total + c.loss.w_fuse * fuse
        return total, _values(loss=total, loss_align=align, loss_fuse=fuse, loss_guide=guide)

    def _guidance(self, image: Tensor, text: Tensor, rows: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Cross-entropy of the guided features' objects among the references (A, K, d), which get no gradient."""
        c, r = self.config.loss, self.config.reference
        soft = soft_targets(rows, targets, c.guide_soft, 1 / r.tau) if c.guide_soft > 0 else None
        one = torch.ones_like(targets, dtype=torch.float32)
        parts = [(image, one)] if c.guide_on != "text" else []
        parts += [(text, one if weights is None else weights)] if c.guide_on != "image" else []
        return reference_loss(
            torch.cat([features for features, _ in parts]),
            rows,
            targets.repeat(len(parts)),
            1 / (c.guide_tau or r.tau),
            r.score,
            None if soft is None else soft.repeat(len(parts), 1),
            None if weights is None else torch.cat([weight for _, weight in parts]),
        )

    def _caption_weights(
        self, text: Tensor, rows: Tensor | None, targets: Tensor | None, ramped: float
    ) -> Tensor | None:
        """(N,) weights of the global batch's captions, 1 on average; None where all weigh alike."""
        sharpness = self.config.loss.caption_weight * ramped
        if sharpness == 0 or rows is None or targets is None:
            return None
        everyone = collectives.gather(agreement(text, rows, targets, self.config.reference.score))  # (N,)
        return agreement_weights(everyone, sharpness)

    def _add_sums(self, loss, values, out, words: Tensor):  # type: ignore[no-untyped-def]
        """Add the heads' losses, which come as sums over a micro-batch: `words` masked in the global batch."""
        c, samples = self.config.loss, self.config.train.global_batch
        for name, weight, part, count in (
            ("loss_rec", c.w_rec, out.rec_sum, words),
            ("loss_mlm", c.w_mlm, out.mlm_sum, words),
            ("loss_id", c.w_id, out.id_sum, 2 * samples),
        ):
            if part is not None:
                # the mean over ranks is taken by the engine: the sum over this rank's share is scaled up by the world size
                mean = part * (collectives.world_size() / count)
                loss = loss + weight * mean
                values = values + _values(loss=weight * mean, **{name: mean})
        return loss, values

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
        if m.masked is None:
            return None
        own = None
        if active is not None and rows is not None:
            own = torch.nn.functional.normalize(rows[torch.searchsorted(active, m.objects)], dim=-1)  # (b, K, d)
        return Masked(m.masked[0], m.masked[1], m.ids, own)

    def _references(self, all_objects: Tensor, step: int) -> tuple[Tensor | None, Tensor | None]:
        if not self.needs_references:
            return None, None
        active = self.bank.select(all_objects, step)
        rows = self.bank.fetch(active)
        c = self.config
        follows_first = c.reference.init == "mean" and step < c.loss.guide_from * c.train.max_steps
        return active, rows.detach() if follows_first else rows

    def _seed_dropout(self, step: int) -> None:
        """Dropout depends on (seed, step, rank): a resumed run draws what the undisturbed one would have drawn."""
        torch.manual_seed(((self.config.train.seed * 7_000_003 + step) * 4096 + collectives.rank()) % (1 << 62))


def _values(**losses: Tensor) -> Tensor:
    """The named ones of LOSSES as a vector, detached, the others 0."""
    zero = torch.zeros_like(losses["loss"])
    return torch.stack([losses.get(name, zero) for name in LOSSES]).detach()


def _writable(array: Any) -> Any:
    """Ray Data's arrays are views of shared memory, which torch must not be given to write to."""
    return array if array.flags.writeable else array.copy()


def _random_state(device: torch.device) -> Any:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def ramp(step: int, max_steps: int, start: float, full: float) -> float:
    """Weight in [0, 1] of a loss that ramps in linearly between two shares of training."""
    done = step / max(max_steps, 1)
    if done >= full:
        return 1.0
    return 0.0 if done < start else (done - start) / (full - start)
