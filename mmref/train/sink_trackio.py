"""A run's numbers in trackio, which keeps them on this machine (TRACKIO_DIR) or in a Space; TRACKIO_PROJECT names the project."""

from __future__ import annotations

from mmref.train.sinks import SinkRun, flat, project


class TrackioSink:
    def __init__(self, about: SinkRun) -> None:
        import trackio

        self.run = trackio.init(
            project=project("TRACKIO_PROJECT"), name=f"{about.name}-{about.id[:6]}", config=flat(about.config), resume="allow"
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def make(about: SinkRun) -> TrackioSink:
    return TrackioSink(about)


make.requires = ("trackio",)  # type: ignore[attr-defined]
