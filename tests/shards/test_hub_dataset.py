"""Datasets of the real library: saved, as Parquet files, as an imagefolder, streamed from a hub on the loopback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.hub import run_commands, running_hub
from support.image_tables import rows_of
from support.images import encoded

from mmref.errors import SourceError
from mmref.shards.build import BuildOptions, build_shards, make_source

datasets = pytest.importorskip("datasets")
OPTIONS = BuildOptions(workers=0, min_shards=2, progress=False)
PARTS = {"train": (24, 0), "validation": (5, 24), "test": (6, 36)}  # rows, the first's number


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def dataset(parts: dict[str, tuple[int, int]] = PARTS, **columns: list):
    """A DatasetDict of the rows; the label of a row is its number // 4, so that none is in two splits."""
    names = [f"class {i}" for i in range(12)]
    kinds = {
        "image": datasets.Image(), "text": datasets.Value("string"), "more": datasets.List(datasets.Value("string")),
        "label": datasets.ClassLabel(names=names), "weight": datasets.Value("float64"),
    }  # fmt: skip
    made = {}
    for split, (count, first) in parts.items():
        rows = [{**row, "label": (first + i) // 4} for i, row in enumerate(rows_of(count, first))]
        made[split] = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    return datasets.DatasetDict(made)


def as_parquet(root: Path) -> Path:
    """The files that `push_to_hub` writes; train in two."""
    (root / "data").mkdir(parents=True)
    for split, rows in dataset().items():
        count = 2 if split == "train" else 1
        for number in range(count):
            rows.shard(count, number, contiguous=True).to_parquet(
                str(root / "data" / f"{split}-{number:05d}-of-{count:05d}.parquet")
            )
    return root


def build(place: Path | str, out: Path, **options) -> dict:
    return build_shards(make_source("dataset", dataset=str(place), **options), str(out), OPTIONS)


def tars(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.tar"))}


def test_saved_and_parquet_give_the_same_set(tmp_path, capfd):
    dataset().save_to_disk(str(tmp_path / "saved"), num_shards={"train": 3, "validation": 1, "test": 1})
    as_parquet(tmp_path / "parquet")
    manifest = build(tmp_path / "saved", tmp_path / "a", object_id="label", keep=["weight"])
    assert "images: image; captions: text; object ids: label; there are also more, weight" in capfd.readouterr().err
    counts = {split: (told["objects"], told["images"]) for split, told in manifest["splits"].items()}
    assert counts == {"train": (6, 24), "val": (2, 5), "test": (2, 6)}
    assert not manifest["warnings"] and not manifest["skipped"]["count"]
    build(tmp_path / "parquet", tmp_path / "b", object_id="label", keep=["weight"])
    assert tars(tmp_path / "a") == tars(tmp_path / "b")


def test_one_split_without_objects(tmp_path):
    dataset()["train"].save_to_disk(str(tmp_path / "one"))
    manifest = build(tmp_path / "one", tmp_path / "a", captions=["text", "more"])
    assert list(manifest["splits"]) == ["train"] and manifest["splits"]["train"]["captions"] == 72
    assert "24 images have no object id: each is an object of its own" in manifest["warnings"]
    assert any("all of it is the split 'train': --resplit" in line for line in manifest["warnings"])
    assert set(build(tmp_path / "one", tmp_path / "b", resplit=True)["splits"]) == {"train", "val", "test"}
    limited = build(tmp_path / "one", tmp_path / "c", limit=5)
    assert limited["splits"]["train"]["images"] == 5


def test_splits_by_another_name(tmp_path):
    dataset().save_to_disk(str(tmp_path / "saved"))
    manifest = build(tmp_path / "saved", tmp_path / "a", split_map={"test": "val", "validation": "val", "train": ""})
    assert {split: told["images"] for split, told in manifest["splits"].items()} == {"val": 11}
    with pytest.raises(SourceError, match=r"--split-map valid=: .*saved has no such split, only train, validation, test"):
        build(tmp_path / "saved", tmp_path / "b", split_map={"valid": "val"})
    dataset({"train.clean": (6, 0)}).save_to_disk(str(tmp_path / "odd"))
    with pytest.raises(SourceError, match=r"'train.clean' cannot name a split.*--split-map train.clean=OURS"):
        build(tmp_path / "odd", tmp_path / "b")
    assert list(build(tmp_path / "odd", tmp_path / "b", split_map={"train.clean": "train"})["splits"]) == ["train"]
    dataset({"train": (6, 0), "test": (6, 6)}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(SourceError, match=r"object 'class 1' is in 'train' and in 'test'.*--resplit"):
        build(tmp_path / "both", tmp_path / "c", object_id="label")


def test_an_imagefolder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / "f" / split).mkdir(parents=True)
        rows = [{"file_name": f"{i}.png", "text": f"thing {i}", "object_id": f"{split}{i // 2}"} for i in range(4)]
        (tmp_path / "f" / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        for i in range(4):
            (tmp_path / "f" / split / f"{i}.png").write_bytes(encoded(i))
    source = make_source("dataset", dataset=str(tmp_path / "f"))
    objects = {(o.split, o.object_id): o.images for o in source.objects()}
    assert {key: len(images) for key, images in objects.items()} == {
        (split, f"{split}{i}"): 2 for split in ("train", "test") for i in range(2)
    }
    first = objects["test", "test1"][0]
    assert first.captions == ["thing 2"] and source.load(first.ref) == encoded(2)
    assert first.ref.path == str(tmp_path / "f" / "test" / "2.png"), "it is read where it lies"


def test_a_saved_row_may_name_no_file_outside(tmp_path):
    kinds = datasets.Features(
        {"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}, "text": datasets.Value("string")}
    )
    (tmp_path / "secret.png").write_bytes(encoded(1))
    rows = [
        {"image": {"bytes": None, "path": str(tmp_path / "secret.png")}, "text": "x"},
        {"image": {"bytes": encoded(2), "path": None}, "text": "y"},
    ]
    datasets.Dataset.from_list(rows, features=kinds).save_to_disk(str(tmp_path / "saved"))
    source = make_source("dataset", dataset=str(tmp_path / "saved"))
    assert [image.captions for image in source.images()] == [["y"]]
    assert "--allow-outside" in source.left_out[0][1]


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        (
            {"caption": "text", "text": "text"},
            {},
            "2 columns that may be captions, caption, text: name those that are with --captions",
        ),
        (
            {"title": "text", "notes": "text"},
            {},
            r"2 columns that may be captions, title, notes.*Its columns: image \(images\), title",
        ),
        ({"n": "number"}, {}, r"has no column of texts: name those that are with --captions"),
        ({"text": "text", "other": "image"}, {}, "2 columns of images, image, other: name one with --image"),
        ({"text": "text"}, {"object_id": "sku"}, "no column 'sku', only image, text.*--object-id"),
        ({"text": "text"}, {"keep": ["sku"]}, "no column 'sku'.*--keep"),
        ({"text": "text", "image_id": "number"}, {"keep": ["image_id"]}, "--keep image_id: a sample has a field of that name"),
        ({"text": "text"}, {"image": "text"}, "the column 'text' holds no images"),
    ],
)
def test_columns_that_are_not_plain(tmp_path, columns, options, words):
    kinds = {"text": ("x", datasets.Value("string")), "number": (1, datasets.Value("int64"))}
    kinds["image"] = ({"bytes": encoded(1), "path": None}, datasets.Image())
    told = {"image": kinds["image"], **{name: kinds[kind] for name, kind in columns.items()}}
    made = datasets.Dataset.from_list(
        [{n: v for n, (v, _) in told.items()}], features=datasets.Features({n: f for n, (_, f) in told.items()})
    )
    made.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(SourceError, match=words):
        make_source("dataset", dataset=str(tmp_path / "saved"), **options).objects()


def test_places_that_hold_no_dataset(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text("a,b\n")
    for place, words in (
        (tmp_path / "empty", "empty cannot be opened"),
        (tmp_path / "t.csv", "neither a folder nor a Parquet file"),
        ("../none/here", "no name of a dataset on a hub"),
    ):
        with pytest.raises(SourceError, match=words):
            make_source("dataset", dataset=str(place)).objects()


# -- by id -----------------------------------------------------------------------------------------------------------


def test_a_dataset_by_its_id_is_streamed(tmp_path):
    as_parquet(tmp_path / "hub" / "me" / "things")
    (tmp_path / "hub" / "me" / "things" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Things\n")
    build(tmp_path / "hub" / "me" / "things", tmp_path / "local", object_id="label")
    with running_hub() as hub:
        hub.add(tmp_path / "hub", "datasets/")
        status, said = run_commands(
            tmp_path, hub.endpoint, "shards build dataset me/things --object-id label --out streamed --workers 0 --min-shards 2",
            "shards build dataset hf://datasets/me/things@main --limit 3 --out few --workers 0 --split-map test=val validation=",
        )  # fmt: skip
        assert status == 0, said
        assert tars(tmp_path / "streamed") == tars(tmp_path / "local")
        assert sorted(p.name for p in (tmp_path / "streamed").iterdir()) == [
            "manifest.json",
            "objects.parquet",
            "test",
            "train",
            "val",
        ]
        assert json.loads((tmp_path / "streamed" / "manifest.json").read_text())["licence"] == "cc-by-4.0"
        few = json.loads((tmp_path / "few" / "manifest.json").read_text())["splits"]
        assert {split: told["images"] for split, told in few.items()} == {"train": 3, "val": 3}
        assert not list((tmp_path / "home").rglob("*.arrow")), "nothing of it is kept"
        for name, words in (
            ("me/nothing", "me/nothing is no folder here, and http://127.0.0.1"),
            ("me/things@nope", "has no such revision"),
            ("me/things --config other", "'other' not found. Available: ['default']"),
        ):
            status, said = run_commands(tmp_path, hub.endpoint, f"shards build dataset {name} --out none --workers 0")
            assert status == 1 and words in said and "Traceback" not in said
    status, said = run_commands(
        tmp_path, hub.endpoint, "shards build dataset me/things --out none --workers 0", HF_HUB_OFFLINE="1"
    )
    assert status == 1 and "cannot be reached (HF_HUB_OFFLINE is set)" in said
