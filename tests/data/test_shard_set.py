"""The reader: byte ranges, named errors, and `verify` finding each kind of damage."""

from __future__ import annotations

import dataclasses
import errno
import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.ranges import range_server

from mmref.data import sample_reader
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet, train_index
from mmref.errors import SampleError, ShardSetError, StorageError
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.sources.table import TableSource
from mmref.storage import retries
from mmref.storage.cache import ShardCache


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A packed set of 16 objects with one to four images, made once."""
    root = tmp_path_factory.mktemp("built")
    rows = []
    for number in range(16):
        for i in range(1 + number % 4):
            pixels = np.random.default_rng(10 * number + i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"{number}_{i}.png")
            rows.append({"image": f"{number}_{i}.png", "object_id": f"obj {number}", "captions": ["one", f"is {number}"]})
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = TableSource(str(root / "t.jsonl"), fractions={"train": 0.6, "test": 0.4})
    build_shards(source, str(root / "set"), BuildOptions(min_shards=3, pack=True, progress=False))
    return root / "set"


@pytest.fixture
def root(built, tmp_path):
    """A copy that a test may damage; packed files are left out so that nothing repairs it."""
    shutil.copytree(built, tmp_path / "set", ignore=shutil.ignore_patterns("*.gz"))
    return tmp_path / "set"


def edit_manifest(root, change):
    path = root / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_index_describes_objects_and_images(built):
    shards = ShardSet.open(str(built))
    assert shards.splits == ["train", "test"]
    index = shards.index("train")
    entry = shards.manifest["splits"]["train"]
    assert (len(index), index.n_objects) == (entry["images"], entry["objects"])
    assert index.object_start.dtype == np.int64 and index.object_row.dtype == np.int32
    assert index.object_start[0] == 0 and index.object_start[-1] == len(index)
    for row, name in enumerate(index.object_ids):
        images = range(index.object_start[row], index.object_start[row + 1])
        assert [index.image_ids[i] for i in images] == [f"{name[4:]}_{i}.png" for i in range(1 + int(name[4:]) % 4)]
        assert all(index.object_row[i] == row for i in images)
    assert shards.train_object_ids() == index.object_ids


def test_reader_survives_pickling_and_many_shards(built, monkeypatch):
    monkeypatch.setattr(sample_reader, "MAX_OPEN_FILES", 1)
    index = ShardSet.open(str(built)).index("train")
    assert len(index.shard_paths) == 3
    reader = SampleReader(index)
    first = [reader.read(i) for i in range(len(index))]
    copy = pickle.loads(pickle.dumps(reader))
    backwards = [copy.read(i) for i in reversed(range(len(index)))][::-1]
    assert backwards == first
    reader.close()
    assert reader.read(0) == first[0], "a closed reader opens its files again"
    for i, raw in enumerate(first):
        assert raw.meta["image_id"] == index.image_ids[i] and len(raw.meta["captions"]) == 2
        assert Image.open(io.BytesIO(raw.image_bytes)).size == (8, 8)


def test_a_set_that_is_replaced_is_not_read_half(built, tmp_path):
    """What a reader has open it reads on; it does not take the offsets of one set for those of another."""

    def build(word):
        lines = (built.parent / "t.jsonl").read_text().replace('"one"', f'"{word}"')
        (tmp_path / "t.jsonl").write_text(lines)
        source = TableSource(str(tmp_path / "t.jsonl"), image_root=str(built.parent), fractions={"train": 1.0})
        build_shards(source, str(tmp_path / "set"), BuildOptions(min_shards=3, overwrite=True, progress=False))
        return SampleReader(ShardSet.open(str(tmp_path / "set")).index("train"))

    reader = build("one")
    sizes = [os.path.getsize(path) for path in reader.index.shard_paths]
    last = len(reader.index) - 1
    first = reader.read(0)
    build("one")  # the same set again
    assert reader.read(last).meta["captions"][0] == "one"
    reader.close()
    assert reader.read(0) == first
    replaced = build("two")
    assert [os.path.getsize(path) for path in reader.index.shard_paths] == sizes, "nothing but the contents has changed"
    assert reader.read(0) == first
    with pytest.raises(ShardSetError, match=r"was replaced by another shard set while it was read: train/train-000002.tar"):
        reader.read(last)
    with pytest.raises(ShardSetError, match="was replaced"):
        pickle.loads(pickle.dumps(reader)).read(0)
    assert replaced.read(0).meta["captions"][0] == "two"
    shutil.rmtree(tmp_path / "set" / "train")
    with pytest.raises(ShardSetError, match="was replaced"):
        reader.read(last)


def test_set_is_readable_by_url(built):
    local, remote = ShardSet.open(str(built)), ShardSet.open(f"file://{built}")
    index = remote.index("test")
    assert index.shard_paths[0].startswith("file://")
    here, there = SampleReader(local.index("test")), SampleReader(index)
    assert [there.read(i) for i in range(len(index))] == [here.read(i) for i in range(len(index))]
    assert remote.train_object_ids() == local.train_object_ids()
    assert remote.verify() == []


def images_by_object(index):
    return {
        index.object_ids[row]: set(index.image_ids[first:last])
        for row, (first, last) in enumerate(zip(index.object_start[:-1], index.object_start[1:]))
    }


def test_a_part_of_the_objects_and_images_is_drawn(make_config):
    everything = images_by_object(train_index(make_config()))
    few, more = (images_by_object(train_index(make_config({"data.max_objects": n, "data.max_images": 2}))) for n in (5, 9))
    assert len(few) == 5 and len(more) == 9
    assert few.items() <= more.items(), "more objects are the fewer ones and others"
    for name, images in more.items():
        assert images <= everything[name] and len(images) == min(2, len(everything[name]))
    assert images_by_object(train_index(make_config({"data.max_objects": 5, "data.max_images": 2, "train.seed": 7}))) != few
    one = images_by_object(train_index(make_config({"data.max_images": 1})))
    two = images_by_object(train_index(make_config({"data.max_images": 2})))
    assert all(one[name] < two[name] or len(everything[name]) == 1 for name in everything)


def test_samples_of_a_part_are_those_of_the_whole(make_config):
    config = make_config({"data.max_objects": 6, "data.max_images": 2})
    part, whole = train_index(config), train_index(make_config())
    assert part.n_objects == 6 and part.object_start[-1] == len(part) < len(whole)
    reader, of_whole = SampleReader(part), SampleReader(whole)
    at = {image: place for place, image in enumerate(whole.image_ids)}
    for place, image in enumerate(part.image_ids):
        own, there = reader.read(place), of_whole.read(at[image])
        assert own.image_bytes == there.image_bytes and own.meta == there.meta
        assert own.meta["object_id"] == part.object_ids[part.object_row[place]]


def test_a_part_of_a_mixture_keeps_its_sets_apart(make_config, own_set):
    whole = train_index(make_config({"data.mix": {str(own_set): 0.5}}))
    part = train_index(make_config({"data.mix": {str(own_set): 0.5}, "data.max_objects": 15}))
    second = part.first_objects[1]
    assert set(part.object_ids[:second]) <= set(whole.object_ids[: whole.first_objects[1]])
    assert set(part.object_ids[second:]) <= set(whole.object_ids[whole.first_objects[1] :])
    assert 0 < second < part.n_objects == 15


def test_more_objects_than_there_are(make_config):
    with pytest.raises(ShardSetError, match=r"`data\.max_objects` is 99, but there are 14 objects"):
        train_index(make_config({"data.max_objects": 99}))


def test_open_errors(root, tmp_path):
    with pytest.raises(ShardSetError, match="mmref shards build"):
        ShardSet.open(str(tmp_path / "nowhere"))
    with pytest.raises(ShardSetError, match=r"no split 'val'. It has: train, test"):
        ShardSet.open(str(root)).index("val")
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(ShardSetError, match=r"is not JSON of a manifest .*expected an object, found list"):
        ShardSet.open(str(tmp_path))
    edit_manifest(root, lambda m: m.update(version=2))
    with pytest.raises(ShardSetError, match="version 2, this program reads version 1"):
        ShardSet.open(str(root))
    edit_manifest(root, lambda m: m.update(version=1, splits={}))
    with pytest.raises(ShardSetError, match="no splits"):
        ShardSet.open(str(root))
    (root / "manifest.json").write_text("{")
    with pytest.raises(ShardSetError, match="not JSON"):
        ShardSet.open(str(root))
    (root / "manifest.json").unlink()
    with pytest.raises(ShardSetError, match="did not finish"):
        ShardSet.open(str(root))


def damage_missing(root):
    (root / "train" / "train-000001.tar").unlink()


def damage_truncated(root):
    path = root / "train" / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:700])


def damage_byte(root):
    path = root / "test" / "test-000000.tar"
    data = bytearray(path.read_bytes())
    data[512 + 40] ^= 1  # inside the first image
    path.write_bytes(data)


def damage_count(root):
    edit_manifest(root, lambda m: m["splits"]["train"].update(captions=m["splits"]["train"]["captions"] + 1))


def damage_shard_count(root):
    edit_manifest(root, lambda m: m["splits"]["test"]["shards"][0].update(samples=99))


def damage_offset(root):
    path = root / "train" / "train.index.parquet"
    table = pq.read_table(path)
    offsets = table["image_offset"].to_pylist()
    offsets[2] += 512
    pq.write_table(table.set_column(table.column_names.index("image_offset"), "image_offset", [offsets]), path)


def damage_index(root):
    (root / "test" / "test.index.parquet").write_bytes(b"no")


def damage_objects(root):
    table = pq.read_table(root / "objects.parquet")
    names = ["other", *table["object_id"].to_pylist()[1:]]
    pq.write_table(pa.table({"object_id": names, "row": table["row"]}), root / "objects.parquet")


def damage_rows(root):
    """Two objects of test change their names, and all images are called alike."""
    path = root / "test" / "test.index.parquet"
    table = pq.read_table(path)
    names = sorted(set(table["object_id"].to_pylist()))
    swapped = {names[0]: names[1], names[1]: names[0]}
    ids = [swapped.get(name, name) for name in table["object_id"].to_pylist()]
    table = table.set_column(table.column_names.index("object_id"), "object_id", [ids])
    pq.write_table(table.set_column(table.column_names.index("image_id"), "image_id", [["zzz"] * len(table)]), path)


def damage_overlap(root):
    """The test split becomes a copy of train."""
    for path in (root / "train").iterdir():
        shutil.copy(path, root / "test" / path.name.replace("train", "test"))

    def change(manifest):
        shards = [{**s, "file": s["file"].replace("train", "test")} for s in manifest["splits"]["train"]["shards"]]
        manifest["splits"]["test"] = {**manifest["splits"]["train"], "shards": shards}

    edit_manifest(root, change)


@pytest.mark.parametrize(
    ("damage", "names", "where"),
    [
        (damage_missing, {"missing_shard"}, "train-000001.tar"),
        (damage_truncated, {"wrong_size", "wrong_checksum", "broken_tar"}, "train-000000.tar"),
        (damage_byte, {"wrong_checksum"}, "test-000000.tar"),
        (damage_count, {"wrong_count"}, "train"),
        (damage_shard_count, {"wrong_count"}, "test"),
        (damage_offset, {"wrong_offset"}, "train-000000.tar"),
        (damage_rows, {"wrong_row"}, "test-000000.tar"),
        (damage_index, {"broken_index"}, "test.index.parquet"),
        (damage_objects, {"wrong_objects"}, "objects.parquet"),
        (damage_overlap, {"split_overlap"}, "test"),
    ],
)
def test_verify_names_the_damage(root, damage, names, where):
    assert ShardSet.open(str(root)).verify() == []
    damage(root)
    problems = ShardSet.open(str(root)).verify()
    assert {problem.split(":")[0] for problem in problems} == names
    assert any(where in problem for problem in problems)


def test_verify_without_checksums_is_cheaper_and_blind_to_flipped_bytes(root):
    damage_byte(root)
    assert ShardSet.open(str(root)).verify(checksums=False) == []


@pytest.mark.parametrize("column", ["object_id", "image_id", "n_captions"])
def test_an_index_is_held_against_what_samples_say_of_themselves(root, column):
    path = root / "test" / "test.index.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[-1] = 9 if column == "n_captions" else "another"
    pq.write_table(table.set_column(table.column_names.index(column), column, [values]), path)
    shards = ShardSet.open(str(root))
    last = shards.index("test").n_objects - 1
    alone = np.count_nonzero(shards.index("test").object_row == last) == 1
    expected = ["wrong_count", "wrong_row"] if column == "n_captions" else ["wrong_row"] if column == "image_id" or alone else []
    assert [problem.split(":")[0] for problem in shards.verify()] == expected
    assert not [problem for problem in shards.verify(checksums=False) if problem.startswith("wrong_row")], "no sample is read"


@pytest.mark.parametrize(
    ("damage", "split", "message"),
    [
        (damage_missing, "train", "missing_shard.*train-000001.tar"),
        (damage_truncated, "train", "wrong_size.*has 700 bytes"),
        (damage_index, "test", "test.index.parquet cannot be read"),
    ],
)
def test_index_refuses_a_damaged_split(root, damage, split, message):
    damage(root)
    with pytest.raises(ShardSetError, match=message):
        ShardSet.open(str(root)).index(split)


def test_index_refuses_a_manifest_of_another_build(root):
    edit_manifest(root, lambda m: m["splits"]["train"].update(images=7))
    with pytest.raises(ShardSetError, match="manifest says 7 of"):
        ShardSet.open(str(root)).index("train")


def test_sample_errors_name_file_and_offset(root):
    index = ShardSet.open(str(root)).index("train")
    path = index.shard_paths[0]
    data = bytearray(open(path, "rb").read())
    data[index.json_offset[0]] = ord("x")
    with open(path, "wb") as file:
        file.write(data)
    with pytest.raises(SampleError, match=rf"{path}: json of '.*' at byte {index.json_offset[0]} is broken"):
        SampleReader(index).read(0)
    assert SampleReader(index).read(1).meta["captions"], "its neighbour is still fine"
    with open(path, "wb") as file:
        file.write(data[: index.image_offset[1] + 3])
    with pytest.raises(SampleError, match=rf"image at byte {index.image_offset[1]} is short: 3 of"):
        SampleReader(index).read(1)
    with pytest.raises(StorageError, match=r"cannot read /no/such.tar.*resumes"):  # that says nothing of the sample
        SampleReader(dataclasses.replace(index, shard_paths=["/no/such.tar"] * 3)).read(0)


def test_a_json_without_captions_is_a_sample_error(root):
    index = ShardSet.open(str(root)).index("train")
    path, text = index.shard_paths[0], b'{"captions": 3}'
    data = bytearray(open(path, "rb").read())
    data[index.json_offset[0] : index.json_offset[0] + index.json_size[0]] = text.ljust(index.json_size[0])
    with open(path, "wb") as file:
        file.write(data)
    with pytest.raises(SampleError, match="no list `captions`"):
        SampleReader(index).read_meta(0)


@pytest.fixture
def packed(built, tmp_path):
    """The set as it travels: no tars, only what is packed."""
    shutil.copytree(built, tmp_path / "packed", ignore=shutil.ignore_patterns("*.tar"))
    return tmp_path / "packed"


def test_packed_set_is_unpacked_once_also_by_several_at_a_time(packed, built):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: ShardSet.open(str(packed)), range(8)))
    assert found[0].verify() == []
    for path in built.rglob("*.tar"):
        assert (packed / path.relative_to(built)).read_bytes() == path.read_bytes()
    assert not list(packed.rglob(".unpack*"))
    before = {path: path.stat().st_mtime_ns for path in packed.rglob("*.tar")}
    ShardSet.open(str(packed))
    assert before == {path: path.stat().st_mtime_ns for path in packed.rglob("*.tar")}


def test_tars_of_a_packed_set_stay_whatever_their_times(built, tmp_path):
    """As they were built, and as copies that keep no times: nothing is written, also where nothing can be."""
    for path in built.rglob("*.tar"):
        assert path.stat().st_mtime_ns >= path.with_suffix(".tar.gz").stat().st_mtime_ns
    shutil.copytree(built, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.tar"):
        os.utime(path, (1, 1))
    before = {path: path.stat().st_ino for path in (tmp_path / "copy").rglob("*.tar")}
    assert ShardSet.open(str(tmp_path / "copy")).verify() == []
    assert before == {path: path.stat().st_ino for path in (tmp_path / "copy").rglob("*.tar")}


@pytest.mark.parametrize("server", [{}, {"ranges": False}, {"ranges": False, "length": False}], ids=str)
def test_a_set_behind_a_web_server(built, tmp_path, server):
    with range_server(built, **server) as url:
        shards = ShardSet.open(url)
        assert shards.verify() == []
        index, own = shards.index("train"), ShardSet.open(str(built)).index("train")
        reader = SampleReader(index, ShardCache(str(tmp_path), 10**9))
        assert reader.read(3).image_bytes == SampleReader(own).read(3).image_bytes
        path = built / "train" / "train-000000.tar"
        whole = path.read_bytes()
        try:
            path.write_bytes(whole[:-512])
            assert any("train-000000.tar" in problem for problem in ShardSet.open(url).verify())
            path.unlink()
            with pytest.raises(ShardSetError, match=r"missing_shard: http://.*/train-000000.tar does not exist"):
                ShardSet.open(url).index("train")
        finally:
            path.write_bytes(whole)


def test_shard_of_an_older_version_is_unpacked_again(packed):
    ShardSet.open(str(packed))
    stale = packed / "train" / "train-000000.tar"
    right = stale.read_bytes()
    stale.write_bytes(right[::-1])
    newer = stale.stat().st_mtime + 1
    os.utime(packed / "train" / "train-000000.tar.gz", (newer, newer))
    ShardSet.open(str(packed))
    assert stale.read_bytes() == right


def test_damaged_packed_shard(packed):
    path = packed / "train" / "train-000000.tar.gz"
    data = path.read_bytes()
    for broken in (data[: len(data) // 2], data[:200] + bytes([data[200] ^ 255]) + data[201:], b"no gzip"):
        path.write_bytes(broken)
        with pytest.raises(ShardSetError, match=r"train-000000.tar.gz"):
            ShardSet.open(str(packed))
    path.write_bytes(gzip.compress(b"another file"))
    with pytest.raises(ShardSetError, match="does not hold the shard"):
        ShardSet.open(str(packed))
    assert not list(packed.rglob(".unpack*"))


def test_verify_looks_at_what_travels_packed(packed):
    """Tars that lie unpacked already say nothing of the files beside them, which are what is sent on."""
    shards = ShardSet.open(str(packed))
    path = packed / "train" / "train-000000.tar.gz"
    whole, old = path.read_bytes(), path.stat().st_mtime - 100
    for broken in (whole[:100], b"no gzip", gzip.compress(b"another file")):
        path.write_bytes(broken)
        os.utime(path, (old, old))
        (problem,) = ShardSet.open(str(packed)).verify()
        assert problem.startswith(f"wrong_checksum: {path}")
        assert shards.verify(checksums=False) == []
    path.unlink()
    assert shards.verify(checksums=False) == shards.verify() == [f"missing_shard: {path} does not exist"]
    for left in packed.rglob("*.gz"):
        left.unlink()
    assert shards.verify() == [], "all of them may go once the set is unpacked"


def test_tars_are_plain_webdataset(built):
    for path in built.rglob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        assert {m.mtime for m in members} == {0} and {m.uid for m in members} == {0}
        for image, meta in zip(members[::2], members[1::2], strict=True):
            assert image.name.endswith(".png") and meta.name == image.name.removesuffix("png") + "json"
            assert image.name.count(".") == 1 and "/" not in image.name


def failing(call, code: int, times: int):
    """`call`, failing with an error code at first."""
    left = [times]

    def attempt(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return call(*args, **kwargs)

    return attempt


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.EMFILE])
@pytest.mark.parametrize("name", ["pread", "open", "dup"])
def test_a_mounted_file_system_that_fails_for_a_moment_costs_no_sample(root, monkeypatch, code, name):
    index = ShardSet.open(str(root)).index("train")
    expected = SampleReader(index).read(1)
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    reader = SampleReader(index)
    reader.read(0)
    if name == "open":
        reader.close()
    monkeypatch.setattr(os, name, failing(getattr(os, name), code, 3))
    assert reader.read(1) == expected
    monkeypatch.setattr(os, name, failing(getattr(os, name), code, 10**9))
    monkeypatch.setattr(retries, "PATIENCE_S", 0.01)
    with pytest.raises(StorageError, match=rf"cannot read {index.shard_paths[0]}.*resumes"):
        SampleReader(index).read(1)


def test_a_stale_descriptor_is_opened_again(root, monkeypatch):
    """As after an NFS server has come back: the old handle stays stale for ever, a new one works."""
    index = ShardSet.open(str(root)).index("train")
    expected = SampleReader(index).read(1)
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: None)
    reader, pread = SampleReader(index), os.pread
    reader.read(0)
    stale = {os.fstat(descriptor).st_ino for descriptor in reader._files.values()}
    opened = os.open

    def again(*args, **kwargs):
        stale.clear()
        return opened(*args, **kwargs)

    def read(descriptor, *args):
        if os.fstat(descriptor).st_ino in stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return pread(descriptor, *args)

    monkeypatch.setattr(os, "open", again)
    monkeypatch.setattr(os, "pread", read)
    assert reader.read(1) == expected
