"""One training step: features, losses, gradients, references. Gives the same result however the batch is cut.

`StepRunner` calls a model (engine or plain module) and a backward function, so that the arithmetic is the same inside
DeepSpeed and in a plain process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmref.config import Config
from mmref.data.tokens import Tokens
from mmref.losses.agreement import agreement, agreement_weights
from mmref.losses.objective import TOTAL, References, Share, loss_weights, objective, pack, pair_losses, ramp
from mmref.model.mmref import Masked, Output
from mmref.model.reference_rows import unit_rows
from mmref.randomness import RandomStream, torch_seed
from mmref.train import collectives
from mmref.train.bank import ReferenceBank
from mmref.train.division import Division
from mmref.train.inputs import MicroBatch, Preparation, StepInputs


class Common(NamedTuple):
    """What all micro-batches of a step have in common."""

    inputs: StepInputs
    references: Tensor | None  # (A, K, d) that are contrasted; None for a run without references
    ramped: float  # of guidance and caption weights
    labels: Tensor | None  # (n,) of this rank's pairs, as `Share` has them


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
        division: Division | None = None,
    ) -> None:
        self.config, self.model, self.backward, self.boundary = config, model, backward, boundary
        self.bank, self.device, self.division = bank, device, division
        self.prepare = Preparation(config, bank, tokens, device, division)
        self.logits: list[Tensor] = []  # of the last step: the alignment's inverse temperature, and its bias where it has one
        self.reference_norm = torch.zeros((), device=device)  # of the references' gradient in the last step

    def run(self, step: int, inputs: StepInputs) -> Tensor:
        """Forward and backward of one step and the references' update: this rank's losses, as `objective.pack` lays them out.

        `inputs` are those that `prepare(step, batch)` has made.
        """
        config = self.config
        common = self._common(step, inputs.take())
        self._seed_dropout(step)
        run = self._plain if len(inputs.micro) == 1 else self._cached
        losses, image, text = run(inputs.micro, common)
        if common.references is not None and common.references.requires_grad:
            assert inputs.contrasted is not None
            lr = config.reference.lr * self._lr_share(step)
            self.reference_norm = self.bank.apply_gradient(inputs.contrasted.rows, common.references.grad, lr)
        if inputs.followed is not None:
            # Those that learn by gradient only start from the mean.
            learned = common.references is not None and common.references.requires_grad
            self.bank.follow(image, text, *inputs.followed, momentum=1.0 if learned else None)
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
        losses = self._objective(image, text, out, common) | self._head_losses(out, common.inputs.words)
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
        losses = self._objective(image, text, out._replace(**dict(zip(("scale", "bias"), logits))), common)
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
                if leaf.grad is not None:  # RDE's triplets have a temperature of their own
                    surrogate = surrogate + (number * leaf.grad).sum() / len(micro)
            heads = self._head_losses(out, common.inputs.words)
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

    def _objective(self, image: Tensor, text: Tensor, out: Output, common: Common) -> dict[str, Tensor]:
        """Losses of this rank's rows (n) against the global batch (N); of `out` the scale and bias of the logits."""
        config, inputs, references = self.config, common.inputs, None
        if common.references is not None and inputs.contrasted is not None:
            references = References(common.references, inputs.contrasted.targets)
        all_weights = self._caption_weights(text, references, common.ramped)
        first = collectives.rank() * len(text)
        share = Share(
            image,
            text,
            inputs.objects,
            collectives.gather_with_gradient(image),
            collectives.gather_with_gradient(text),
            inputs.all_objects,
            out.scale,
            None if all_weights is None else all_weights[first : first + len(text)],
            all_weights,
            out.bias,
            common.labels,
        )
        if self.division is not None and inputs.pairs is not None:
            own = torch.arange(first, first + len(text), device=text.device)
            with torch.no_grad():
                found = torch.stack(pair_losses(share, config.loss, own), 1)  # (n, 2)
            self.division.note(inputs.pairs.once, inputs.pairs.last, collectives.gather(found))
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

    def _head_losses(self, out: Output, words: int) -> dict[str, Tensor]:
        """The heads' losses, which come as sums over a micro-batch: `words` masked in the global batch.

        The mean over ranks is taken by the engine: the sum over this rank's share is scaled up by the world size.
        """
        world = collectives.world_size()
        sums: dict[str, tuple[Tensor | None, int]] = {
            "loss_rec": (out.rec_sum, words),
            "loss_mlm": (out.mlm_sum, words),
            "loss_id": (out.id_sum, 2 * self.config.train.global_batch),
        }
        return {name: part * (world / count) for name, (part, count) in sums.items() if part is not None}

    # -- inputs --------------------------------------------------------------------------------------------------

    def _common(self, step: int, inputs: StepInputs) -> Common:
        c, references = self.config, None
        ramped = ramp(step, c.train.max_steps, c.loss.guide_from, c.loss.guide_full)
        if inputs.contrasted is not None:
            references = self.bank.fetch(inputs.contrasted.rows)
            if c.reference.init == "mean" and step < c.loss.guide_from * c.train.max_steps:
                references = references.detach()  # they follow first
        labels = None
        if self.division is not None and inputs.pairs is not None and self.division.begin(step):
            first = collectives.rank() * len(inputs.objects)
            labels = self.division.label(inputs.pairs.everyone[first : first + len(inputs.objects)])
        return Common(inputs, references, ramped, labels)

    def _masked(self, m: MicroBatch, common: Common) -> Masked | None:
        if m.masked is None:
            return None
        own = None
        if common.references is not None and m.targets is not None:
            own = unit_rows(common.references[m.targets])  # (b, K, d)
        return Masked(*m.masked, own)

    def _seed_dropout(self, step: int) -> None:
        """Dropout depends on (seed, step, rank): a resumed run draws what the undisturbed one would have drawn."""
        torch.manual_seed(torch_seed(RandomStream.DROPOUT, self.config.train.seed, step, collectives.rank()))


def _features(out: Output) -> tuple[Tensor, Tensor]:
    assert out.image is not None and out.text is not None
    return out.image, out.text


def _logits(out: Output) -> list[Tensor]:
    return [x for x in (out.scale, out.bias) if x is not None]


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the generators that dropout draws from: of the CPU, and of the device where it is a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
