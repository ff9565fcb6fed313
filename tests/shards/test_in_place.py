"""`mmref shards index`: tars as people write them are found, understood and read where they lie, or refused with a reason."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.ranges import range_server
from support.tiny_set import tiny_config
from support.web_tars import downloaded, picture, write_downloads, write_tar

from mmref.cli import main
from mmref.data.plan import Plan, windowed_order
from mmref.data.reader import StepReader, concatenate
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import ConfigError, SampleError, ShardSetError, SourceError, StorageError
from mmref.retrieval.images import list_images, read_image_bytes
from mmref.shards import in_place_rows
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.in_place import InPlaceOptions, index_tars
from mmref.shards.reading import ReadingOptions
from mmref.shards.sources.table import TableSource
from mmref.shards.tar_places import find_tars, labels
from mmref.storage.cache import ShardCache

ALL = {"train": 1.0}
Index = Callable[..., ShardSet]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setenv("MMREF_CACHE", str(tmp_path / "cache"))

    def call(*tars: object, workers: int = 0, **reading: Any) -> ShardSet:
        options = ReadingOptions(**{"fractions": ALL, **reading})
        index_tars([str(tar) for tar in tars], str(tmp_path / "set"), InPlaceOptions(options, workers=workers, overwrite=True))
        found = ShardSet.open(str(tmp_path / "set"))
        assert found.verify() == []
        return found

    return call


def metas(shards: ShardSet, split: str = "train") -> dict[str, dict[str, Any]]:
    """The json of each sample of a split by its image id."""
    reader = SampleReader(shards.index(split))
    found = [reader.read(i) for i in range(len(reader.index))]
    assert [raw.meta["image_id"] for raw in found] == list(reader.index.image_ids)
    return {raw.meta["image_id"]: raw.meta for raw in found}


def test_img2datasets_tars_are_understood_without_a_word(tmp_path: Path, index: Index) -> None:
    tars = write_downloads(tmp_path / "laion", 3, 20)
    before = [path.read_bytes() for path in tars]
    status = ["success"] * 20 + ["failed_to_download"] * 3 + ["failed_to_resize"]
    pq.write_table(pa.table({"status": status, "url": ["u"] * 24}), tmp_path / "laion" / "00001.parquet")
    shards = index(tmp_path / "laion")
    found = metas(shards)
    assert len(found) == 60 and shards.manifest["reading"]["layout"] == "img2dataset"
    assert found["00001/000000025"] == {
        "object_id": "00001/000000025", "image_id": "00001/000000025", "captions": ["a random picture, the one of number 25"],
    }  # fmt: skip
    train = shards.index("train")
    reader = SampleReader(train)
    for i in range(60):
        assert reader.read(i).image_bytes == picture(int(train.image_ids[i][-9:]))
    assert "4 failed downloads" in shards.manifest["warnings"][0] and "failed_to_download 3" in shards.manifest["warnings"][0]
    assert "each image is an object of its own" in shards.manifest["reading"]["objects"]
    assert before == [path.read_bytes() for path in tars], "they stay as they are"
    assert sorted(p.name for p in tmp_path.rglob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"], "and nothing is copied"


def test_what_is_indexed_is_what_would_be_built(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that lie scattered over tars: order, splits, images and captions are those of a set built of the same samples."""
    monkeypatch.setattr(in_place_rows, "SHARE_ROWS", 7)  # many shares
    rows = []
    for tar in range(4):
        samples = []
        for i in range(15):
            number = 15 * tar + i
            fields = {"sku": number * 7 % 23, "title": f"thing {number}", "alt": ["one", "two"], "color": "red"}
            samples.append({"__key__": f"{i:03d}", "png": picture(number, "PNG"), "json": fields})
            (tmp_path / "images" / str(tar)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / str(tar) / f"{i:03d}").write_bytes(samples[-1]["png"])
            rows.append({"image": f"{tar}/{i:03d}", **fields})
        write_tar(tmp_path / "tars" / f"{tar}.tar", samples)
    (tmp_path / "images" / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fractions = {"train": 0.6, "test": 0.4}
    asked: dict[str, Any] = {"object_id": "sku", "captions": ("title", "alt"), "keep": ("color",), "fractions": fractions}
    source = TableSource(str(tmp_path / "images" / "t.jsonl"), **{**asked, "captions": ["title", "alt"]})
    build_shards(source, str(tmp_path / "built"), BuildOptions(progress=False))
    built, found = ShardSet.open(str(tmp_path / "built")), index(tmp_path / "tars", **asked)
    for split in ("train", "test"):
        a, b = built.index(split), found.index(split)
        assert list(a.object_ids) == list(b.object_ids) and list(a.image_ids) == list(b.image_ids)
        assert np.array_equal(a.object_start, b.object_start) and np.array_equal(a.n_captions, b.n_captions)
        readers = SampleReader(a), SampleReader(b)
        assert all(readers[0].read(i) == readers[1].read(i) for i in range(len(a)))
        assert not np.array_equal(np.sort(b.shard), b.shard), "they do lie scattered"
    assert list(found.train_object_ids()) == list(built.index("train").object_ids)
    counts = ("objects", "images", "captions")
    for split, entry in built.manifest["splits"].items():
        assert {n: found.manifest["splits"][split][n] for n in counts} == {n: entry[n] for n in counts}


@pytest.mark.parametrize("window", [0, 2])
def test_training_sees_the_samples_of_a_set_that_was_built(tmp_path: Path, index: Index, window: int) -> None:
    """Steps of the plan, pixels, words and all, on one rank and on two. Windows are of tars, which a build cuts elsewhere."""
    rows = []
    for tar in range(4):
        samples = [downloaded(tar * 10 + i, sku=(tar * 10 + i) * 7 % 15) for i in range(10)]
        write_tar(tmp_path / "tars" / f"{tar}.tar", samples)
        (tmp_path / str(tar)).mkdir()
        for sample in samples:
            (tmp_path / str(tar) / sample["__key__"]).write_bytes(sample["jpg"])
            told = sample["json"]
            rows.append({"image": f"{tar}/{sample['__key__']}", "object_id": told["sku"], "caption": told["caption"]})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = TableSource(str(tmp_path / "t.jsonl"), fractions=ALL)
    build_shards(source, str(tmp_path / "built"), BuildOptions(progress=False, tokenizer_vocab=60))
    index(tmp_path / "tars", object_id="sku")
    shutil.copytree(tmp_path / "built" / "tokenizer", tmp_path / "set" / "tokenizer")
    overrides = {"data.window_shards": window}
    built, found = (StepReader(tiny_config(tmp_path / name, overrides)) for name in ("built", "set"))
    halves = [StepReader(tiny_config(tmp_path / "set", overrides), rank, 2) for rank in (0, 1)]
    seen = set()
    for step in range(12):
        batch, two = found.read_step(step), concatenate([half.read_step(step) for half in halves])
        assert all(np.array_equal(batch[name], two[name]) for name in batch)
        seen |= set(batch["object"].tolist())
        if not window:
            expected = built.read_step(step)
            assert all(np.array_equal(batch[name], expected[name]) for name in batch), step
    assert seen == set(range(15)) and not any(batch["bad"])


@pytest.mark.ray
def test_many_tars_are_joined_before_they_are_mapped(tmp_path: Path, index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process has 65,530 maps, and a web dataset more tars."""
    tars = write_downloads(tmp_path / "tars", 7, 3)
    expected = metas(index(*tars))
    written = (tmp_path / "set" / "train" / "train.index.parquet").read_bytes()
    monkeypatch.setattr(in_place_rows, "MOST_MAPPED", 3)
    for rows in (in_place_rows.SHARE_ROWS, 4):
        monkeypatch.setattr(in_place_rows, "SHARE_ROWS", rows)
        assert metas(index(*tars)) == expected
    monkeypatch.setattr(in_place_rows, "SHARE_ROWS", 4_000_000)
    index(*tars)
    assert (tmp_path / "set" / "train" / "train.index.parquet").read_bytes() == written
    assert not list((tmp_path / "set").rglob("*.joined"))


def test_ray_workers_write_the_same_set(tmp_path: Path, index: Index) -> None:
    write_downloads(tmp_path / "tars", 5, 4)
    alone = index(tmp_path / "tars", fractions={"train": 0.5, "test": 0.5}).manifest
    assert index(tmp_path / "tars", fractions={"train": 0.5, "test": 0.5}, workers=2).manifest == alone


def test_members_as_people_write_them(tmp_path: Path, index: Index) -> None:
    write_tar(tmp_path / "a.tar", [
        {"__key__": "x/1", "JPG": picture(1), "txt": "first\n\n second \n"},
        {"__key__": "y/1", "jpeg": picture(2, "PNG"), "txt": "\ufeffwith a mark"},
        {"__key__": "two", "mask.png": picture(3, "PNG"), "png": picture(4, "PNG"), "jpg": picture(5), "txt": "two images"},
        {"__key__": "webp", "webp": picture(6, "WEBP"), "json": {"captions": ["a", "", "b"]}, "txt": "not this"},
        {"__key__": "gif", "gif": picture(7, "GIF"), "txt": "decoded as any other", "npy": b"0"},
        {"__key__": "caf\udce9", "jpg": picture(8), "txt": "of an old zip"},
        {"__key__": "mac", "jpg": picture(9), "txt": "one\rtwo\r\n\u200b\nthree"},
    ])  # fmt: skip
    shards = index(tmp_path / "a.tar")
    found = metas(shards)
    assert {name: meta["captions"] for name, meta in found.items()} == {
        "a/x/1": ["first", "second"], "a/y/1": ["with a mark"], "a/two": ["two images"], "a/webp": ["a", "b"],
        "a/gif": ["decoded as any other"], "a/caf\\xe9": ["of an old zip"],
        "a/mac": ["one", "two", "three"],
    }  # fmt: skip
    train = shards.index("train")
    by_id = {train.image_ids[i]: SampleReader(train).read(i).image_bytes for i in range(len(train))}
    assert by_id["a/two"] == picture(5)
    warnings = " ".join(shards.manifest["warnings"])
    assert "1 samples have several images" in warnings and "1 .npy" in warnings


def test_images_with_dots_in_their_names_are_not_lost_in_silence(tmp_path: Path, index: Index) -> None:
    """A name ends at its first dot, so that views of one object are one sample, of which one image is taken."""
    path = write_tar(tmp_path / "views.tar", [
        {"__key__": "p1", "front.png": picture(1, "PNG"), "back.png": picture(2, "PNG"), "txt": "a chair"},
        {"__key__": "p2", "front.png": picture(3, "PNG"), "side.png": picture(4, "PNG"), "txt": "a mug"},
        {"__key__": "v1", **{f"{i}.jpg": picture(i) for i in range(4)}, **{f"{i}.txt": "no caption of v1" for i in range(4)}},
        {"__key__": "plain", "jpg": picture(5), "mask.png": picture(6, "PNG"), "txt": "a mask is none of several"},
    ])  # fmt: skip
    shards = index(path)
    assert set(metas(shards)) == {"views/p1", "views/p2", "views/plain"}
    assert shards.manifest["skipped"]["first"] == ["views/v1: no caption with text"]
    several, passed, _ = shards.manifest["warnings"]
    assert several.startswith("3 samples have several images") and "and 5 images are not" in several
    assert "A key ends at the first dot, also that of p1.back.png" in several and "1 .0.txt" in passed


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path, index: Index) -> None:
    path = write_tar(tmp_path / "a.tar", [
        {"__key__": "good", "jpg": picture(0), "txt": "fine"},
        {"__key__": "texts", "txt": "no image"},
        {"__key__": "bare", "jpg": picture(1)},
        {"__key__": "blank", "jpg": picture(1), "txt": " \n"},
        {"__key__": "hollow", "jpg": b"", "txt": "empty"},
        {"__key__": "json", "jpg": picture(1), "json": b"{"},
        {"__key__": "list", "jpg": picture(1), "json": b"[]"},
        {"__key__": "latin", "jpg": picture(1), "txt": "\xe9".encode("latin-1")},
        {"__key__": "nul", "jpg": picture(1), "txt": "fine\nn\0ul"},
        {"__key__": "half", "jpg": picture(1), "json": b'{"caption": "\\ud800"}'},
        {"__key__": "failed", "jpg": picture(1), "json": {"url": "u", "key": "k", "status": "failed_to_resize", "caption": "c"}},
    ])  # fmt: skip
    with tarfile.open(path, "a") as tar:  # as `tar --append` would: a second one of a name, a link
        info = tarfile.TarInfo("good.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"new"))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    cut = write_downloads(tmp_path / "cut", 1, 3)[0]
    cut.write_bytes(cut.read_bytes()[:-12_000])
    shards = index(path, cut)
    assert set(metas(shards)) >= {"a/good"} and "a/bare" not in metas(shards)
    skipped = shards.manifest["skipped"]
    assert skipped["count"] == len(skipped["first"])
    for line in (
        "a.tar: good.jpg: a second one of that name", "a.tar: link.jpg: no plain file", "a/texts: no image",
        "a/bare: no caption with text", "a/blank: no caption with text", "a/hollow: its .jpg is empty",
        "a/list: its .json is no object but list", "a/failed: img2dataset's status is 'failed_to_resize'",
    ):  # fmt: skip
        assert line in skipped["first"]
    for begin in ("a/json: its .json is broken", "a/latin: its .txt is no UTF-8: byte 0xe9 at 0",
                  "a/nul: line 2: .txt holds a NUL", "a/half: caption cannot be written", "00000.tar is broken, "):  # fmt: skip
        assert any(line.startswith(begin) for line in skipped["first"]), begin


def test_ids_of_classes_duplicates_and_a_joined_table(tmp_path: Path, index: Index) -> None:
    samples = [{"__key__": f"{i}", "jpg": picture(i % 4), "cls": i % 3} for i in range(12)]
    write_tar(tmp_path / "c.tar", samples)
    (tmp_path / "names.txt").write_text("cat\ndog\nsea lion\n")
    found = metas(index(tmp_path / "c.tar", classes=str(tmp_path / "names.txt")))
    assert {(m["object_id"], m["captions"][0]) for m in found.values()} == {("0", "cat"), ("1", "dog"), ("2", "sea lion")}
    with pytest.raises(SourceError, match=r"no sample has a caption.*--classes FILE"):
        index(tmp_path / "c.tar")
    (tmp_path / "names.txt").write_text("cat\ndog")
    assert index(tmp_path / "c.tar", classes=str(tmp_path / "names.txt")).manifest["skipped"]["count"] == 4

    (tmp_path / "t.csv").write_text("file,sku,title,fold\n" + "\n".join(f"{i},s{i % 2},title {i},train" for i in range(11)))
    joined = index(
        tmp_path / "c.tar", join=str(tmp_path / "t.csv"), on="file=__key__", object_id="sku", captions=("title",), split="fold"
    )
    assert {m["object_id"] for m in metas(joined).values()} == {"s0", "s1"} and len(metas(joined)) == 11
    assert joined.manifest["skipped"]["first"] == ["c/11: the table has no row for it (__key__ '11')"]

    for sample in samples:
        sample["txt"] = "a caption"
    write_tar(tmp_path / "c.tar", samples)
    assert {m["object_id"] for m in metas(index(tmp_path / "c.tar")).values()} == {"0", "1", "2"}
    same = metas(index(tmp_path / "c.tar", ids="duplicate"))
    assert len({m["object_id"] for m in same.values()}) == 4 and same["c/0"]["object_id"] == same["c/8"]["object_id"]
    assert len({m["object_id"] for m in metas(index(tmp_path / "c.tar", ids="image")).values()}) == 12


def test_splits_of_a_field_and_objects_in_two(tmp_path: Path, index: Index) -> None:
    def tar(*told: tuple[str, str]) -> Path:
        samples = (downloaded(i, split=split, sku=sku) for i, (split, sku) in enumerate(told))
        return write_tar(tmp_path / "a.tar", samples)

    shards = index(tar(("train", "a"), ("validation", "b"), ("Test", "c"), ("../up", "d")), object_id="sku")
    assert shards.splits == ["train", "val", "test"]
    assert "'../up' (split) cannot name a split" in shards.manifest["skipped"]["first"][0]
    with pytest.raises(SourceError, match=r"Object 'a' is in 'train' \(a/000000000\) and in 'test' \(a/000000001\)"):
        index(tar(("train", "a"), ("test", "a")), object_id="sku")


def test_splits_that_are_missing_are_told(tmp_path: Path, index: Index) -> None:
    path = write_tar(tmp_path / "a.tar", [{"__key__": f"{i}", "jpg": picture(i), "txt": "x"} for i in range(20)])
    last = index(path, fractions={"val": 0.5, "test": 0.5}).manifest["warnings"][-1]
    assert last == "the set has the splits val, test alone (no train: nothing can be trained on it)"
    assert index(path, fractions={"train": 0.4, "val": 0.3, "test": 0.3}).manifest["warnings"] == []


def test_wrong_names_are_told_before_all_tars_are_scanned(tmp_path: Path, index: Index) -> None:
    write_downloads(tmp_path / "tars", 2, 2, sku="1")
    for reading, said in (
        ({"object_id": "skuu"}, "--object-id skuu: no sample of .* Did you mean 'sku'"),
        ({"captions": ("captoin",)}, "--captions captoin.*Did you mean 'caption'"),
        ({"split": "fold"}, "--split fold"),
        ({"keep": ("nothing",)}, "--keep nothing"),
        ({"keep": ("captions",)}, "--keep captions"),
    ):
        with pytest.raises(SourceError, match=said):
            index(tmp_path / "tars", **reading)
    with pytest.raises(ConfigError, match="--join TABLE and --on COLUMN go together"):
        index(tmp_path / "tars", on="key")
    assert not (tmp_path / "set").exists()


def test_places(tmp_path: Path) -> None:
    for name in ("a/00.tar", "a/01.tar", "b/x/00.tar", "b/y/00.tar", "c/1.tar.gz", "d/1.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*given: str) -> list[str]:
        return [os.path.relpath(place, tmp_path) for place in find_tars([str(tmp_path / each) for each in given])]

    assert names("a") == names("a/*.tar") == names("a/{00..01}.tar") == names("{a}/{00,01}.tar".replace("{a}", "a"))
    assert names("a/01.tar", "a") == ["a/01.tar", "a/00.tar"] and names("**/0*.tar") == sorted(names("a", "b/*/*.tar"))
    assert find_tars(["s3://b/{8..10}.tar"]) == ["s3://b/8.tar", "s3://b/9.tar", "s3://b/10.tar"]
    assert find_tars(["https://h/{098..100}.tar?k=1"])[0] == "https://h/098.tar?k=1"
    assert labels(find_tars([str(tmp_path / "a"), str(tmp_path / "b/*/*.tar")])) == ["a/00", "a/01", "x/00", "y/00"]
    for given, said in (
        ("c/1.tar.gz", "is packed.*gunzip"), ("c", "holds no .tar. 1.tar.gz is packed"), ("b/x/*.jpg", "matches nothing"),
        ("b", r"its folders do, x for one: give '.*/b/\*/\*.tar'"), ("d", "Images in folders, and tables of them"),
        ("a/{0..2}.tar", "0.tar: there is no such tar"), ("d/1.jpg", "is not called .tar"), ("a/{00}.tar", "is no range"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=f"(?i){said}"):
            names(given)
    (tmp_path / "{3F25}").mkdir()
    shutil.copy(tmp_path / "a/00.tar", tmp_path / "{3F25}")
    (tmp_path / "a/link.tar").symlink_to("00.tar")
    assert names("{3F25}/00.tar") == ["{3F25}/00.tar"] and names("a", "a/link.tar") == ["a/00.tar", "a/01.tar"]
    for url, said in (("http://h/*.tar", "over http"), ("ftp://h/a.tar", "tars are not read from ftp"),
                      ("simplecache::http://h/a.tar", "tars are not read from")):  # fmt: skip
        with pytest.raises(SourceError, match=said):
            find_tars([url])


def test_tars_of_tars_and_of_no_images(tmp_path: Path, index: Index) -> None:
    write_tar(tmp_path / "n" / "a.tar", [{"__key__": "1", "tar": b"x"}])
    with pytest.raises(SourceError, match=r"holds 1.tar, an archive.*unpack it"):
        index(tmp_path / "n")
    write_tar(tmp_path / "t" / "a.tar", [{"__key__": "1", "npy": b"x"}])
    with pytest.raises(SourceError, match=r"1 tars hold no image \(found: .npy\)"):
        index(tmp_path / "t")


def test_a_tar_that_was_replaced_is_not_read(tmp_path: Path, index: Index) -> None:
    path = write_downloads(tmp_path / "tars", 1, 4)[0]
    shards = index(path)
    train = shards.index("train")
    kept = SampleReader(train)
    kept.read(0)
    os.utime(path, (5, 5))  # the same size, another time
    kept.read(1)  # it is open
    for read in (lambda: SampleReader(train).read(0), lambda: ShardSet.open(shards.root).index("train")):
        with pytest.raises(ShardSetError, match=r"is not the tar that was indexed.*`mmref shards index`"):
            read()
    assert any(problem.startswith("changed_tar") for problem in shards.verify())
    path.unlink()
    with pytest.raises(ShardSetError, match="missing_shard"):
        ShardSet.open(shards.root).index("train")
    with pytest.raises(StorageError, match=r"cannot read .*00000.tar"):
        SampleReader(train).read(0)


def test_an_index_that_says_else_than_its_samples_is_noticed(tmp_path: Path, index: Index) -> None:
    shards = index(*write_downloads(tmp_path, 2, 3))
    path = tmp_path / "set" / "train" / "train.index.parquet"
    table = pq.read_table(path)
    names = table["image_id"].to_pylist()[::-1]
    pq.write_table(table.set_column(table.column_names.index("image_id"), "image_id", [names]), path)
    assert {problem.split(":")[0] for problem in shards.verify()} == {"wrong_row"}


def test_another_index_in_its_place_is_noticed(tmp_path: Path, index: Index) -> None:
    write_downloads(tmp_path / "tars", 1, 4, other="another caption")
    reader = SampleReader(index(tmp_path / "tars").index("train"))
    index(tmp_path / "tars", captions=("other",))
    with pytest.raises(ShardSetError, match="was replaced by another shard set while it was read"):
        reader.read(0)


def test_where_images_lie_is_said_once_a_node(tmp_path: Path, index: Index, caplog: pytest.LogCaptureFixture,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    write_downloads(tmp_path / "tars", 2, 2)
    shards = index(tmp_path / "tars")
    monkeypatch.setenv("MMREF_CACHE", str(tmp_path / "another node"))
    with caplog.at_level(logging.WARNING, "mmref"):
        for _ in range(3):
            ShardSet.open(shards.root).index("train")
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and f"lie outside of it, in 2 tars below {tmp_path / 'tars'}" in told[0]


@pytest.mark.parametrize("place", ["{victim}", "../x.tar", "file://{victim}.tar", "/etc/../etc/x.tar", "memory://x.tar",
                                   "http::s3://x.tar", "x.tar", "{folder}.tar", "{pipe}.tar"])  # fmt: skip
def test_a_manifest_names_no_other_files_as_tars(tmp_path: Path, index: Index, place: str) -> None:
    """Nothing but a file that is called a tar, has the size and time that the manifest says, and is no pipe."""
    shards = index(write_downloads(tmp_path / "tars", 1, 2)[0])
    victim = tmp_path / "secret"
    victim.write_bytes(b"mine" * 10_000)
    shutil.copy(victim, f"{victim}.tar")
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    named = place.format(victim=victim, folder=tmp_path / "folder", pipe=tmp_path / "pipe")
    manifest["splits"]["train"]["shards"][0]["file"] = named
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardSetError):
        ShardSet.open(shards.root).index("train")
    manifest["splits"]["train"]["shards"][0]["file"] = f"{victim}.tar"  # a tar by its name, but not with that size and time
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardSetError, match="is not the tar that was indexed"):
        ShardSet.open(shards.root).index("train")


@pytest.mark.parametrize("change", [{"json": "../x"}, {"json_bytes": -1}, {"stamp": 3}, {"headers": None}])
def test_a_manifest_of_others_is_checked(tmp_path: Path, index: Index, change: dict[str, Any]) -> None:
    shards = index(write_downloads(tmp_path / "tars", 1, 2)[0])
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0]["in_place"] |= change
    (tmp_path / "set" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardSetError, match=r"manifest.json, split 'train'"):
        ShardSet.open(shards.root)


@pytest.mark.parametrize("ranges", [True, False])
def test_over_http(tmp_path: Path, index: Index, ranges: bool) -> None:
    write_downloads(tmp_path / "tars", 2, 5)
    with range_server(tmp_path / "tars", ranges) as url:
        shards = index(f"{url}/{{00000..00001}}.tar")
        train = shards.index("train")
        cache = ShardCache(str(tmp_path / "shards"), 10**9)
        expected = [picture(int(name[-9:])) for name in train.image_ids]
        assert [SampleReader(train, cache).read(i).image_bytes for i in range(10)] == expected and len(cache.fetches()) == 2
        assert ("only given as a whole" in " ".join(shards.manifest["warnings"])) == (not ranges)
        if ranges:
            assert [SampleReader(train).read(i).image_bytes for i in range(10)] == expected
        else:
            with pytest.raises(StorageError, match=r"only given as a whole.*data.cache_gb"):
                SampleReader(train).read(0)
        with pytest.raises(SourceError, match=r"00002.tar cannot be read"):
            index(f"{url}/{{00000..00002}}.tar")


def test_over_http_without_a_length(tmp_path: Path, index: Index) -> None:
    write_downloads(tmp_path / "tars", 2, 5)
    pq.write_table(pa.table({"status": ["success", "failed_to_download"]}), tmp_path / "tars" / "00000.parquet")
    with range_server(tmp_path / "tars", ranges=False, length=False) as url:
        train = index(f"{url}/{{00000..00001}}.tar").index("train")
        reader = SampleReader(train, ShardCache(str(tmp_path / "shards"), 10**9))
        assert [reader.read(i).image_bytes for i in range(10)] == [picture(int(name[-9:])) for name in train.image_ids]


def test_keys_in_urls_are_not_told(tmp_path: Path, index: Index, tiny_set: Path, caplog: pytest.LogCaptureFixture) -> None:
    """User, password and signature are in the manifest, which needs them, and in no message."""
    write_downloads(tmp_path / "tars", 2, 3)
    told: list[str] = []

    def failing(error: type[Exception], action: Callable[[], object]) -> None:
        with pytest.raises(error) as raised:
            action()
        told.append(str(raised.value))

    with range_server(tmp_path / "tars") as url, caplog.at_level("DEBUG", "mmref"):
        host, query = url.replace("http://", "http://bob:S3CRET@"), "?X-Amz-Signature=SIGNED"
        shards = index(f"{host}/{{00000..00001}}.tar{query}")
        train = shards.index("train")
        failing(SourceError, lambda: index(f"{host}/none.tar{query}"))
        tar = tmp_path / "tars" / "00000.tar"
        before = tar.stat().st_mtime
        tar.write_bytes(tar.read_bytes().replace(b"\xff\xd8\xff", b"non"))
        os.utime(tar, (before, before))
        values = {"train.global_batch": 2, "train.images_per_object": 1, "data.tokenizer": f"{tiny_set}/tokenizer"}
        failing(SampleError, lambda: StepReader(tiny_config(Path(shards.root), values)).read_image(0))
        os.utime(tar, (1, 1))
        told += shards.verify()
        failing(ShardSetError, lambda: ShardSet.open(shards.root).index("train"))
        tar.unlink()
        told += shards.verify()
        failing(ShardSetError, lambda: ShardSet.open(shards.root).index("train"))
        failing(StorageError, lambda: [SampleReader(train).read(i) for i in range(6)])
    assert len(told) >= 7 and all("/00000.tar" in text or "/none.tar" in text for text in told)
    for text in (*told, *train.image_ids, *(record.getMessage() for record in caplog.records)):
        assert not any(secret in text for secret in ("bob", "S3CRET", "SIGNED")), text


def test_on_s3_tars_and_set(tmp_path: Path, index: Index, s3_bucket: str) -> None:
    import fsspec

    write_downloads(tmp_path / "tars", 2, 5)
    s3 = fsspec.filesystem("s3")
    s3.put(str(tmp_path / "tars"), f"{s3_bucket}/mine", recursive=True)
    assert find_tars([f"{s3_bucket}/mine"]) == find_tars([f"{s3_bucket}/mine/*.tar"]) == [
        f"{s3_bucket}/mine/0000{i}.tar" for i in (0, 1)
    ]  # fmt: skip
    shards = index(f"{s3_bucket}/mine")
    local = metas(shards)
    s3.put(str(tmp_path / "set"), f"{s3_bucket}/set", recursive=True)
    remote = ShardSet.open(f"{s3_bucket}/set")
    assert metas(remote) == local and remote.verify() == [] and remote.fingerprint == shards.fingerprint


def test_an_index_for_search_reads_the_images_in_place(tmp_path: Path, index: Index) -> None:
    write_downloads(tmp_path / "tars", 2, 5)
    items = list_images(index(tmp_path / "tars").root).items.to_pylist()
    assert len(items) == 10
    for item in items:
        assert read_image_bytes(item["path"], item["offset"], item["length"]) == picture(int(item["id"][-9:]))
        assert item["caption"].startswith("a random picture")


def test_windows_hold_the_objects_of_a_few_tars(tmp_path: Path, index: Index) -> None:
    write_downloads(tmp_path / "tars", 12, 10)
    train = index(tmp_path / "tars").index("train")
    shard = train.shard[train.object_start[:-1]]
    order = windowed_order(shard, 3, seed=1)
    plan = Plan(train.object_start, 10, 1, 1, order)
    for epoch in range(2):
        steps = [plan(epoch * plan.steps_per_epoch + i).objects for i in range(plan.steps_per_epoch)]
        assert sorted(np.concatenate(steps).tolist()) == list(range(120))
        for first in range(0, 12, 3):  # the steps of a window
            assert len({int(shard[i]) for i in np.concatenate(steps[first : first + 3])}) == 3
    in_order = windowed_order(np.repeat(np.arange(12, dtype=np.int32), 10), 3, seed=1)
    assert in_order.by_shard is None


def test_a_set_takes_the_place_of_another_and_leaves_nothing(tmp_path: Path, index: Index) -> None:
    write_downloads(tmp_path / "tars", 3, 4)
    index(tmp_path / "tars")
    index(tmp_path / "tars" / "00001.tar")
    names = {p.relative_to(tmp_path / "set").as_posix() for p in (tmp_path / "set").rglob("*") if p.is_file()}
    assert names == {"manifest.json", "objects.parquet", "train/train.index.parquet", "samples/000000.jsonl"}
    with pytest.raises(ShardSetError, match="already holds a complete shard set"):
        index_tars([str(tmp_path / "tars")], str(tmp_path / "set"), InPlaceOptions())


def test_the_command_says_how_it_understood_the_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("MMREF_CACHE", str(tmp_path / "cache"))
    write_downloads(tmp_path / "tars", 2, 30)
    argv = ["shards", "index", f"{tmp_path}/tars/{{00000..00001}}.tar", "--out", f"{tmp_path}/set", "--workers", "0"]
    assert main([*argv, "--tokenizer-vocab", "60", "--keep", "url"]) == 0
    out = capsys.readouterr().out
    assert "layout:   img2dataset" in out and "objects:  each image is an object of its own (other ids: --object-id FIELD" in out
    assert "splits:   by a hash" in out and (tmp_path / "set" / "tokenizer" / "tokenizer.json").exists()
    assert all(meta["url"].startswith("https://") for meta in metas(ShardSet.open(f"{tmp_path}/set")).values())
    with pytest.raises(SystemExit):
        main([*argv, "--object-id", "a", "--ids", "image"])
    for command in ("inspect", "verify"):
        assert main(["shards", command, f"{tmp_path}/set"]) == 0
    assert "sound" in capsys.readouterr().out


def test_columns_of_text_have_room_for_more_than_two_gigabytes(tmp_path: Path, index: Index) -> None:
    root = index(write_downloads(tmp_path / "tars", 1, 3)[0]).root
    schema = pq.read_schema(f"{root}/train/train.index.parquet")
    assert {schema.field(name).type for name in ("object_id", "image_id", "key", "image_ext")} == {pa.large_string()}
