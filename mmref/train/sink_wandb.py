"""A run's numbers in Weights & Biases. Its own variables hold: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_API_KEY."""

from __future__ import annotations

import tempfile

from mmref.train.sinks import SinkRun, project

STEP = "step"


class WandbSink:
    def __init__(self, about: SinkRun) -> None:
        import wandb

        self.run = wandb.init(
            project=project("WANDB_PROJECT"),
            name=about.name,
            id=about.id,
            resume="allow",
            config=about.config,
            dir=about.folder or tempfile.mkdtemp(prefix="mmref-wandb-"),
            settings=wandb.Settings(console="off", silent=True),
        )
        # Its own step may only rise, and a resumed run repeats some: curves are drawn over ours.
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({STEP: step, **values})

    def close(self) -> None:
        self.run.finish()


def make(about: SinkRun) -> WandbSink:
    return WandbSink(about)


make.requires = ("wandb",)  # type: ignore[attr-defined]
