"""StepRunner around a plain module, without DeepSpeed or Ray: what the tests of steps, ranks and GPUs run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmref.config import Config
from mmref.data.reader import StepReader
from mmref.losses.objective import LOSSES
from mmref.model.mmref import MMRef, build_model
from mmref.train import collectives
from mmref.train.bank import ReferenceBank
from mmref.train.division import Division
from mmref.train.engine import learning_rate, parameter_groups
from mmref.train.step import StepRunner

CPU = torch.device("cpu")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
AT = {name: place for place, name in enumerate(LOSSES)}  # where each loss stands in what a step returns


@dataclass
class Result:
    """Losses of every step (steps, len(LOSSES)), gradients of every step by name, references (m, K, d) after every step."""

    losses: Tensor
    gradients: list[dict[str, Tensor]]
    references: list[Tensor]


class PlainTraining:
    """Reader, model, bank and runner of one rank; after `step` the gradients are the mean over ranks."""

    def __init__(self, config: Config, rank: int = 0, world: int = 1, device: torch.device = CPU) -> None:
        self.config = config
        self.reader = StepReader(config, rank, world)
        objects = self.reader.index.n_objects
        self.model: MMRef = build_model(config, self.reader.tokens.vocab_size, objects).train().to(device)
        self.bank = ReferenceBank(objects, self.model.embed_dim, config.reference, config.train.seed, device)
        self.boundaries = 0
        self.division = Division.of(config, self.reader.index, device)
        self.runner = StepRunner(
            config, self.model, lambda loss: loss.backward(), self._boundary, self.bank, self.reader.tokens, device,
            self.division,
        )  # fmt: skip

    def _boundary(self) -> None:
        self.boundaries += 1

    def step(self, step: int) -> Tensor:
        """Losses (len(LOSSES),) of a step over all ranks; gradients lie in the parameters."""
        self.model.zero_grad()
        losses = self.runner.run(step, self.runner.prepare(step, self.reader.read_step(step)))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        together = torch.cat([losses, *(g.flatten() for g in grads)])
        mean = (collectives.sum_over_ranks(together) / collectives.world_size()).split([len(losses), *(g.numel() for g in grads)])
        for parameter, grad in zip(trained, mean[1:]):
            parameter.grad = grad.view_as(parameter).clone()
        return mean[0]

    def gradients(self) -> dict[str, Tensor]:
        return {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def references(self) -> Tensor:
        return self.bank.fetch(self.bank.everyone).detach().clone()


def train(config: Config, steps: int, rank: int = 0, world: int = 1, lr: float = 0.1, device: torch.device = CPU) -> Result:
    """A few steps of plain gradient descent, which hides no factor in a gradient as Adam would; results lie in memory."""
    run = PlainTraining(config, rank, world, device)
    losses, gradients, references = [], [], []
    for step in range(steps):
        losses.append(run.step(step).cpu())
        gradients.append({name: grad.cpu() for name, grad in run.gradients().items()})
        references.append(run.references().cpu())
        with torch.no_grad():
            for parameter in run.model.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
    return Result(torch.stack(losses), gradients, references)


def train_adam(config: Config, steps: int) -> list[list[float]]:
    """Losses of steps with the run's own parameter groups, rates and clipping."""
    run, t = PlainTraining(config), config.train
    optimizer = torch.optim.AdamW(parameter_groups(run.model, t), betas=(0.9, t.beta2), eps=t.eps)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, t) * group["lr_share"]
        losses.append(run.step(step).tolist())
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), t.clip_norm)
        optimizer.step()
    return losses


# names -> dotted overrides of the tiny config; those in ACCUMULATED are also run on several ranks with accumulation
ACCUMULATED = (
    "moving average, K=2, rec",
    "gradient, sampled negatives, lme, rec",
    "own tau on text, soft targets, weighted captions",
    "irra",
    "sigmoid, weighted captions",
    "rde",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "moving average": {},
    "moving average, K=2, rec": {"reference.per_object": 2, "loss.w_rec": 0.3},
    "by modality, lme, sdm": {
        "reference.per_object": 2, "reference.assign": "modality", "reference.score": "lme", "loss.align": "sdm",
    },
    "moving average, batch negatives": {"reference.negatives": "batch", "loss.w_guide": 0.8},
    "gradient": {"reference.update": "gradient", "loss.w_fuse": 0.7},
    "gradient, K=2, batch negatives, rec": {
        "reference.update": "gradient", "reference.per_object": 2, "reference.negatives": "batch", "loss.w_rec": 0.3,
    },
    "gradient, sampled negatives, lme, rec": {
        "reference.update": "gradient", "reference.per_object": 2, "reference.negatives": "sampled",
        "reference.sampled_negatives": 4, "reference.score": "lme", "loss.w_rec": 0.3, "loss.learn_tau": True,
    },
    "own tau on text, soft targets, weighted captions": {
        "loss.guide_on": "text", "loss.guide_tau": 0.2, "loss.guide_soft": 0.3, "loss.caption_weight": 2.0,
        "reference.per_object": 2,
    },
    "gradient from the mean": {
        "reference.update": "gradient", "reference.init": "mean", "loss.guide_from": 0.05, "loss.guide_full": 0.05,
    },
    "irra": {
        "loss.align": "sdm", "loss.w_guide": 0.0, "loss.w_fuse": 0.0, "loss.w_id": 0.3, "loss.w_mlm": 0.3,
        "loss.mlm_layers": 2,
    },
    "sigmoid, weighted captions": {
        "loss.align": "sigmoid", "loss.bias": -3.0, "loss.learn_tau": True, "loss.caption_weight": 2.0,
    },
    "rde": {"loss.align": "rde", "loss.rde_tau": 0.1, "loss.rde_margin": 0.3, "reference.margin": 0.1},
    "align only": {"loss.w_guide": 0.0, "loss.w_fuse": 0.0},
}  # fmt: skip


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """CLOSE, of the largest gradient: SDM from random weights has some of 80, whose parts cancel out in smaller ones."""
    assert found.keys() == expected.keys()
    close = {**CLOSE, "atol": CLOSE["atol"] * max(1.0, max(float(g.abs().max()) for g in expected.values()))}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **close, msg=lambda m, n=name: f"{n}: {m}")
