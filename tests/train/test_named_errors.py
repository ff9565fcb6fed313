"""Our own errors inside those of Ray Train and Ray Data."""

from __future__ import annotations

import ray
from ray.train.v2.api.exceptions import WorkerGroupError

from mmref.errors import MMRefError, SampleError, StorageError
from mmref.train.ray_trainer import named_error


def test_an_error_of_a_reader_is_found_without_its_traceback() -> None:
    """As Ray Data raises it in a worker: a copy of both classes, its text a traceback, ours with an advice on retries."""
    ours = SampleError("object a has no usable image left.\nFailed to apply UDF transform after 1/1 attempts.\nTo change ...")
    copy = ray.exceptions.RayTaskError("submit()", "Traceback: ...", ours).as_instanceof_cause()
    assert isinstance(copy, MMRefError) and "Traceback" in str(copy)
    found = named_error(WorkerGroupError("1 worker failed", {0: copy}))
    assert type(found) is SampleError and str(found) == "object a has no usable image left."


def test_an_error_of_a_worker_is_found_as_it_is() -> None:
    ours = StorageError("the disk is full.")
    assert named_error(WorkerGroupError("1 worker failed", {0: ours})) is ours
    other = WorkerGroupError("1 worker failed", {0: ValueError("no")})
    assert named_error(other) is other
