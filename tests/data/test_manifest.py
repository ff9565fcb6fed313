"""A manifest that an enemy has written: what it names stays inside the set, what it claims is not believed."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmref.cli import main
from mmref.data.manifest import read_manifest
from mmref.data.shard_set import ShardSet
from mmref.errors import ShardSetError
from mmref.storage.locations import below


@pytest.fixture
def hostile(tiny_set, tmp_path):
    """(folder of a set of one's own, its manifest, a file of somebody else outside it)."""
    root = tmp_path / "set"
    shutil.copytree(tiny_set, root)
    victim = tmp_path / "victim.txt"
    victim.write_text("mine")
    return root, json.loads((root / "manifest.json").read_text()), victim


def rewrite(root, manifest):
    (root / "manifest.json").write_text(json.dumps(manifest))


NAMES = ["../victim.txt", "train/../../victim.txt", "{victim}", "./x.tar", "train//x.tar", "", "..", "file://{victim}", "a\\b",
         "x\0y"]  # fmt: skip


@pytest.mark.parametrize("field", ["file", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_names_outside_the_set_are_refused_and_nothing_is_written(hostile, field, name):
    root, manifest, victim = hostile
    shard = manifest["splits"]["train"]["shards"][0]
    data = b"theirs" * 100
    (root / "evil.gz").write_bytes(gzip.compress(data))
    shard |= {"packed": "evil.gz", "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    shard[field] = name.format(victim=victim)
    rewrite(root, manifest)
    with pytest.raises(ShardSetError, match="no name of a file below"):
        ShardSet.open(str(root))
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("linked", ["file", "folder"])
def test_links_out_of_the_set_are_refused(hostile, linked):
    root, manifest, victim = hostile
    if linked == "file":
        path = root / manifest["splits"]["train"]["shards"][0]["file"]
        path.unlink()
        path.symlink_to(victim)
    else:
        shutil.move(root / "train", root.parent / "elsewhere")
        (root / "train").symlink_to(root.parent / "elsewhere")
    with pytest.raises(ShardSetError, match="link that leads out of"):
        ShardSet.open(str(root))


@pytest.mark.parametrize("name", ["manifest.json", "objects.parquet", "train/train.index.parquet", "a shard", "a packed one"])
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_a_pipe_keeps_nobody_waiting(hostile, name, command, capsys):
    root, manifest, _ = hostile
    shard = manifest["splits"]["train"]["shards"][0]
    if name == "a packed one":
        shard["packed"] = f"{shard['file']}.gz"
        rewrite(root, manifest)
    path = root / {"a shard": shard["file"], "a packed one": f"{shard['file']}.gz"}.get(name, name)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert main(["shards", command, str(root)]) == 1
    assert f"{path} is no file but a pipe" in capsys.readouterr().err


def test_a_set_behind_a_link_is_a_set(hostile):
    root, _, _ = hostile
    (root.parent / "link").symlink_to(root)
    assert len(ShardSet.open(str(root.parent / "link")).index("train")) > 0


def test_an_archive_without_end_is_not_unpacked(hostile):
    root, manifest, _ = hostile
    shard = manifest["splits"]["train"]["shards"][0]
    os.unlink(root / shard["file"])
    with gzip.open(root / "bomb.gz", "wb", compresslevel=9) as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    shard |= {"packed": "bomb.gz", "bytes": 10}
    rewrite(root, manifest)
    written = []

    before = {p.name for p in (root / "train").iterdir()}
    real = os.unlink

    def seen(path, *args, **kwargs):
        if os.path.basename(str(path)).startswith(".unpack-"):
            written.append(os.path.getsize(path))
        return real(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", seen)
        with pytest.raises(ShardSetError, match="does not hold the shard that the manifest names"):
            ShardSet.open(str(root))
    assert written and written[0] <= 11 and {p.name for p in (root / "train").iterdir()} == before


@pytest.mark.parametrize("change, said", [
    (lambda m: [1], "expected an object, found list"), (lambda m: m["splits"].update(train=[]), "no list of shards"),
    (lambda m: m["splits"]["train"].update(images="9"), "number of images is '9'"),
    (lambda m: m["splits"]["train"].update(objects=-1), "number of objects is -1"),
    (lambda m: m["splits"]["train"]["shards"].append("x"), "a shard is 'x'"),
    (lambda m: m["splits"]["train"]["shards"][0].pop("sha256"), "`sha256` of a shard is None"),
    (lambda m: m["splits"]["train"]["shards"][0].update(bytes=True), "`bytes` of a shard is True"),
    (lambda m: m["splits"].update({"../train": m["splits"]["train"]}), "no folder of the set"),
    (lambda m: m["splits"].update({"..": m["splits"]["train"]}), "no name of a file below"),
])  # fmt: skip
def test_a_manifest_that_is_none_is_a_named_error(hostile, change, said):
    root, manifest, _ = hostile
    changed = change(manifest)
    rewrite(root, changed if isinstance(changed, list) else manifest)
    with pytest.raises(ShardSetError, match=said):
        ShardSet.open(str(root))


def test_a_manifest_nested_without_end_is_a_named_error(hostile):
    root, _, _ = hostile
    (root / "manifest.json").write_text("[" * 1_000_000)
    with pytest.raises(ShardSetError, match="is not JSON"):
        read_manifest(str(root))


@pytest.mark.parametrize("column, value", [("image_offset", -1), ("image_size", 1 << 40), ("json_size", -5), ("shard", 99),
                                           ("json_offset", (1 << 63) - 2), ("shard", -1)])  # fmt: skip
def test_an_index_that_points_outside_its_shards_is_refused(hostile, column, value):
    root, _, _ = hostile
    path = root / "train" / "train.index.parquet"
    table = pq.read_table(path)
    values = table[column].to_pylist()
    values[0] = value
    at = table.schema.get_field_index(column)
    pq.write_table(table.set_column(at, table.schema.field(column), pa.array(values, table.schema.field(column).type)), path)
    with pytest.raises(ShardSetError, match="points outside its shards"):
        ShardSet.open(str(root)).index("train")


def test_an_index_that_claims_more_rows_than_can_be_is_not_read(hostile, monkeypatch):
    root, manifest, _ = hostile
    path = root / "train" / "train.index.parquet"
    row = pq.read_table(path).slice(0, 1)
    with pq.ParquetWriter(path, row.schema, compression="zstd") as writer:
        writer.write_table(pa.concat_tables([row] * 100_000).combine_chunks())
    manifest["splits"]["train"] |= {"images": 100_000, "objects": 1}
    rewrite(root, manifest)
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(ShardSetError, match="100,000 rows, for which its shards have no room"):
        ShardSet.open(str(root)).index("train")


def test_names_below_a_root(tmp_path):
    (tmp_path / "a").mkdir()
    assert below(str(tmp_path), "a/b..tar") == str(tmp_path / "a" / "b..tar")
    assert below("s3://bucket/set/", "a/b") == "s3://bucket/set/a/b"
    with pytest.raises(ValueError, match="no name of a file"):
        below("s3://bucket/set", "../b")
