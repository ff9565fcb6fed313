"""What Ray Data is handed of a run, without Ray: how many objects, and how far ahead of the readers."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from mmref.config import Config
from mmref.data import stream


class Operator:
    """A part of Ray Data's plan, as far as it is asked what comes after it."""

    def __init__(self, after: list[Operator]) -> None:
        self.output_dependencies = after


@pytest.mark.parametrize("tasks", [1, stream.PIECE, stream.PIECE + 1, 60_000])
def test_tasks_are_handed_over_in_pieces_that_list_each_once(tasks: int) -> None:
    pieces = stream.tasks_source(tasks).get_read_tasks(1)
    assert len(pieces) == -(-tasks // stream.PIECE) <= 235
    ids = [number for piece in pieces for block in piece() for number in block["id"].to_pylist()]
    assert ids == list(range(tasks))


def test_tasks_are_listed_no_further_than_readers_need() -> None:
    waiting = SimpleNamespace(total_enqueued_input_blocks=lambda: stream.AHEAD - 1)
    readers = Operator([])
    source = Operator([readers])
    limit = stream.StayClose(None, {readers: waiting}, None)
    assert limit.can_add_input(source) and limit.max_task_output_bytes_to_read(source) is None
    waiting.total_enqueued_input_blocks = lambda: stream.AHEAD
    assert not limit.can_add_input(source) and limit.max_task_output_bytes_to_read(source) == 0
    assert limit.can_add_input(readers), "what readers have read is held back by its bytes, as ever"


@pytest.mark.parametrize("overrides, near", [({}, False), ({"data.window_shards": 2, "data.cache_gb": 1.0}, True)])
def test_readers_of_a_window_stay_where_their_rank_is(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, overrides: dict, near: bool
) -> None:
    import ray.data

    told: dict = {}
    dataset = SimpleNamespace(map_batches=lambda *_, **options: told.update(options))
    monkeypatch.setattr(ray.data, "read_datasource", lambda *_, **__: dataset)
    monkeypatch.setattr(stream, "preferably_here", lambda: "here")
    stream.build_dataset(make_config(overrides), 0, 1, 0)
    assert told.get("scheduling_strategy") == ("here" if near else None)
