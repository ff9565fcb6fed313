"""Batches that are prepared while the model works on the one before."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from support.tiny_run import make_run

from mmref.errors import SampleError
from mmref.evaluate import split_features
from mmref.evaluate.evaluation import open_run
from mmref.evaluate.features import ahead
from mmref.evaluate.split_features import Embedder, Portion


def test_the_next_part_is_prepared_while_the_caller_works() -> None:
    begun = [threading.Event() for _ in range(4)]

    def prepare(part: int) -> int:
        begun[part].set()
        return 10 * part

    found = []
    for ready in ahead(range(4), prepare):
        found.append(ready)
        assert len(found) == 4 or begun[len(found)].wait(10), "it waits for the caller"
        assert not any(one.is_set() for one in begun[len(found) + 1 :]), "more than one part lies in memory"
    assert found == [0, 10, 20, 30]
    assert list(ahead([], prepare)) == []


def test_an_error_comes_at_its_part() -> None:
    def prepare(part: int) -> int:
        if part == 1:
            raise SampleError("gone")
        return part

    parts = ahead(range(3), prepare)
    assert next(parts) == 0
    with pytest.raises(SampleError, match="gone"):
        next(parts)


def test_a_worker_reads_the_next_portion_meanwhile(make_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(make_config({}), str(tmp_path / "run"), {})
    run, config, checkpoint = open_run(str(tmp_path / "run"))
    read: list[int] = []
    known = split_features.read_pixels
    monkeypatch.setattr(
        split_features, "read_pixels", lambda reader, rows, data: (read.append(rows[0]), known(reader, rows, data))[1]
    )
    portions = [Portion("val", "image", start, start + 2, []) for start in (0, 2, 4)]
    alone = [Embedder(run.path, checkpoint, config, config.data.root).encode(portion)[0] for portion in portions]
    read.clear()
    worker = Embedder(run.path, checkpoint, config, config.data.root)
    first = worker.encode(portions[0], portions[1])[0]
    worker._thread.submit(lambda: None).result(30)  # behind what is being read
    assert read == [0, 2]
    found = [first, worker.encode(portions[1], None)[0], worker.encode(portions[2], None)[0]]
    assert read == [0, 2, 4], "each was read once"
    for one, other in zip(found, alone):
        np.testing.assert_array_equal(one, other)
