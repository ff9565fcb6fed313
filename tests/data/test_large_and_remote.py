"""Sets that do not fit: ten million samples, object storage, several sets in turns."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.s3 import s3_server
from support.tiny_set import SPLITS, TinySource, build_tiny_set

from mmref.config import Config
from mmref.data import columns, shard_checks
from mmref.data.reader import Batch, StepReader, concatenate
from mmref.data.sample_reader import INDEX_ARRAYS, Ends, SplitIndex
from mmref.data.shard_set import ShardSet, train_index
from mmref.errors import ConfigError, ShardSetError, StorageError
from mmref.storage import locks
from mmref.storage.cache import ShardCache
from mmref.storage.parquet import parquet_batches
from mmref.train.trainer import check_inputs

MakeConfig = Callable[..., Config]


def same(a: Batch, b: Batch) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_mapped_index_is_the_one_in_memory(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig
) -> None:
    plain = ShardSet.open(str(tiny_set)).index("train")
    batch = StepReader(make_config()).read_step(3)
    monkeypatch.setattr(columns, "IN_MEMORY_ROWS", 5)
    monkeypatch.setenv("MMREF_CACHE", str(tmp_path))
    for _ in range(2):  # written, then found
        mapped = ShardSet.open(str(tiny_set)).index("train")
        assert isinstance(mapped.image_offset, np.memmap)
        for name in ("object_row", "shard", "image_offset", "json_size", "object_start", "n_captions"):
            assert np.array_equal(getattr(mapped, name), getattr(plain, name)), name
        for name in ("object_ids", "image_ids", "keys", "image_ext"):
            assert list(getattr(mapped, name)) == list(getattr(plain, name)), name
        assert mapped.image_ids[-1] == plain.image_ids[-1] and mapped.keys[2:4] == plain.keys[2:4]
    assert same(StepReader(make_config()).read_step(3), batch)
    assert len([p for p in (tmp_path / "indexes").iterdir() if not p.name.startswith(".")]) == 1


def test_a_cache_folder_that_is_of_no_use_is_not_laid_on_the_set(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "IN_MEMORY_ROWS", 5)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MMREF_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"file/indexes.* cannot be written: Not a directory.*MMREF_CACHE"):
        ShardSet.open(str(tiny_set)).index("train")


def test_without_locks_several_make_the_copy_and_one_stays(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refused)
    monkeypatch.setattr(columns, "IN_MEMORY_ROWS", 5)
    monkeypatch.setenv("MMREF_CACHE", str(tmp_path))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: ShardSet.open(str(tiny_set)).index("train"), range(12)))
    assert {index.image_ids[-1] for index in found} == {found[0].image_ids[-1]}
    assert len([p for p in (tmp_path / "indexes").iterdir() if not p.name.startswith(".")]) == 1
    assert not [p for p in (tmp_path / "indexes").iterdir() if p.is_dir() and p.name.startswith(".")]


OPENING = """
import os, sys
from mmref.data import columns, shard_checks
from mmref.data.shard_set import ShardSet
columns.IN_MEMORY_ROWS = 5
write_out = columns._write_out
def counted(*args):
    os.write(2, b"written ")  # one call, so that lines of several processes do not mix
    write_out(*args)
columns._write_out = counted
index = ShardSet.open(sys.argv[1]).index("train")
print(len(index), index.object_ids[0], index.keys[len(index) - 1])
"""


def test_one_process_of_a_node_writes_its_copy_of_an_index(tiny_set: Path, tmp_path: Path) -> None:
    cache = tmp_path / "indexes"
    cache.mkdir()
    root, path = str(tiny_set), f"{tiny_set}/train/train.index.parquet"
    own = hashlib.sha256(path.encode()).hexdigest()[:16]
    (cache / f"{own}-0123456789abcdef").mkdir()  # of what lay there before
    (cache / f".{own}-torn").mkdir()  # of a process that was killed
    (cache / "0123456789abcdef-0123456789abcdef").mkdir()  # of another set
    environment = {"MMREF_CACHE": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", OPENING, root]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)
    ]
    done = [process.communicate() for process in running]
    assert len({out for out, _ in done}) == 1 and done[0][0].split(), done
    assert sum(error.count("written") for _, error in done) == 1
    folders = sorted(p.name for p in cache.iterdir() if p.is_dir())
    assert len(folders) == 2 and "0123456789abcdef-0123456789abcdef" in folders


def test_shards_of_a_large_set_are_looked_at_once_a_node(
    own_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: MakeConfig
) -> None:
    looked: list[str] = []
    size_of = shard_checks.size_of

    def counted(place: str) -> int | None:
        looked.append(place)
        return size_of(place)

    monkeypatch.setattr(shard_checks, "size_of", counted)
    monkeypatch.setattr(shard_checks, "MANY", 1)
    monkeypatch.setenv("MMREF_CACHE", str(tmp_path / "cache"))
    shards = ShardSet.open(str(own_set))
    paths = shards.shard_paths("train")
    for _ in range(3):
        ShardSet.open(str(own_set)).index("train")
    assert sorted(looked) == sorted(paths)
    manifest = json.loads((own_set / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["bytes"] += 512  # another set
    (own_set / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardSetError, match="wrong_size"):
        ShardSet.open(str(own_set)).index("train")


@pytest.mark.parametrize("rows", [[0, 0, 2], [1, 1, 2], [0, 1, 0], [-1, 0, 1]])
@pytest.mark.parametrize("mapped", [False, True])
def test_rows_out_of_order_and_outside_of_shards_are_found(
    rows: list[int], mapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "IN_MEMORY_ROWS", 0 if mapped else 5)
    monkeypatch.setattr(columns, "parquet_batches", lambda file, names: parquet_batches(file, names, 1))  # across batches
    monkeypatch.setenv("MMREF_CACHE", str(tmp_path / "cache"))
    text, number = pa.array(["a", "b", "c"]), np.array([0, 10, 20])

    def write(object_row: list[int], image_offset: np.ndarray) -> str:
        names = dict.fromkeys(("object_id", "image_id", "key", "image_ext"), text)
        numbers = dict.fromkeys(INDEX_ARRAYS, number * 0) | {"object_row": object_row, "image_offset": image_offset}
        pq.write_table(pa.table({**names, **numbers}), tmp_path / "i.parquet")
        return str(tmp_path / "i.parquet")

    ends = Ends(np.array([10_000]), np.array([10_000]))
    index = SplitIndex.from_parquet(write([0, 0, 1], number), "train", ["x.tar"], ends)
    assert index.object_start.tolist() == [0, 2, 3] and list(index.object_ids) == ["a", "c"]
    with pytest.raises(ShardSetError, match="object rows are not 0, 1, 2"):
        SplitIndex.from_parquet(write(rows, number), "train", ["x.tar"], ends)
    for offset in (-1, 10_001):
        with pytest.raises(ShardSetError, match="points outside its shards"):
            SplitIndex.from_parquet(write([0, 1, 1], np.array([0, 0, offset])), "train", ["x.tar"], ends)
    with pytest.raises(ValueError, match="no room"):
        SplitIndex.from_parquet(write([0, 1, 1], number), "train", ["x.tar"], Ends(np.array([2048]), np.array([2048])))
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_dir() and p.name.startswith(".")], "what failed is cleared"


def test_sets_take_turns(tiny_set: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    other = build_tiny_set(tmp_path / "other", TinySource("other", first=500))
    config = make_config({"data.mix": {str(other): 0.25}})
    reader = StepReader(config)
    assert reader.index.n_objects == 2 * SPLITS["train"]
    alone = StepReader(make_config(root=other))
    names = list(reader.index.object_ids)
    assert names[SPLITS["train"] :] == [f"other/{name}" for name in alone.index.object_ids]
    from_other = 0
    for step in range(40):
        batch = reader.read_step(step)
        part, own = reader.plan.turn(step)  # type: ignore[union-attr]
        from_other += part
        assert (batch["object"] >= SPLITS["train"]).all() == bool(part)
        if part:  # the samples of the other set, in its own order
            expected = alone.read_step(own)
            assert np.array_equal(batch["image"], expected["image"])
            assert np.array_equal(batch["object"] - SPLITS["train"], expected["object"])
        halves = [StepReader(config, rank, 2).read_step(step) for rank in (0, 1)] if step % 13 == 0 else [batch]
        assert same(concatenate(halves), batch)
    assert 4 <= from_other <= 16
    # sets of one name, as all that are built of tables are, are told apart by their folders
    twins = [build_tiny_set(tmp_path / name / "set", TinySource("table", first=500)) for name in ("a", "b")]
    with pytest.raises(ShardSetError, match=r"two sets of one name, set, set"):
        train_index(make_config({"data.mix": dict.fromkeys(map(str, twins), 0.25)}))
    bags = str(twins[1].rename(tmp_path / "bags"))
    ids = list(train_index(make_config({"data.mix": {str(twins[0]): 0.25, bags: 0.25}})).object_ids)
    assert len(set(ids)) == len(ids) == 3 * SPLITS["train"] and ids[-1].startswith("bags/thing.")
    with pytest.raises(ConfigError, match=r"data\.mix"):
        make_config({"data.mix": {str(other): 1.0}})
    with pytest.raises(ShardSetError, match="No complete shard set"):
        check_inputs(make_config({"data.mix": {str(tmp_path / "nowhere"): 0.5}}))


def test_a_set_on_s3_is_read_by_ranges_and_through_the_cache(tiny_set: Path, tmp_path: Path, make_config: MakeConfig) -> None:
    local = make_config({"data.window_shards": 1})
    expected = [StepReader(local).read_step(step) for step in range(6)]
    epoch = StepReader(local).plan.steps_per_epoch  # type: ignore[union-attr]
    with s3_server() as bucket:
        fsspec.filesystem("s3").put(str(tiny_set), f"{bucket}/set", recursive=True)
        ranges = StepReader(make_config({"data.root": f"{bucket}/set", "data.window_shards": 1}))
        assert all(same(ranges.read_step(step), expected[step]) for step in range(2))
        cache = {"data.cache_gb": 1e-3, "data.cache_dir": str(tmp_path / "cache")}
        config = make_config({"data.root": f"{bucket}/set", "data.window_shards": 1, **cache})
        check_inputs(config)
        for rank in (0, 1):  # two workers of one node
            reader = StepReader(config, rank, 2)
            for step in range(6):
                own = {name: column[rank * 4 : rank * 4 + 4] for name, column in expected[step].items()}
                assert same(reader.read_step(step), own)
        shards = ShardSet.open(str(tiny_set)).manifest["splits"]["train"]["shards"]
        assert epoch <= 6 and len(ShardCache(str(tmp_path / "cache"), 10**6).fetches()) == len(shards)


TEN_MILLION = """
import resource, sys, time
import numpy as np
from mmref.data.plan import Plan, ShuffledOrder, WindowedOrder
from mmref.data.sample_reader import SplitIndex
from mmref.data.shard_set import train_index

def private_mb():  # of its own: not what is mapped from files
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) / 1024

before = private_mb()
began = time.perf_counter()
index = SplitIndex.from_parquet(sys.argv[1], "train", ["a.tar"] * 1000)
opened = time.perf_counter() - began
start = np.append(np.flatnonzero(np.diff(index.shard[index.object_start[:-1]], prepend=-1)), index.n_objects)
for order in (None, WindowedOrder(start, 8, 0)):
    plan = Plan(index.object_start, 128, 2, 0, order)
    for step in (0, 123_456_789):
        began = time.perf_counter()
        planned = plan(step)
        rows = [(index.image_offset[i], index.keys[i]) for i in planned.images.tolist()]
        print(f"{'window' if order else 'whole set'} step {step}: {1000 * (time.perf_counter() - began):.0f} ms")
        assert len(rows) == 256 and len(set(planned.objects.tolist())) == 128
grown = private_mb() - before
print(f"opened in {opened:.1f} s, {grown:.0f} MB private")
assert len(index) == 10_000_000 and index.object_ids[999_999] == "object-999999"
assert grown < 400, grown
"""


@pytest.mark.slow
def test_ten_million_samples_open_at_any_step(tmp_path: Path) -> None:
    """Private memory of a process stays far below the gigabyte of the index, and any step is there at once."""
    schema = pa.schema([
        ("object_row", pa.int32()), ("object_id", pa.string()), ("image_id", pa.string()), ("key", pa.string()),
        ("shard", pa.int32()), ("image_offset", pa.int64()), ("image_size", pa.int64()), ("image_ext", pa.string()),
        ("json_offset", pa.int64()), ("json_size", pa.int64()), ("n_captions", pa.int32()),
    ])  # fmt: skip
    path = tmp_path / "train.index.parquet"
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, 10_000_000, 500_000):
            image = np.arange(first, first + 500_000)
            names = pa.array([f"image-{i}" for i in image.tolist()])
            writer.write_table(pa.table({
                "object_row": (image // 10).astype(np.int32), "object_id": [f"object-{i // 10}" for i in image.tolist()],
                "image_id": names, "key": names, "shard": (image // 10_000).astype(np.int32),
                "image_offset": image % 10_000 * 50_000, "image_size": np.full(len(image), 40_000),
                "image_ext": ["jpg"] * len(image), "json_offset": image % 10_000 * 50_000 + 41_000,
                "json_size": np.full(len(image), 300), "n_captions": np.full(len(image), 2, np.int32),
            }, schema=schema))  # fmt: skip
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    for _ in range(2):  # the first opening writes the node's copy
        done = subprocess.run(
            [sys.executable, "-c", TEN_MILLION, str(path)], env=environment, capture_output=True, text=True, check=False
        )
        print(done.stdout)
        assert done.returncode == 0, done.stderr
