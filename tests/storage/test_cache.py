"""The node's cache of shards: bounded, whole or absent, one download however many ask."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest
from support.ranges import range_server

from mmref.data import sample_reader
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import ShardSetError, StorageError
from mmref.storage import locks, retries
from mmref.storage.cache import ShardCache


@pytest.fixture
def remote(tmp_path: Path) -> list[str]:
    """Six files of 1000 bytes behind URLs."""
    folder = tmp_path / "remote"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.tar").write_bytes(bytes([i]) * 1000)
    return [f"file://{folder}/{i}.tar" for i in range(6)]


def content(path: str) -> bytes:
    return Path(path).read_bytes()


def shards_in(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.endswith(".tar")]


def test_a_shard_is_fetched_once(remote: list[str], tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    for _ in range(3):
        for i, url in enumerate(remote):
            assert content(cache.path(url)) == bytes([i]) * 1000
    assert len(cache.fetches()) == 6
    assert ShardCache(str(tmp_path / "cache"), 10_000).path(remote[0]) and len(cache.fetches()) == 6


def test_it_stays_within_its_bound_and_drops_what_was_unused_for_longest(remote: list[str], tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 3_500)
    for number, url in enumerate([*remote[:3], remote[0], remote[3]]):
        path = cache.path(url)
        os.utime(path, (number, number))  # the clock is too coarse for the test
        assert sum(p.stat().st_size for p in shards_in(cache.folder)) <= 3_500
    kept = {p.name.split("-", 1)[1] for p in shards_in(cache.folder)}
    assert kept == {"0.tar", "2.tar", "3.tar"}


def test_a_shard_that_goes_stays_readable_where_it_is_open(remote: list[str], tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 1_500)
    path = cache.path(remote[1])
    descriptor = os.open(path, os.O_RDONLY)
    cache.path(remote[2])
    assert not os.path.exists(path)
    assert os.pread(descriptor, 1000, 0) == bytes([1]) * 1000
    os.close(descriptor)


def test_what_a_crash_cut_short_is_not_used_and_goes(remote: list[str], tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    name = Path(cache.path(remote[0])).name
    (cache.folder / name).rename(cache.folder / f"{name}.part-999999999")  # as left by a process that is gone
    (cache.folder / f"{name}.part-999999999").write_bytes(b"half")
    assert content(cache.path(remote[0])) == bytes(1000)
    assert not list(cache.folder.glob("*.part-*"))


def test_what_else_lies_in_the_folder_stays_and_does_not_count(remote: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    (folder / "project").mkdir(parents=True)
    (folder / "model.ckpt").write_bytes(bytes(5_000))
    cache = ShardCache(str(folder), 2_500)
    for url in remote:
        cache.path(url)
    assert len(shards_in(folder)) == 2 and (folder / "model.ckpt").stat().st_size == 5_000 and (folder / "project").is_dir()


def test_a_signed_url_has_one_copy_whoever_signs_it(tmp_path: Path) -> None:
    name = "ä" * 60 + ".tar"
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / name).write_bytes(b"shard")
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    with range_server(tmp_path / "files") as url:
        signed = [f"{url}/{quote(name)}?X-Amz-Algorithm=AWS4&X-Amz-Signature={letter * 300}" for letter in "ab"]
        first, second = (cache.path(each) for each in signed)
    assert content(first) == b"shard" and first == second and "Amz" not in first


def test_a_server_that_tells_no_length(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for i in range(3):
        (tmp_path / "files" / f"{i}.tar").write_bytes(bytes([i]) * 1000)
    cache = ShardCache(str(tmp_path / "cache"), 2_500)
    with range_server(tmp_path / "files", ranges=False, length=False) as url:
        for i in range(3):
            assert content(cache.path(f"{url}/{i}.tar")) == bytes([i]) * 1000
        assert len(shards_in(cache.folder)) == 2
        with pytest.raises(ShardSetError, match=r"1,000 bytes.*999.*data.cache_gb"):
            ShardCache(str(tmp_path / "small"), 999).path(f"{url}/0.tar")
    assert not list((tmp_path / "small").glob("*.part-*"))


def test_a_file_system_without_locks(remote: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", refused)
    cache = ShardCache(str(tmp_path / "cache"), 10_000)
    with ThreadPoolExecutor(4) as pool:
        assert [content(path) for path in pool.map(cache.path, remote)] == [bytes([i]) * 1000 for i in range(6)]
    with locks.one_at_a_time(tmp_path / "lock") as alone:
        assert not alone


def test_a_shard_larger_than_the_cache_is_a_named_error(remote: list[str], tmp_path: Path) -> None:
    with pytest.raises(ShardSetError, match=r"1,000 bytes.*999.*data.cache_gb"):
        ShardCache(str(tmp_path / "cache"), 999).path(remote[0])


def test_storage_that_fails_for_a_moment_is_asked_again(
    remote: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    fs = fsspec.filesystem("file")
    failures = iter([True, True, False])
    get_file = fs.get_file

    def flaky(*args):
        if next(failures):
            raise OSError("connection reset")
        get_file(*args)

    monkeypatch.setattr(fs, "get_file", flaky)
    assert content(ShardCache(str(tmp_path / "cache"), 10_000).path(remote[4])) == bytes([4]) * 1000
    monkeypatch.setattr(fs, "get_file", lambda *args: (_ for _ in ()).throw(OSError("down")))
    monkeypatch.setattr(retries, "PATIENCE_S", 0.0)
    with pytest.raises(StorageError, match=r"cannot read .*down"):
        ShardCache(str(tmp_path / "cache"), 10_000).path(remote[5])


def test_an_outage_is_no_broken_sample(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another image in its place would be another run; and a shard that makes room for others meanwhile is fetched again."""
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(retries, "PATIENCE_S", 0.0)
    fs = fsspec.filesystem("memory")
    index = ShardSet.open(str(tiny_set)).index("train")
    urls = []
    for path in index.shard_paths:
        urls.append(f"memory://set/{Path(path).name}")
        fs.pipe(urls[-1], Path(path).read_bytes())
    remote = dataclasses.replace(index, shard_paths=urls)
    expected = SampleReader(index).read(0)
    assert SampleReader(remote).read(0) == expected
    cache = ShardCache(str(tmp_path / "cache"), 10_000_000)
    path, evicted = cache.path, []

    def then_evicted(*args: str) -> str:
        found = path(*args)
        if not evicted:
            evicted.append(os.unlink(found))
        return found

    monkeypatch.setattr(cache, "path", then_evicted)
    assert SampleReader(remote, cache).read(0) == expected and evicted
    monkeypatch.setattr(type(fs), "cat_file", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("down")))
    monkeypatch.setattr(type(fs), "get_file", lambda *args, **kwargs: (_ for _ in ()).throw(ConnectionError("down")))
    for reader in (SampleReader(remote), SampleReader(remote, ShardCache(str(tmp_path / "other"), 10_000_000))):
        with pytest.raises(StorageError, match=r"cannot read memory://set/.*down"):
            reader.read(0)
    monkeypatch.setattr(type(fs), "cat_file", lambda *args, **kwargs: (_ for _ in ()).throw(PermissionError("expired")))
    with pytest.raises(StorageError, match=r"cannot read memory://set/.*expired.*resumes"):
        SampleReader(remote).read(0)


def test_a_shard_that_was_built_anew_is_fetched_again(tiny_set: Path, tmp_path: Path) -> None:
    """By its digest in the manifest: the place is the same."""
    index = ShardSet.open(str(tiny_set)).index("train")
    assert len(index.shard_sha256) == len(index.shard_paths)
    fs = fsspec.filesystem("memory")
    urls = [f"memory://anew/{Path(path).name}" for path in index.shard_paths]
    remote = dataclasses.replace(index, shard_paths=urls)
    cache = ShardCache(str(tmp_path / "cache"), 10_000_000)
    for url in urls:
        fs.pipe(url, b"an older version")
        cache.path(url, "its digest")
    for url, path in zip(urls, index.shard_paths, strict=True):
        fs.pipe(url, Path(path).read_bytes())
    assert SampleReader(remote, cache).read(0) == SampleReader(index).read(0)


def test_threads_share_a_reader_of_more_shards_than_it_holds_open(tiny_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does one close what another reads, nor are files left open."""
    monkeypatch.setattr(sample_reader, "MAX_OPEN_FILES", 1)
    index = ShardSet.open(str(tiny_set)).index("train")
    assert len(index.shard_paths) > 1
    reader, expected = SampleReader(index), [SampleReader(index).read(i) for i in range(len(index))]
    before = len(os.listdir("/proc/self/fd"))
    order = [i for _ in range(20) for i in range(len(index))]
    with ThreadPoolExecutor(8) as pool:
        for i, found in zip(order, pool.map(reader.read, order)):
            assert found == expected[i]
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def read_all(folder: str, urls: list[str], out) -> None:  # type: ignore[no-untyped-def]
    cache = ShardCache(folder, 4_500)
    out.put(all(set(content(cache.path(u))) == {int(u[-5])} for _ in range(5) for u in urls[:4]))


def test_processes_of_a_node_share_the_downloads(remote: list[str], tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    readers = [context.Process(target=read_all, args=(str(tmp_path / "cache"), remote, out)) for _ in range(3)]
    for reader in readers:
        reader.start()
    assert [out.get(timeout=120) for _ in readers] == [True] * 3
    for reader in readers:
        reader.join(60)
    assert len(ShardCache(str(tmp_path / "cache"), 4_500).fetches()) == 4
