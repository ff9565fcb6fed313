"""How many requests samples behind a URL take, and which of them are made together."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from mmref.data import sample_reader
from mmref.data.sample_reader import FAR_GAP, RawSample, SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import SampleError
from mmref.evaluate.features import read_queries


@pytest.fixture
def remote(tiny_set: Path) -> Iterator[str]:
    """URL of a copy of the set."""
    fs, url = fsspec.filesystem("memory"), "memory://samples/set"
    for path in tiny_set.rglob("*"):
        if path.is_file():
            fs.pipe_file(f"/samples/set/{path.relative_to(tiny_set)}", path.read_bytes())
    yield url
    fs.rm("/samples", recursive=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The requests (URL, first byte, bytes) of readers."""
    requests: list[tuple[str, int, int]] = []
    read = sample_reader.read_bytes

    def noted(place: str, start: int = 0, size: int | None = None) -> bytes:
        if place.endswith(".tar"):
            requests.append((place, start, size or 0))
        return read(place, start, size)

    monkeypatch.setattr(sample_reader, "read_bytes", noted)
    return requests


def same(found: RawSample | SampleError, other: RawSample | SampleError) -> bool:
    return isinstance(found, RawSample) and found == other


def test_image_and_json_come_in_one_request_and_neighbors_with_them(
    tiny_set: Path, remote: str, asked: list[tuple[str, int, int]]
) -> None:
    local = SampleReader(ShardSet.open(str(tiny_set)).index("train"))
    index = ShardSet.open(remote).index("train")
    reader = SampleReader(index)
    assert same(reader.read(3), local.read(3)) and len(asked) == 1
    asked.clear()
    rows = list(range(len(index)))[::-1]
    assert all(map(same, reader.read_all(rows), local.read_all(rows)))
    shards = len(index.shard_paths)
    assert shards > 1 and len(asked) == shards, "a tar is shorter than what is read between two samples"
    asked.clear()
    assert read_queries(index, reader).texts == read_queries(local.index, local).texts
    assert len(asked) == shards and max(index.image_size) < FAR_GAP, "and so do the captions of a split"


def test_requests_are_made_together(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ShardSet.open(remote).index("train")
    both, read = threading.Barrier(2, timeout=30), sample_reader.read_bytes

    def met(place: str, start: int = 0, size: int | None = None) -> bytes:
        both.wait()  # raises where nobody else comes
        return read(place, start, size)

    first = [int((index.shard == shard).argmax()) for shard in (0, 1)]
    monkeypatch.setattr(sample_reader, "read_bytes", met)
    assert all(isinstance(found, RawSample) for found in SampleReader(index).read_all(first))


def test_what_is_broken_is_told_of_its_sample_alone(remote: str) -> None:
    index = ShardSet.open(remote).index("train")
    fs, last = fsspec.filesystem("memory"), int(index.image_offset[index.shard == 0].argmax())
    name = index.shard_paths[0].removeprefix("memory:/")
    data = bytearray(fs.cat_file(name))
    at = int(index.json_offset[1])
    data[at : at + 1] = b"?"
    fs.pipe_file(name, bytes(data[: int(index.image_offset[last]) + 1]))
    rows = [i for i in range(len(index)) if index.shard[i] == 0]
    found = dict(zip(rows, SampleReader(index).read_all(rows)))
    broken = {i: str(sample) for i, sample in found.items() if isinstance(sample, SampleError)}
    assert {1, last} <= broken.keys() and len(broken) < len(rows)
    assert "is broken" in broken[1] and f"image at byte {index.image_offset[last]} is short: 1 of" in broken[last]
    with pytest.raises(SampleError, match="is short"):
        SampleReader(index).read(last)
    metas = list(SampleReader(index).read_metas(rows))
    assert all(isinstance(meta, dict) and json.dumps(meta) for i, meta in zip(rows, metas) if i not in broken)
