"""Rows on their way to the tars: the same set whether they fit into memory or not, and every contradiction found."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mmref.errors import SourceError
from mmref.shards import spool as module
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.index_parts import PART_SCHEMA, IndexWriter
from mmref.shards.left_out import kind_of
from mmref.shards.rows import source_rows
from mmref.shards.samples import SourceImage, SourceObject, hash_fraction
from mmref.shards.sources.table import TableSource
from mmref.shards.spool import Spool, read_objects
from mmref.storage import tables, texts
from mmref.storage.parquet import read_parquet

Table = Callable[..., Path]


class Drawn:
    """Objects of random sizes, whose images are tiny pictures or broken."""

    name, licence, origin, min_images = "drawn", "none", "nowhere", 1

    def __init__(self, encode: Callable[[int], bytes], objects: int) -> None:
        self.encode, self.count, self.skipped = encode, objects, ["a: no such thing"]

    def objects(self) -> Iterator[SourceObject]:
        sizes = np.random.default_rng(1).integers(1, 6, self.count)
        for number, size in enumerate(sizes.tolist()):
            images = [SourceImage(f"{number}/{i}", (number, i), [f"{number} é"], ["k"], {"n": i}) for i in range(size)]
            yield SourceObject(("train", "val")[number % 3 == 0], f"object {number}", images)

    def load(self, ref: tuple[int, int]) -> bytes:
        return b"" if ref[0] % 17 == 0 else self.encode(ref[0])

    def write_extras(self, root: str) -> None:
        pass


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def spill_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BUFFER_BYTES", 1000)
    monkeypatch.setattr(module, "GROUP_ROWS", 7)
    monkeypatch.setattr(tables, "line_blocks", lambda place, wrong, size=0: texts.line_blocks(place, wrong, 300))


def test_a_table_that_does_not_fit_into_memory(
    build_table: Table, make_table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = make_table(60)
    rows = table.read_text().splitlines()
    again = [json.dumps({**json.loads(row), "name": "seen again", "image": "./" + json.loads(row)["image"]}) for row in rows[::4]]
    table.write_text("\n".join([*rows, *again]))
    whole = contents(build_table("whole", table))
    spill_early(monkeypatch)
    assert contents(build_table("spilled", table)) == whole
    assert not any("spool" in path.name for path in tmp_path.rglob("*"))
    assert sum(json.loads(whole["manifest.json"])["splits"][s]["captions"] for s in ("train", "val", "test")) == 180 * 2 + 45 * 2


def test_more_parts_than_files_may_be_open(
    encode: Callable[[int], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 are the limit of a Mac, and rows of a large set go into as many parts, each of them several times."""
    spill_early(monkeypatch)
    monkeypatch.setattr("mmref.shards.rows.TOGETHER", 100)
    spool = Spool(tmp_path / "spool", merges=False)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as file:
        highest = max(file.fileno(), *(int(name) for name in os.listdir("/dev/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, limits[1]))
    try:
        for table in source_rows(Drawn(encode, 900)):
            spool.add(table)
        assert len(list((tmp_path / "spool").iterdir())) > 200
        assert spool.settle() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert sum(split.objects for split in spool.splits.values()) == 900


def test_a_source_of_objects_that_does_not_fit_into_memory(
    encode: Callable[[int], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BuildOptions(progress=False, samples_per_shard=9, min_shards=1)
    manifest = build_shards(Drawn(encode, 80), str(tmp_path / "whole"), options)
    whole = contents(tmp_path / "whole")
    spill_early(monkeypatch)
    monkeypatch.setattr("mmref.shards.rows.TOGETHER", 10)
    monkeypatch.setattr("mmref.shards.index_parts.GROUP_ROWS", 10**9)
    build_shards(Drawn(encode, 80), str(tmp_path / "spilled"), options)
    assert contents(tmp_path / "spilled") == whole
    lines = [json.loads(line) for line in whole["left_out.jsonl"].decode().splitlines()]
    assert len(lines) == manifest["skipped"]["count"] == sum(manifest["skipped"]["kinds"].values()) > 5
    assert lines[0] == {"kind": "other", "left_out": "a: no such thing"}
    assert manifest["skipped"]["kinds"] == {"does not decode": len(lines) - 1, "other": 1}


def test_half_a_character_costs_its_image_alone(encode: Callable[[int], bytes]) -> None:
    source = Drawn(encode, 3)
    objects = list(source.objects())
    objects[1].images[0].captions.append("half \ud83d")
    source.objects = lambda: iter(objects)  # type: ignore[method-assign]
    (table,) = source_rows(source)
    assert len(table) == sum(len(item.images) for item in objects) - 1
    assert source.skipped[1:] == [line for line in source.skipped if line.startswith("'1/0': a text cannot be written")]
    assert len(source.skipped) == 2


@pytest.mark.parametrize("early", [False, True])
def test_contradictions_far_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool) -> None:
    if early:
        spill_early(monkeypatch)
    rows = [f"{i}.png,o{i % 50},x,train" for i in range(200)]
    for line, said in [
        ("7.png,o8,x,train", "row 202: image '7.png' belongs to the objects 'o7' and 'o8'"),
        ("./7.png,o8,x,train", "row 202: image './7.png' belongs to the objects 'o7' and 'o8'"),
        ("new.png,o8,x,val", "row 202: object 'o8' is in 'train' and in 'val'"),
    ]:
        # one contradiction more behind it: the first is told
        (tmp_path / "t.csv").write_text("image,object_id,caption,split\n" + "\n".join([*rows, line, "9.png,o8,x,val", ""]))
        with pytest.raises(SourceError, match=said):
            build_shards(TableSource(str(tmp_path / "t.csv")), str(tmp_path / "set"), BuildOptions(progress=False))
        with pytest.raises(SourceError, match=said):
            TableSource(str(tmp_path / "t.csv")).objects()


def test_shards_are_cut_as_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill_early(monkeypatch)
    source = Drawn(lambda seed: b"", 200)
    objects = [item for item in source.objects() if item.split == "train"]
    objects.sort(key=lambda item: (hash_fraction(item.object_id), item.object_id))
    images = sum(len(item.images) for item in objects)
    spool = Spool(tmp_path / "spool", merges=False)
    for table in source_rows(source):
        spool.add(table)
    assert spool.settle() is None
    for count in (1, 2, 7, len(objects)):
        expected: list[list[SourceObject]] = [[] for _ in range(count)]
        done = 0
        for position, item in enumerate(objects):
            expected[max(min(done * count // images, count - 1), count - (len(objects) - position), 0)].append(item)
            done += len(item.images)
        assert [list(read_objects(spans)) for spans in spool.cut("train", count)] == [shard for shard in expected if shard]
    flat = [image for item in objects for image in item.images]
    assert [item.images[0] for item in spool.sample("train", 11)] == flat[::11]


def test_object_rows_go_on_from_shard_to_shard(tmp_path: Path) -> None:
    row = {"image_id": "i", "key": "k", "image_offset": 0, "image_size": 1, "image_ext": "png", "json_offset": 2, "json_size": 3}
    parts = [["a", "a", "b"], [], ["c"], ["d", "d"]]
    with IndexWriter(str(tmp_path / "i.parquet"), str(tmp_path / "o.parquet")) as index:
        for shard, ids in enumerate(parts):
            rows = [{**row, "object_id": object_id, "n_captions": 2} for object_id in ids]
            index.add(shard, pa.Table.from_pylist(rows, PART_SCHEMA))
    assert (index.objects, index.captions) == (4, 12)
    table = read_parquet(str(tmp_path / "i.parquet"))
    assert table["object_row"].to_pylist() == [0, 0, 1, 2, 3, 3] and table["shard"].to_pylist() == [0, 0, 0, 2, 3, 3]
    assert read_parquet(str(tmp_path / "o.parquet")).to_pydict() == {"object_id": list("abcd"), "row": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("a.png: http://a.b/a.png cannot be fetched: HTTP Error 404: Not Found", "HTTP 404"),
        ("a.png: http://a.b/a.png cannot be fetched: it has not come within 60 s", "too slow"),
        ("a.png: [Errno 2] No such file or directory: '/a.png'", "no such file"),
        ("a.png: image: does not decode (9 bytes): not an image of a known format", "does not decode"),
        ("a.png: no caption with text", "no caption"),
        ("row 7: no object_id", "row that cannot be used"),
        ("row 7: '/x' leads to /x, outside of /y: --allow-outside allows it", "outside of the root"),
        ("birds/1.CR2: not read here: a camera's raw file: export it as JPEG, PNG or TIFF", "a format that is not read"),
        ("birds/: a folder without pictures", "empty folder"),
        ("00001/0002: no image", "no image"),
        ("00001.tar is broken, it ends early at byte 512: what lies before is used", "broken tar"),
        ("floatid, row 3: no object_id", "row that cannot be used"),
        ("p/1.png: p.parquet, row 2: no image in the column 'image'", "no image"),
        ("metadata.csv, row 2: there is no picture 'a/9.png'", "no such picture"),
        ("a/json: its .json is broken: Expecting value: line 1", "text that cannot be used"),
        ("a/latin: its .txt is no UTF-8: byte 0xe9 at 0", "text that cannot be used"),
        ("a/hollow: its .jpg is empty", "does not decode"),
        ("a.tar: good.jpg: a second one of that name", "member that cannot be used"),
        ("a/failed: img2dataset's status is 'failed_to_resize'", "failed download"),
        ("what: ever", "other"),
    ],
)
def test_kinds_of_what_is_left_out(line: str, kind: str) -> None:
    assert kind_of(line) == kind
