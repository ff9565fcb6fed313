"""Distributed training: the loop, the DeepSpeed engine, the sharded reference bank, collectives, checkpoints.

The only place that knows ranks. The package itself is the function `mmref.train`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmref.callable_package import CallablePackage

if TYPE_CHECKING:
    from mmref.config import Config
    from mmref.evaluate.report import Metrics


class Train(CallablePackage):
    """`mmref.train` as a function."""

    def __call__(
        self,
        config: Config | Mapping[str, Any] | str | os.PathLike[str],
        fields: Mapping[str, Any] | None = None,
        *,
        final_evaluation: bool = True,
    ) -> Metrics | None:
        """Train a run, or go on with it, then evaluate its best checkpoint: what `mmref train` does.

        It starts a Ray cluster of this machine, or joins one, as the command does. Progress is printed.

        Args:
            config: the name of a preset ("clip-finetune") or of a config that comes with mmref ("emoji"), a YAML file, sections
                with their fields ({"data": {"root": "shards/products"}}), or an `mmref.config.Config`.
            fields: values that win over it, by dotted name as of the command's flags: {"train.lr": 1e-5, "run_dir": "runs/a"}.
            final_evaluation: evaluate the best checkpoint at the end, and write metrics.json and report.html.

        Returns:
            The metrics of the final evaluation, as in metrics.json; a notebook shows them as a table. None without one.

        Raises:
            ExtraMissingError: what a training needs is not installed. ConfigError: a field or its value. ShardSetError,
            ModelError, RunDirectoryError, ClusterTooSmallError and others of `mmref.errors`.
        """
        from mmref.config import make_config
        from mmref.extras import need

        made = make_config(config, fields)
        need("train", "mmref.train")
        from mmref.train.trainer import train

        return train(made, final_evaluation)


sys.modules[__name__].__class__ = Train
