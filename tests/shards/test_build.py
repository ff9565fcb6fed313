"""The builder: the same bytes every time, offsets that are true, a manifest only when the set is complete."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from mmref.data.decode import decode_rgb
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import ConfigError, SampleError, ShardSetError, SourceError, StorageError
from mmref.shards import build as build_module
from mmref.shards.build import BuildOptions, build_shards, make_source
from mmref.shards.samples import SourceImage, SourceObject, escape_key, hash_split, unescape_key
from mmref.shards.sources.table import TableSource
from mmref.shards.tar_writer import ImageOptions, prepare_image, write_shard


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.mark.ray
def test_same_bytes_twice_and_by_ray_workers(build_table, make_table):
    table = make_table()
    first = contents(build_table("a", table, pack=True, tokenizer_vocab=60))
    assert sum(name.endswith(".tar") for name in first) == 6
    assert first == contents(build_table("b", table, pack=True, tokenizer_vocab=60))
    assert first == contents(build_table("c", table, workers=2, pack=True, tokenizer_vocab=60))


def test_offsets_give_what_webdataset_reads(build_table):
    shards = ShardSet.open(str(build_table()))
    for split in shards.splits:
        index = shards.index(split)
        reader = SampleReader(index)
        streamed = [s for path in index.shard_paths for s in webdataset.WebDataset(path, shardshuffle=False)]
        assert len(streamed) == len(index) > 0
        for i, sample in enumerate(streamed):
            raw = reader.read(i)
            assert sample["__key__"] == index.keys[i]
            assert sample[index.image_ext[i]] == raw.image_bytes
            assert json.loads(sample["json"]) == raw.meta
            assert unescape_key(index.keys[i]) == raw.meta["image_id"] == index.image_ids[i]
            assert raw.meta["object_id"] == index.object_ids[index.object_row[i]]
            assert raw.meta["caption_kinds"] == ["name", "detail"] and raw.meta["colour"] == "red"


@pytest.mark.parametrize("text", ["001.Black/x.y.jpg", "ä 日本/.hidden", "a%2Eb", "~_-", "https://x.org/a?b=c&d#e", "." * 200])
def test_keys_are_reversible_and_safe(text):
    key = escape_key(text)
    assert key.isascii() and not set("./ ~") & set(key)
    assert unescape_key(key) == text


def test_keys_longer_than_a_tar_header_keep_true_offsets(tmp_path, encode):
    class Long:
        min_images = 1

        def load(self, ref):
            return encode(ref)

    item = SourceObject("train", "o", [SourceImage("ü" * 60 + str(i), i, ["text"]) for i in range(3)])
    result = write_shard(Long(), [item], str(tmp_path), "x.tar", ImageOptions())
    data = (tmp_path / "x.tar").read_bytes()
    for i, row in enumerate(result.rows):
        assert data[row["image_offset"] :][: row["image_size"]] == encode(i)
        assert json.loads(data[row["json_offset"] :][: row["json_size"]])["image_id"] == "ü" * 60 + str(i)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getmembers()[0].name == f"{escape_key('ü' * 60 + '0')}.png"


def test_rows_and_manifest_agree(build_table):
    root = build_table()
    shards = ShardSet.open(str(root))
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["version"] == 1 and manifest["name"] == "table" and manifest["licence"] == "not stated"
    assert sum(s["objects"] for s in manifest["splits"].values()) == 20
    for split, entry in manifest["splits"].items():
        index = shards.index(split)
        assert (entry["images"], entry["captions"]) == (3 * entry["objects"], 6 * entry["objects"])
        assert sum(s["samples"] for s in entry["shards"]) == entry["images"]
        assert all(hash_split(o, {"train": 0.7, "val": 0.1, "test": 0.2}) == split for o in index.object_ids)
    table = pq.read_table(root / "objects.parquet")
    assert table["row"].to_pylist() == list(range(len(table)))
    assert table["object_id"].to_pylist() == shards.train_object_ids() == shards.index("train").object_ids


def test_unusable_samples_are_listed_and_skipped(tmp_path, make_table, encode):
    table = make_table(8)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows[1]["image"] = "nowhere.png"
    rows[4].update(name=" ", detail=None)
    rows[7]["object_id"] = ""
    (table.parent / rows[9]["image"]).write_bytes(encode(9)[:-40])
    table.write_text("\n".join(map(json.dumps, rows)))
    fractions = {"train": 1.0}
    source = TableSource(str(table), captions=["name", "detail"], fractions=fractions)
    manifest = build_shards(source, str(tmp_path / "set"), BuildOptions(progress=False))
    assert manifest["splits"]["train"]["images"] == 20
    reasons = "\n".join(manifest["skipped"]["first"])
    assert manifest["skipped"]["count"] == 4
    for text in ("row 8: no object_id", "nowhere.png: ", "no caption with text", "does not decode"):
        assert text in reasons
    assert ShardSet.open(str(tmp_path / "set")).verify() == []
    source = TableSource(str(table), captions=["name", "detail"], fractions=fractions, min_images=3)
    manifest = build_shards(source, str(tmp_path / "whole"), BuildOptions(progress=False))
    assert (manifest["splits"]["train"]["objects"], manifest["skipped"]["count"]) == (4, 4 + 4 * 2)


def test_a_jpeg_that_lost_its_lower_part_is_left_out():
    """Decoders take one for sound, and give gray for what is missing."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(out, "JPEG")
    data = out.getvalue()
    broken = data[: len(data) // 2] + b"\xff\xd9"
    assert prepare_image(data, ImageOptions()) == (data, "jpg")
    for options in (ImageOptions(), ImageOptions(resize_to_px=16)):
        with pytest.raises(SampleError, match=r"does not decode completely .*: the picture ends early"):
            prepare_image(broken, options)
    assert prepare_image(broken, ImageOptions(check=False)) == (broken, "jpg")


def test_image_formats(encode):
    for form, mode, ext in [
        ("JPEG", "L", "jpg"),
        ("JPEG", "CMYK", "jpg"),
        ("PNG", "P", "png"),
        ("WEBP", "RGBA", "webp"),
    ]:
        data = encode(0, form, mode)
        assert prepare_image(data, ImageOptions()) == (data, ext), "images are stored as they are"
        with pytest.raises(SampleError, match="decode"):
            prepare_image(data[: len(data) // 2], ImageOptions())
        assert prepare_image(data[: len(data) // 2], ImageOptions(check=False)) == (data[: len(data) // 2], ext)
    stored, ext = prepare_image(encode(0, "BMP"), ImageOptions())
    assert ext == "png" and np.array_equal(decode_rgb(stored), decode_rgb(encode(0, "BMP"))), "nothing is lost"
    stored, ext = prepare_image(encode(0, "BMP"), ImageOptions(resize_to_px=6))
    assert ext == "jpg" and Image.open(io.BytesIO(stored)).size == (6, 6)
    for mode in ("RGB", "L", "P", "RGBA", "1"):
        stored, _ = prepare_image(encode(0, "PNG", mode), ImageOptions(resize_to_px=6))
        assert Image.open(io.BytesIO(stored)).size == (6, 6)


def test_resizing_keeps_what_is_small_and_turns_photographs_upright():
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20, 0] = 255  # the left half is red
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: the left side is the top
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", exif=exif)
    data = encoded.getvalue()
    assert prepare_image(data, ImageOptions(resize_to_px=20)) == (data, "jpg"), "it is not larger"
    stored, _ = prepare_image(data, ImageOptions(resize_to_px=10))
    found = decode_rgb(stored)
    assert found.shape == (20, 10, 3) and found[:8, :, 0].min() > 200 and found[12:, :, 0].max() < 50


def test_values_that_json_has_no_type_for(tmp_path, encode):
    """Times and decimals of a Parquet column are kept as text; a text that cannot be written costs its image alone."""
    import pandas as pd

    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encode(i))
    rows = {"image": [f"{i}.png" for i in range(3)], "object_id": list("abc"), "caption": ["one", "two", "three"],
            "split": ["train"] * 3, "made": pd.to_datetime(["2026-01-02"] * 3)}  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    options = BuildOptions(workers=0, min_shards=1, progress=False)
    build_shards(TableSource(str(tmp_path / "t.parquet"), keep=["made"]), str(tmp_path / "set"), options)
    assert SampleReader(ShardSet.open(str(tmp_path / "set")).index("train")).read_meta(0)["made"].startswith("2026-01-02")
    lines = [{k: str(v[i]) for k, v in rows.items()} for i in range(3)]
    lines[1]["caption"] = "half of an emoji: \ud83d"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = build_shards(TableSource(str(tmp_path / "t.jsonl")), str(tmp_path / "cut"), options)
    assert manifest["splits"]["train"]["images"] == 2
    assert "cannot be written" in manifest["skipped"]["first"][0]


def test_shard_sizes(build_table, make_table):
    table = make_table()

    def counts(root):
        return [s["samples"] for s in json.loads((root / "manifest.json").read_text())["splits"]["train"]["shards"]]

    images = sum(counts(build_table("one", table, min_shards=1)))
    assert counts(build_table("fixed", table, samples_per_shard=6, min_shards=1)) == [6] * (images // 6) + [3] * (images % 6 > 0)
    assert counts(build_table("many", table, min_shards=1000)) == [3] * (images // 3), "an object is never cut"
    assert len(counts(build_table("small", table, target_mb=0.012, min_shards=1))) > 5


def test_complete_set_is_not_overwritten(build_table, make_table):
    table = make_table()
    root = build_table("set", table)
    before = contents(root)
    with pytest.raises(ShardSetError, match="--overwrite"):
        build_table("set", table)
    assert contents(root) == before
    build_table("set", table, min_shards=1, overwrite=True)
    assert len(list(root.rglob("*.tar"))) == 3, "tars of the old set are gone"
    assert ShardSet.open(str(root)).verify() == []


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("at", ["write_shard", "_finish", "train_tokenizer", "write_whole"])
def test_a_build_that_fails_leaves_what_was_there(build_table, make_table, tmp_path, monkeypatch, at):
    table = make_table()
    root = build_table("set", table)
    before = contents(tmp_path)
    monkeypatch.setattr(build_module, at, full_disk)
    for out, overwrite in (("set", True), ("new", False)):
        with pytest.raises(StorageError, match=f"no space left for {tmp_path / out}"):
            build_table(out, table, overwrite=overwrite, tokenizer_vocab=60)
        assert contents(tmp_path) == before and not (tmp_path / "new").exists(), "the old set, and nothing else"
    assert ShardSet.open(str(root)).verify() == []


def test_a_wrong_input_costs_no_set(build_table, make_table, tmp_path):
    """Whatever is known before anything is written is said before."""
    table = make_table()
    build_table("set", table)
    (tmp_path / "test.jsonl").write_text(table.read_text().replace('"colour": "red"', '"split": "test", "kind": ""'))
    before = contents(tmp_path)
    for path, options, captions, message in [
        (tmp_path / "nowhere.csv", {}, "name", "cannot be read"),
        (table, {}, "nam", "no column 'nam', only .*Did you mean 'name'"),
        (tmp_path / "test.jsonl", {"tokenizer_vocab": 60}, "name", "no such split, only test"),
        (tmp_path / "test.jsonl", {}, "kind", "No usable sample in split 'test': none of its 20 objects"),
        (
            table,
            {"tokenizer_vocab": 24},
            "name",
            r"--tokenizer-vocab 24 is too small: the captions of train need \d\d,",
        ),
        (table, {"tokenizer_vocab": -1}, "name", "--tokenizer-vocab must be above 0, found -1"),
        (table, {"target_mb": 0.0}, "name", "--target-mb must be above 0"),
        (table, {"images": ImageOptions(resize_to_px=-5)}, "name", "--resize-to-px must be above 0"),
    ]:
        source = TableSource(str(path), captions=[captions], image_root=str(table.parent))
        with pytest.raises((SourceError, ConfigError), match=message):
            build_shards(source, str(tmp_path / "set"), BuildOptions(overwrite=True, progress=False, **options))
        assert contents(tmp_path) == before
    source = TableSource(str(table), captions=["name"])
    build_shards(source, str(tmp_path / "fits"), BuildOptions(progress=False, tokenizer_vocab=60))


def test_nothing_of_the_old_set_is_left_and_what_is_the_user_s_stays(build_table, make_table, tmp_path):
    class WithLicence(TableSource):
        def write_extras(self, root):
            with open(f"{root}/LICENCE", "w") as file:
                file.write(self.text)

    table = make_table()
    plain = contents(build_table("plain", table, min_shards=1))
    root = build_table("set", table, min_shards=9, pack=True, tokenizer_vocab=60)
    user = {"README.md": b"mine", "train/notes.txt": b"too", ".git/config": b"[core]", "tokenizer/other.json": b"{}"}
    for name, data in user.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    build_table("set", table, min_shards=1, overwrite=True)
    assert contents(root) == plain | user
    source = WithLicence(str(table), captions=["name", "detail"], keep=["colour"])
    for source.text in ("first", "second"):
        build_shards(source, str(root), BuildOptions(min_shards=1, overwrite=True, progress=False))
        assert contents(root)["LICENCE"] == source.text.encode()
    (root / "LICENCE").unlink()
    source.name = "other"
    build_table("set", table, min_shards=1, overwrite=True)
    (root / "LICENCE").write_text("my own")
    with pytest.raises(ShardSetError, match="'LICENCE', which this command did not make"):
        build_shards(source, str(root), BuildOptions(min_shards=1, overwrite=True, progress=False))
    assert contents(root) == plain | user | {"LICENCE": b"my own"}


def test_a_set_is_not_built_among_other_files(build_table, make_table, tmp_path):
    table = make_table()
    for name, content, message in [
        ("photo.jpg", "x", r"holds files and no complete shard set \(photo.jpg\)"),
        ("manifest.json", '{"name": "an app"}', "of something else than a shard set"),
        ("manifest.json", '{"version": 1, "segments": []}', "of something else than a shard set"),
    ]:
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / name).write_text(content)
        for overwrite in (False, True):
            with pytest.raises(ShardSetError, match=message):
                build_table("mine", table, overwrite=overwrite)
        assert contents(tmp_path / "mine") == {name: content.encode()}
        shutil.rmtree(tmp_path / "mine")
    (tmp_path / "empty" / "lost+found").mkdir(parents=True)
    (tmp_path / "empty" / ".gitkeep").write_text("")
    assert ShardSet.open(str(build_table("empty", table))).verify() == []


def test_a_second_build_into_one_folder_is_refused(build_table, make_table, tmp_path):
    table = make_table()

    class Meanwhile(TableSource):
        def batches(self):
            with pytest.raises(ShardSetError, match=rf"set is in use: process {os.getpid()} on .* since 20"):
                build_table("set", table, overwrite=True)
            return super().batches()

    for overwrite in (False, True):
        source = Meanwhile(str(table), captions=["name"])
        build_shards(source, str(tmp_path / "set"), BuildOptions(progress=False, overwrite=overwrite))
        assert ShardSet.open(str(tmp_path / "set")).verify() == []
    assert {p.name for p in tmp_path.iterdir()} == {"set", "table"}


def test_errors_of_the_builder(tmp_path):
    with pytest.raises(SourceError, match=r"Sources: emoji, icons, cub, .*, table"):
        make_source("birds")
    (tmp_path / "file").write_text("")
    table = tmp_path / "t.csv"
    table.write_text("image,object_id,caption\n")
    with pytest.raises(SourceError, match="no objects"):
        build_shards(TableSource(str(table)), str(tmp_path / "out"), BuildOptions(progress=False))
    with pytest.raises(ShardSetError, match="Cannot write"):
        build_shards(TableSource(str(table)), str(tmp_path / "file"), BuildOptions(progress=False))
    table.write_text("image,object_id,caption\nmissing.png,a,text\n")
    with pytest.raises(SourceError, match=r"No usable sample.*missing\.png"):
        build_shards(TableSource(str(table)), str(tmp_path / "out"), BuildOptions(progress=False))


def test_a_split_of_which_nothing_can_be_used_says_why(tmp_path, make_table):
    """The first of its own, however many others were left out before."""
    table = make_table(8)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    for row in rows:
        row["split"] = "val" if row["object_id"] == rows[-1]["object_id"] else "train"
        if row["split"] == "val" or row is rows[0]:
            (table.parent / row["image"]).write_bytes(b"")
    table.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SourceError, match="in split 'val', all of its images were left out") as caught:
        build_shards(TableSource(str(table), captions=["name"]), str(tmp_path / "set"), BuildOptions(progress=False))
    told = str(caught.value)
    assert rows[0]["image"] not in told and rows[-1]["image"] in told and "is empty" in told and "Mend these" in told


def test_splits_that_are_missing_are_told(tmp_path, make_table):
    table = make_table(9)
    whole = table.read_text()
    for names, said in [
        (("train", "val", "test"), []),
        (("trn", "0", "eval"), ["the set has the splits 0, eval, trn alone (no train: nothing can be trained on it; "]),
        (("train",), ["the set has the split train alone (no val: no checkpoint or refinement can be chosen by it; no test: "]),
    ]:
        rows = [json.loads(line) for line in whole.splitlines()]
        objects = sorted({row["object_id"] for row in rows})
        table.write_text("\n".join(json.dumps({**r, "split": names[objects.index(r["object_id"]) % len(names)]}) for r in rows))
        source = TableSource(str(table), captions=["name"])
        found = build_shards(source, str(tmp_path / "set"), BuildOptions(progress=False, overwrite=True))["warnings"]
        assert len(found) == len(said) and all(line.startswith(begin) for line, begin in zip(found, said))


def test_ids_must_be_unique(tmp_path):
    class Twice:
        name, min_images, skipped = "twice", 1, []

        def objects(self):
            image = SourceImage("i", "i", ["text"])
            return [SourceObject("train", "a", [image]), SourceObject("val", self.other, [image])]

    source = Twice()
    for other, message in [("a", "Object 'a' appears twice"), ("b", "Image id 'i' appears twice")]:
        source.other = other
        with pytest.raises(SourceError, match=message):
            build_shards(source, str(tmp_path / "out"), BuildOptions(progress=False))


def test_hash_split_is_fixed():
    fractions = {"train": 0.7, "val": 0.1, "test": 0.2}
    found = [hash_split(f"object {i}", fractions) for i in range(2000)]
    assert hash_split("1f600", fractions) == "train" and hash_split("1f300", fractions) == "test"
    for split, fraction in fractions.items():
        assert abs(found.count(split) / 2000 - fraction) < 0.03
