"""A trial: the same training as `mmref train`, nested inside a Ray Tune trial."""

from __future__ import annotations

import os
from typing import Any

from mmref.cluster import SETTINGS
from mmref.config import from_dict
from mmref.rundir import RunDir
from mmref.train.trainer import fit, prepare_run
from tune.space import with_values

ERROR = "error.txt"  # in a failed trial's run directory


def run_trial(values: dict[str, Any], base: dict[str, Any]) -> None:
    """Train with the base config and a trial's values; every evaluation is reported to Tune.

    A failure is written to error.txt, where the sweep reads it. The run directory bears the trial's id inside the base's, so that a trial which is started again goes on. Ray Train's
    processes are children of this one: when Tune stops the trial they end with it.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    for name, value in SETTINGS.items():  # of the nested training, for which this process is the driver
        os.environ.setdefault(name, value)
    config = with_values(from_dict(base), values)
    config.run_dir = f"{base['run_dir']}/{tune.get_context().get_trial_id()}"
    run = RunDir(config.run_dir)
    run.remove(ERROR)
    try:
        prepare_run(config, run)
        fit(config, run, callbacks=[TuneReportCallback()])
    except Exception as error:  # whatever ends it: a result of the sweep
        run.write_text(ERROR, f"{type(error).__name__}: {error}\n")
        raise
