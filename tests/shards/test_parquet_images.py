"""`shards build table` of Parquet files that hold the images: as bytes, as mappings; several files; rows that cannot be used."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.image_tables import rows_of, write_table
from support.images import encoded

from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import SourceError
from mmref.shards.build import BuildOptions, build_shards, make_source
from mmref.shards.sources import image_rows
from mmref.shards.sources.parquet_images import ParquetImages
from mmref.storage import image_places

OPTIONS = BuildOptions(workers=0, min_shards=2, progress=False)


def pixels(root) -> dict[str, tuple[bytes, list[str]]]:
    """Images and captions of a set by their ids."""
    shards, found = ShardSet.open(str(root)), {}
    for split in shards.splits:
        reader = SampleReader(shards.index(split))
        for i, name in enumerate(shards.index(split).image_ids):
            raw = reader.read(i)
            found[name] = raw.image_bytes, raw.meta["captions"]
    return found


def test_mappings_and_bytes_give_the_same_set(tmp_path):
    rows = rows_of(23)
    whole = write_table(tmp_path / "whole.parquet", rows)
    plain = write_table(tmp_path / "plain.parquet", [{**row, "image": row["image"]["bytes"]} for row in rows])
    for file in (whole, plain):
        source = make_source("table", path=str(file), object_id="label", captions=["text", "more"], keep=["weight"])
        build_shards(source, str(tmp_path / file.stem), OPTIONS)
    found = pixels(tmp_path / "whole")
    assert found["4.png"] == (encoded(4), ["thing 4", "no 4", "one of many"])
    assert set(found) == {f"{i}.png" for i in range(23)}
    named = {f"{int(name.split('-')[1]) - 1}.png": value for name, value in pixels(tmp_path / "plain").items()}
    assert named == found
    sample = SampleReader(ShardSet.open(str(tmp_path / "whole")).index("train")).read(0).meta
    assert sample["object_id"] in ("cat", "dog", "owl") and isinstance(sample["weight"], float)


@pytest.mark.parametrize("given", ["parts/*.parquet", "parts"])
def test_several_files(tmp_path, given):
    for number in range(3):
        write_table(tmp_path / "parts" / f"{number}.parquet", rows_of(4, 4 * number))
    images = list(make_source("table", path=str(tmp_path / given), object_id="label", captions=["text"]).images())
    assert [image.captions for image in images] == [[f"thing {i}"] for i in range(12)]
    source = make_source("table", path=str(tmp_path / given), object_id="label", captions=["text"])
    assert [source.load(image.place) for image in images] == [encoded(i) for i in range(12)]
    write_table(tmp_path / "parts" / "x.parquet", [{"image": b"\xff", "label": 1}], features=False)
    with pytest.raises(SourceError, match=r"x\.parquet and .*0\.parquet do not both have the column 'more'"):
        source.objects()


def test_rows_that_cannot_be_used(tmp_path):
    rows = rows_of(6)
    rows[0]["image"] = None
    rows[1]["image"] = {"bytes": None, "path": "../outside.png"}
    rows[2]["image"] = {"bytes": None, "path": "inside.png"}
    rows[3]["label"] = -1
    rows[4]["text"] = None
    rows[5]["image"] = {"bytes": b"no picture", "path": None}
    file = write_table(tmp_path / "in" / "t.parquet", rows)
    (tmp_path / "in" / "inside.png").write_bytes(encoded(2))
    (tmp_path / "outside.png").write_bytes(encoded(1))
    source = ParquetImages(str(file), object_id="label", captions=["text"], fractions={"train": 1.0})
    manifest = build_shards(source, str(tmp_path / "out"), OPTIONS)
    left = dict(line.split(": ", 1) for line in manifest["skipped"]["first"])
    assert set(left) == {"t, row 1", "t, row 2", "t, row 4", "4.png", "t-6"}
    assert left["t, row 1"] == "no image" and left["t, row 4"] == "no label" and "--allow-outside" in left["t, row 2"]
    assert "no caption" in left["4.png"] and "not an image" in left["t-6"]
    assert pixels(tmp_path / "out") == {"inside.png": (encoded(2), ["thing 2"])}
    outside = ParquetImages(str(file), object_id="label", captions=["text"], allow_outside=True)
    assert [image.image_id for image in outside.images()] == ["../outside.png", "inside.png", "4.png", "t-6"]


def test_the_same_name_twice(tmp_path):
    rows = [{**row, "image": {**row["image"], "path": "image.png"}} for row in rows_of(3)]
    rows[2]["image"]["path"] = "other.png"
    images = ParquetImages(str(write_table(tmp_path / "t.parquet", rows)), object_id="label", captions=["text"]).images()
    assert [image.image_id for image in images] == ["t-1", "t-2", "other.png"]


def test_bytes_that_are_a_path_are_one(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    table = pa.table({"image": pa.array([b"a.png"], pa.binary()), "object_id": ["x"], "caption": ["one"]})
    pq.write_table(table, tmp_path / "t.parquet")
    (item,) = make_source("table", path=str(tmp_path / "t.parquet")).objects()
    assert item.images[0].image_id == "a.png"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {},
            r"no column 'object_id', only image, text, more, label, weight, image_id. Name yours.*build dataset",
        ),
        ({"object_id": "label"}, None),
        ({"object_id": "label", "captions": ["txt"]}, "no column 'txt'.*--captions"),
        ({"object_id": "label", "captions": ["weight"]}, r"'weight' holds neither texts nor lists of texts \(double\)"),
        ({"object_id": "label", "split": "fold"}, "no column 'fold'.*--split"),
        ({"object_id": "label", "keep": ["shop"]}, "no column 'shop'.*--keep"),
        ({"object_id": "label", "keep": ["image_id"]}, "--keep image_id: a sample has a field of that name already"),
    ],
)
def test_columns_that_are_not_there(tmp_path, options, words):
    file = write_table(tmp_path / "t.parquet", [{**row, "image_id": "1"} for row in rows_of(3)])
    source = make_source("table", path=str(file), **options)
    if words is None:
        assert [image.captions for image in source.images()] == [["thing 0"], ["thing 1"], ["thing 2"]]
        return
    with pytest.raises(SourceError, match=words):
        source.objects()


def test_several_columns_of_texts_are_named(tmp_path):
    rows = [{**row, "caption": "x", "object_id": "o"} for row in rows_of(2)]
    source = make_source("table", path=str(write_table(tmp_path / "t.parquet", rows)))
    with pytest.raises(
        SourceError, match=r"2 columns that may be captions, text, caption: name those.*Its columns: image \(images\)"
    ):
        source.objects()


def test_a_path_that_no_file_can_have_costs_its_row_alone(tmp_path):
    rows = rows_of(3)
    rows[1]["image"] = {"bytes": None, "path": "a\0b.png"}
    source = make_source("table", path=str(write_table(tmp_path / "t.parquet", rows)), object_id="label", captions=["text"])
    assert [image.captions for image in source.images()] == [["thing 0"], ["thing 2"]]


def test_a_damaged_file_is_named(tmp_path):
    file = write_table(tmp_path / "t.parquet", rows_of(3))
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"t\.parquet cannot be read"):
        make_source("table", path=str(file), object_id="label")


def test_large_groups_of_rows_are_unpacked_once(tmp_path, monkeypatch):
    file = write_table(tmp_path / "t.parquet", rows_of(30), group=30)
    options = {"path": str(file), "object_id": "label", "captions": ["text"]}
    build_shards(make_source("table", **options), str(tmp_path / "small"), OPTIONS)
    monkeypatch.setattr(image_rows, "LARGE_GROUP", 1000)
    read = []
    monkeypatch.setattr(image_places, "_read_row", lambda *row: read.append(row))
    build_shards(make_source("table", **options), str(tmp_path / "large"), OPTIONS)
    assert pixels(tmp_path / "large") == pixels(tmp_path / "small") and not read
    assert not list((tmp_path / "large").rglob("*.bin"))


def test_paths_are_relative_to_the_file_of_their_row(tmp_path):
    for part, color in (("a", 1), ("b", 2)):
        rows = rows_of(1)
        rows[0]["image"] = {"bytes": None, "path": "1.png"}
        write_table(tmp_path / "parts" / part / "data.parquet", rows)
        (tmp_path / "parts" / part / "1.png").write_bytes(encoded(color))
    for given in ("parts/*/data.parquet", "parts"):
        source = make_source("table", path=str(tmp_path / given), object_id="label", captions=["text"])
        images = list(source.images())
        assert [source.load(image.place) for image in images] == [encoded(1), encoded(2)], given
        assert [image.image_id for image in images] == ["a/data-1", "b/data-1"], "ids do not tell where the data lies"


@pytest.mark.parametrize("path", ["0.png", None])
def test_a_row_a_caption_is_one_image(tmp_path, path):
    rows = [{**rows_of(1)[0], "text": text} for text in ("one", "two", "three")]
    rows += [{**rows_of(5)[4], "text": "four"}]
    for row in rows:
        row["image"]["path"] = path
    source = ParquetImages(str(write_table(tmp_path / "t.parquet", rows)), object_id="label", captions=["text"])
    first, second = source.images()
    assert (first.captions, second.captions) == (["one", "two", "three"], ["four"])
    assert source.warnings == ["2 rows hold the image of an earlier row, byte for byte: its captions are that image's"]
    rows[1]["label"] = 2
    write_table(tmp_path / "t.parquet", rows)
    assert [image.captions for image in source.images()] == [["one", "three"], ["two"], ["four"]], "of another object"


@pytest.mark.parametrize("kind", [pa.list_(pa.string(), 2), pa.large_list(pa.string()), pa.list_view(pa.string())])
def test_lists_of_captions_of_every_kind(tmp_path, kind):
    texts = pa.array([["a", "b"], ["c", "d"]], kind)
    table = pa.table({"image": [encoded(0), encoded(1)], "object_id": ["x", "y"], "captions": texts})
    pq.write_table(table, tmp_path / "t.parquet")
    images = make_source("table", path=str(tmp_path / "t.parquet"), captions=["captions"]).images()
    assert [image.captions for image in images] == [["a", "b"], ["c", "d"]]


def test_a_column_of_lists_of_images_is_named(tmp_path):
    table = pa.table({"image": [[{"bytes": encoded(0), "path": "a.png"}]], "object_id": ["x"], "caption": ["a"]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(SourceError, match="'image' holds lists of images, and a row is one image"):
        make_source("table", path=str(tmp_path / "t.parquet")).objects()


def test_columns_that_folders_are_named_after(tmp_path):
    for number, split in enumerate(("test", "train", "val")):
        write_table(tmp_path / "t" / f"split={split}" / "part-0.parquet", rows_of(4, 4 * number))
    images = list(make_source("table", path=str(tmp_path / "t"), object_id="label", captions=["text"]).images())
    assert [image.split for image in images] == ["test"] * 4 + ["train"] * 4 + ["val"] * 4
    lenient = ParquetImages(str(tmp_path / "t"), object_id="label", strict=False)
    assert [image.extra["split"] for image in lenient.images()] == ["test"] * 4 + ["train"] * 4 + ["val"] * 4


def test_a_cell_that_cannot_be_read_costs_its_row_alone(tmp_path):
    """As of other tables: a time beyond what Python knows, and floats of 32 bits as they were written."""
    seconds = pa.array([0, 600_000_000_000, 60], pa.timestamp("s"))
    table = pa.table({
        "image": [encoded(i) for i in range(3)], "object_id": ["a", "b", "c"], "caption": ["x"] * 3, "time": seconds,
        "share": pa.array([0.1, 0.2, 0.3], pa.float32()),
    })  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    source = make_source("table", path=str(tmp_path / "t.parquet"), keep=["time", "share"])
    assert [image.extra["share"] for image in source.images()] == [0.1, 0.3]
    assert [line.partition(": time: cannot be read")[0] for line in source.skipped] == ["t, row 2"]
