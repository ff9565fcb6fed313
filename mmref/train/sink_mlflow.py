"""A run's numbers in MLflow. MLFLOW_TRACKING_URI names the server or store: by default one in a run directory that is local.
MLFLOW_EXPERIMENT_NAME names the experiment."""

from __future__ import annotations

import os
import time
from typing import Any

from mmref.train.sinks import SinkRun, flat, project

RUN_ID = "mmref.id"  # tag
LONGEST = 500  # characters of a parameter
PARAMETERS = 100  # a request takes


class MlflowSink:
    def __init__(self, about: SinkRun) -> None:
        from mlflow.tracking import MlflowClient

        store = os.environ.get("MLFLOW_TRACKING_URI")
        if not store and about.folder:
            store = f"sqlite:///{about.folder}/mlflow.db"  # that of the working directory would be one that Ray deletes
        self.client = MlflowClient(store)
        name = project("MLFLOW_EXPERIMENT_NAME")
        found = self.client.get_experiment_by_name(name)
        place = f"file://{about.folder}/mlflow" if about.folder and not os.environ.get("MLFLOW_TRACKING_URI") else None
        experiment = found.experiment_id if found else self.client.create_experiment(name, artifact_location=place)
        before = self.client.search_runs([experiment], f"tags.`{RUN_ID}` = '{about.id}'")
        if before:
            self.id = before[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
        else:
            self.id = self._create(experiment, about)

    def _create(self, experiment: str, about: SinkRun) -> str:
        from mlflow.entities import Param

        made = self.client.create_run(experiment, run_name=about.name, tags={RUN_ID: about.id, "mmref.path": about.path})
        parameters = [Param(key, str(value)[:LONGEST]) for key, value in flat(about.config).items()]
        for start in range(0, len(parameters), PARAMETERS):
            self.client.log_batch(made.info.run_id, params=parameters[start : start + PARAMETERS])
        return str(made.info.run_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics: list[Any] = [Metric(name, float(value), now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.id)


def make(about: SinkRun) -> MlflowSink:
    return MlflowSink(about)


make.requires = ("mlflow",)  # type: ignore[attr-defined]
