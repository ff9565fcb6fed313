"""`mmref evaluate`: features of a split, ranking metrics, bootstrap intervals, reference-based refinement, the report.

`evaluation` opens a run and `split_features` uses Ray; metrics, intervals and refinement take NumPy arrays and know
nothing of runs, Ray or training. The package itself is the function `mmref.evaluate`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Literal

from mmref.callable_package import CallablePackage

if TYPE_CHECKING:
    from mmref.evaluate.report import Metrics


class Evaluate(CallablePackage):
    """`mmref.evaluate` as a function."""

    def __call__(
        self,
        model: str | os.PathLike[str],
        data: str | os.PathLike[str] | None = None,
        split: str = "test",
        *,
        run_dir: str | os.PathLike[str] | None = None,
        out: str | os.PathLike[str] | None = None,
        workers: int | None = None,
        report: bool = True,
        image_to_image: bool = False,
        same_camera: str | None = None,
        captions_as_one: Literal["image", "object"] | None = None,
    ) -> Metrics:
        """Score a model on a split, before and after refinement, which is chosen on val: what `mmref evaluate` does.

        The table of the scores is printed too, and progress.

        Args:
            model: a run of `mmref train`, whose best checkpoint is meant; a folder of `mmref export`; or a pretrained model by
                hub id or folder.
            data: shard set (folder or URL); by default the one that the run was trained on.
            split: the split reported.
            run_dir: where metrics and report of a model that is no run are kept; by default runs/NAME.
            out: file or URL where the metrics are written besides.
            workers: Ray actors that compute features, 0: in this process; by default `eval.workers`, 0 without Ray.
            report: write report.html into the run directory.
            image_to_image: also let every image search the others of the split for images of its object, whatever the run's
                config says; metrics["image_to_image"].
            same_camera: the same, without an object's images by the query's own camera: the field of the samples that names it.
            captions_as_one: also search with all captions of an image, or of an object, as one query;
                metrics["captions_as_one"].

        Returns:
            The metrics in percent, as in metrics.json: metrics["refined"]["R@1"]. A notebook shows them as a table.

        Raises:
            ModelError: no such model, or `data` is missing for one that is no run. CheckpointError: the run has none.
            ShardSetError: no such shard set or split. EvaluationError: there is nothing to find for what was asked for besides.
            RunDirectoryError, StorageError: something cannot be written.
        """
        from mmref.evaluate.evaluation import changed_options, evaluate_model
        from mmref.terminal import arguments

        shards, run, copy = (None if given is None else arguments.place(os.fspath(given)) for given in (data, run_dir, out))
        changes = changed_options(image_to_image, same_camera, captions_as_one)
        return evaluate_model(arguments.model(os.fspath(model)), shards, split, copy, workers, report, run, changes)


sys.modules[__name__].__class__ = Evaluate
