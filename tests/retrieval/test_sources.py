"""Indexes of what shard sets are built from too: folders of objects, Parquet files that hold images, datasets; and of tars."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
from support.hub import run_commands, running_hub
from support.image_tables import rows_of, write_table
from support.images import encoded

from mmref.errors import SearchIndexError, SourceError
from mmref.retrieval import index
from mmref.retrieval.images import TableColumns, list_images
from mmref.retrieval.manifest import Source
from mmref.retrieval.searcher import Query, Searcher
from mmref.retrieval.set_aside import read_skipped

LABELS = TableColumns(object_id="label")


@pytest.fixture
def things(tmp_path):
    """A folder of three objects of two pictures."""
    root = tmp_path / "things"
    for number, name in enumerate(("red_chair", "mug", "lamp")):
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.png").write_bytes(encoded(2 * number + i))
            (root / name / f"{i}.txt").write_text(f"{name} {i}\nagain\n")
    return root


def test_folders_are_objects_where_every_picture_lies_in_one(things, run, tmp_path):
    manifest = index.create(str(things), str(run), str(tmp_path / "out"), workers=0)
    assert manifest.notes == ["3 folders taken as objects (--folders plain: they mean nothing)"]
    searcher = Searcher(str(tmp_path / "out"))
    assert searcher.item("mug/1.png") | {"object_id": "mug", "caption": "mug 1"} == searcher.item("mug/1.png")
    (found,) = searcher.search_many_objects([Query("a mug")], 3)
    assert {result.object_id for result in found} == {"red_chair", "mug", "lamp"}
    plain = list_images(str(things), columns=TableColumns(folders="plain"))
    assert plain.items["object_id"].null_count == 6 and not plain.notes and len(plain.captions) == 7
    (things / "top.png").write_bytes(encoded(9))
    assert list_images(str(things)).items["object_id"].null_count == 7, "a picture of no object: folders are only folders"
    assert list_images(str(things), columns=TableColumns(folders="objects")).items["object_id"].null_count == 1


def test_a_split_of_a_folder(things, tmp_path):
    shutil.move(things, tmp_path / "root" / "train")
    listing = list_images(str(tmp_path / "root"), "train")
    assert set(listing.items["object_id"].to_pylist()) == {"red_chair", "mug", "lamp"}
    with pytest.raises(SearchIndexError, match="root has no split 'val', only train"):
        list_images(str(tmp_path / "root"), "val")


@pytest.mark.parametrize("given", ["p/data/train-0.parquet", "p/data/*.parquet", "p"])
def test_rows_of_parquet_files(run, tmp_path, given):
    write_table(tmp_path / "p" / "data" / "train-0.parquet", rows_of(9))
    if given != "p/data/train-0.parquet":
        write_table(tmp_path / "p" / "data" / "test-0.parquet", rows_of(4, 20))
    count = 9 if given == "p/data/train-0.parquet" else 13
    out = str(tmp_path / "out")
    manifest = index.create(str(tmp_path / given), str(run), out, columns=LABELS, workers=0)
    assert manifest.items == count and manifest.notes == ["columns of the table that were not taken: more (no single values)"]
    searcher = Searcher(out)
    assert searcher.image_bytes("8.png") == encoded(8)
    told = {"object_id": "owl", "caption": "thing 8", "weight": 8.0, "split": "train", "width": 30}
    assert searcher.item("8.png") | told == searcher.item("8.png")
    heat, wanted = (searcher.explain(Query("a thing"), "3.png", encoded=data).heat for data in (None, encoded(3)))
    assert heat.any() and (heat == wanted).all()
    assert index.add(out, str(tmp_path / given), columns=LABELS, workers=0).generation == 1, "nothing has changed"
    # Written anew, a row shorter and with another picture in the first.
    rows = rows_of(8)
    rows[0]["image"]["bytes"] = encoded(77)
    write_table(tmp_path / "p" / "data" / "train-0.parquet", rows)
    changed = index.sync(out, Source(str(tmp_path / given), columns=LABELS), workers=0)
    assert changed.items == count - 1
    assert changed.notes[:2] == ["0 images added", "1 have changed since and were embedded again"]
    assert any("1 items are not in" in line and line.endswith("and were removed: 8.png") for line in changed.notes)
    searcher = Searcher(out)
    assert searcher.image_bytes("0.png") == encoded(77) and searcher.image_bytes("7.png") == encoded(7)


@pytest.mark.parametrize("given", ["p/t.parquet", "p"])
def test_files_that_rows_name_lie_below_the_image_root(tmp_path, given):
    rows = rows_of(3)
    rows[1]["image"] = {"bytes": None, "path": "1.png"}
    write_table(tmp_path / "p" / "t.parquet", rows)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(encoded(1))
    listing = list_images(str(tmp_path / given), columns=TableColumns(image_root=str(tmp_path / "pictures")))
    assert listing.items["id"].to_pylist() == ["0.png", "1.png", "2.png"] and not listing.skipped
    assert listing.items["path"][1].as_py() == str(tmp_path / "pictures" / "1.png")


def test_a_row_without_a_picture_costs_itself_alone(run, tmp_path):
    rows = rows_of(4)
    rows[1]["image"], rows[2]["image"]["bytes"] = None, b"no picture"
    rows[3]["weight"] = float("inf")
    file = write_table(tmp_path / "t.parquet", rows)
    manifest = index.create(str(file), str(run), str(tmp_path / "out"), workers=0)
    assert (manifest.items, manifest.skipped) == (2, 2)
    assert {s["id"] for s in read_skipped(tmp_path / "out")} == {"t, row 2", "2.png"}
    assert any("infinite numbers of the table that are kept as missing: weight (1)" in line for line in manifest.notes)


def test_ids_of_a_column(tmp_path):
    rows = [{**row, "sku": f"s{i // 2}"} for i, row in enumerate(rows_of(4))]
    listing = list_images(str(write_table(tmp_path / "t.parquet", rows)), columns=TableColumns(item_id="sku"))
    assert listing.items["id"].to_pylist() == ["s0", "s1"]
    assert listing.skipped[0] == ("t, row 2", "the id 's0' is that of an earlier row")
    for columns, words in ((TableColumns(item_id="nr"), "--id-column"), (TableColumns(object_id="nr"), "--object-column")):
        with pytest.raises(SourceError, match=f"no column 'nr'.*{words}"):
            list_images(str(tmp_path / "t.parquet"), columns=columns)


def test_a_saved_dataset(run, tmp_path):
    datasets = pytest.importorskip("datasets")
    kinds = datasets.Features({
        "image": datasets.Image(), "text": datasets.Value("string"), "more": datasets.List(datasets.Value("string")),
        "label": datasets.ClassLabel(names=["cat", "dog", "owl"]), "weight": datasets.Value("float64"),
    })  # fmt: skip
    parts = {
        "train": datasets.Dataset.from_list(rows_of(9), kinds),
        "validation": datasets.Dataset.from_list(rows_of(4, 20), kinds),
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    out = str(tmp_path / "out")
    assert index.create(str(tmp_path / "saved"), str(run), out, columns=LABELS, workers=0).items == 13
    searcher = Searcher(out)
    assert searcher.image_bytes("21.png") == encoded(21)
    assert searcher.item("21.png")["split"] == "val" and searcher.item("5.png")["object_id"] == "dog"
    assert index.add(out, str(tmp_path / "saved"), columns=LABELS, workers=0).generation == 1
    assert len(list_images(str(tmp_path / "saved"), "validation").items) == 4
    with pytest.raises(SearchIndexError, match="saved has no split 'test', only train, val"):
        list_images(str(tmp_path / "saved"), "test")


def test_a_dataset_of_a_hub(run, tmp_path):
    pytest.importorskip("datasets")
    for split, first in (("train", 0), ("validation", 20)):
        write_table(tmp_path / "hub" / "me" / "things" / "data" / f"{split}-00000-of-00001.parquet", rows_of(8, first))
    made = f"index me/things --model {run} --out out --workers 0 --object-column label"
    with running_hub() as hub:
        hub.add(tmp_path / "hub", "datasets/")
        status, said = run_commands(tmp_path, hub.endpoint, made, "search out thing --by object --top 3")
        assert status == 0 and "downloading into" in said and "out: 16 images" in said and "owl" in said, said
        status, said = run_commands(
            tmp_path, hub.endpoint, made.replace("me/things", "me/nothing").replace("--out out", "--out no")
        )
        assert status == 1 and "me/nothing is no folder here, and http://127.0.0.1" in said
    searcher = Searcher(str(tmp_path / "out"))
    assert searcher.item("23.png")["split"] == "val" and searcher.image_bytes("23.png") == encoded(23)
    again = "index add out hf://datasets/me/things --workers 0 --object-column label"
    status, said = run_commands(tmp_path, hub.endpoint, again, HF_HUB_OFFLINE="1")
    assert status == 0 and "0 images added" in said, "the library's cache holds it"


@pytest.mark.parametrize("given", ["tars", "tars/*.tar", "tars/0.tar"])
def test_tars_are_to_be_indexed_first(tmp_path, given):
    (tmp_path / "tars").mkdir()
    for number in range(2):
        with tarfile.open(tmp_path / "tars" / f"{number}.tar", "w") as tar:
            tar.add(Path(__file__), "a.json")
    count = 1 if given == "tars/0.tar" else 2
    with pytest.raises(SearchIndexError, match=rf"holds {count} tars \(0.tar, ...\).*`mmref shards index '.*\.tar' --out SET`"):
        list_images(str(tmp_path / given))
    shutil.move(tmp_path / "tars" / "0.tar", tmp_path / "tars" / "0.tar.gz")
    if given == "tars":
        with pytest.raises(SearchIndexError, match=r"Unpack those that end in .gz"):
            list_images(str(tmp_path / given))


def test_a_glob_that_matches_nothing_of_use(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    with pytest.raises(
        SearchIndexError, match=r"\*.png matches no Parquet files with images in them; of other files give the folder"
    ):
        list_images(str(tmp_path / "*.png"))
