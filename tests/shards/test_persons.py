"""The four person sets on tiny trees in their exact format."""

from __future__ import annotations

import json

import pytest

from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import SourceError
from mmref.shards.build import BuildOptions, build_shards, make_source
from mmref.shards.samples import hash_fraction

PERSONS = {"train": 6, "val": 2, "test": 2}  # of each split
TREES = {  # source -> annotation file, key of the path, first number, whether val is a split of its own
    "cuhk": ("reid_raw.json", "file_path", 1, True),
    "icfg": ("ICFG-PEDES.json", "file_path", 0, False),
    "rstp": ("data_captions.json", "img_path", 0, True),
    "ufine": ("anything.json", "file_path", 0, False),
}


@pytest.fixture
def make_tree(tmp_path, encode):
    def make(kind, change=lambda entries: None):
        """Two images a person and two captions an image, the second image in a folder of its own; returns the root."""
        file, path_key, first, has_val = TREES[kind]
        root, entries, number = tmp_path / kind, [], first
        for split in ("train", "val", "test") if has_val else ("train", "test"):
            for _ in range(PERSONS[split]):
                for i in range(2):
                    path = f"{split}/{number:04d}/{i}.jpg" if i else f"{number:04d}_c{i}.jpg"
                    (root / "imgs" / path).parent.mkdir(parents=True, exist_ok=True)
                    (root / "imgs" / path).write_bytes(encode(2 * number + i, "JPEG"))
                    captions = [f"person {number} in red", f" view {i} of them "]
                    entries.append({"split": split, "captions": captions, path_key: path, "processed_tokens": [["a"]],
                                    "id": number})  # fmt: skip
                number += 1
        change(entries)
        (root / file).write_text(json.dumps(entries))
        return root

    return make


def build(source, out):
    return build_shards(source, str(out), BuildOptions(progress=False))


@pytest.mark.parametrize("kind", ["cuhk", "rstp"])
def test_sets_with_a_val_split(make_tree, tmp_path, encode, kind):
    manifest = build(make_source(kind, root=str(make_tree(kind))), tmp_path / "set")
    counts = {split: (e["objects"], e["images"], e["captions"]) for split, e in manifest["splits"].items()}
    assert counts == {"train": (6, 12, 24), "val": (2, 4, 8), "test": (2, 4, 8)}
    shards = ShardSet.open(str(tmp_path / "set"))
    assert shards.verify() == []
    index = shards.index("test")
    at = index.image_ids.index(f"test/{8 + TREES[kind][2]:04d}/1.jpg")
    raw = SampleReader(index).read(at)
    number = 8 + TREES[kind][2]
    assert raw.image_bytes == encode(2 * number + 1, "JPEG") and raw.meta["object_id"] == f"test-{number}"
    assert raw.meta["captions"] == [f"person {number} in red", "view 1 of them"]
    assert raw.meta["caption_kinds"] == ["human", "human"]


@pytest.mark.parametrize("kind", ["icfg", "ufine"])
def test_sets_without_val_hold_some_train_persons_out_by_a_fixed_hash(make_tree, kind):
    root = str(make_tree(kind))
    splits = {o.object_id: o.split for o in make_source(kind, root=root, val_fraction=0.4).objects()}
    assert len(splits) == 8 and sum(s == "test" for s in splits.values()) == 2
    for object_id, split in splits.items():
        if object_id.startswith("train"):
            assert split == ("val" if hash_fraction(object_id) < 0.4 else "train")
    assert "val" in splits.values() and "train" in splits.values()
    none = {o.split for o in make_source(kind, root=root, val_fraction=0.0).objects()}
    assert none == {"train", "test"}


@pytest.mark.parametrize("kind, first", [("cuhk", "train: 6 objects, the publication has 11,003"),
                                         ("icfg", "train+val: 6 objects, the publication has 3,102"),
                                         ("rstp", "train: 6 objects, the publication has 3,701"),
                                         ("ufine", "train+val+test: 8 objects, the publication has 6,926")])  # fmt: skip
def test_counts_that_are_not_the_published_ones_are_a_warning_with_both(make_tree, tmp_path, kind, first):
    warnings = build(make_source(kind, root=str(make_tree(kind))), tmp_path / "set")["warnings"]
    assert warnings[0] == first
    form = make_source(kind, root=str(tmp_path / kind)).form
    counted = [line for line in warnings if "the publication has" in line]
    assert len(counted) == sum(len(counts) for counts in form.published.values())


def test_the_published_counts_are_no_warning(make_tree, tmp_path):
    source = make_source("cuhk", root=str(make_tree("cuhk")))
    source.published = {"train": {"objects": 6, "captions": 24}, "val+test": {"images": 8}}
    assert build(source, tmp_path / "set")["warnings"] == []


def test_a_number_that_returns_in_another_split_is_another_person(make_tree):
    def renumber(entries):
        for entry in entries:
            entry["id"] -= 6 if entry["split"] == "test" else 0

    ids = [o.object_id for o in make_source("icfg", root=str(make_tree("icfg", renumber)), val_fraction=0.0).objects()]
    assert {"train-0", "test-0"} <= set(ids) and len(ids) == 8


def test_entries_of_one_image_are_one_image_with_all_captions(make_tree):
    source = make_source("cuhk", root=str(make_tree("cuhk", lambda e: e.append({**e[0], "captions": ["another"]}))))
    image = next(iter(source.objects())).images[0]
    assert image.captions == ["person 1 in red", "view 0 of them", "another"] and len(image.caption_kinds) == 3


def test_missing_image_and_captions_are_left_out_and_named(make_tree, tmp_path):
    root = make_tree("cuhk", lambda entries: entries[1].update(captions=[" "]))
    (root / "imgs" / "0002_c0.jpg").unlink()
    manifest = build(make_source("cuhk", root=str(root)), tmp_path / "set")
    assert manifest["splits"]["train"]["images"] == 10
    assert any("0002_c0.jpg" in line for line in manifest["skipped"]["first"]) and manifest["skipped"]["count"] == 2


@pytest.mark.parametrize("change, said", [
    (lambda e: e[0].pop("id"), "entry 1 has no 'id'"),
    (lambda e: e[2].pop("file_path"), "entry 3 has no 'file_path'"),
    (lambda e: e[0].update(split="dev"), "split 'dev' is none of"),
    (lambda e: e[0].update(captions="text"), "captions must be a list"),
    (lambda e: e.append({**e[0], "id": 2}), "shows the persons train-1 and train-2"),
])  # fmt: skip
def test_entries_that_are_not_as_the_format_says(make_tree, change, said):
    with pytest.raises(SourceError, match=said):
        list(make_source("cuhk", root=str(make_tree("cuhk", change))).objects())


def test_values_that_are_missing_or_no_text_are_listed(make_tree):
    def change(entries):
        entries[0].update(captions=["one", None, float("nan"), " "], id=1.0)
        entries[1].update(captions=[{"text": "one"}])
        entries[2].update(id=None)
        entries[4].update(file_path=None)

    source = make_source("cuhk", root=str(make_tree("cuhk", change)))
    found = {item.object_id: [image.captions for image in item.images] for item in source.objects()}
    assert found["train-1"] == [["one"]] and len(found["train-2"]) == len(found["train-3"]) == 1
    assert [line.partition(":")[0] for line in source.skipped] == ["entry 2", "entry 3", "entry 5"]
    assert source.skipped[1:] == ["entry 3: no id", "entry 5: no file_path"] and "captions is" in source.skipped[0]


def test_wrong_folder_file_and_fraction(make_tree, tmp_path):
    with pytest.raises(SourceError, match=r"reid_raw.json is missing.*--annotations"):
        make_source("cuhk", root=str(tmp_path))
    root = make_tree("cuhk")
    (tmp_path / "broken.json").write_text("[")
    with pytest.raises(SourceError, match=r"broken.json cannot be read"):
        list(make_source("cuhk", root=str(root), annotations=str(tmp_path / "broken.json")).objects())
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(SourceError, match="found a dict"):
        list(make_source("cuhk", root=str(root), annotations=str(tmp_path / "broken.json")).objects())
    with pytest.raises(SourceError, match="--val-fraction"):
        make_source("icfg", root=str(make_tree("icfg")), val_fraction=1.0)


def test_images_without_an_image_folder_lie_in_the_root(make_tree):
    root = make_tree("ufine")
    for path in (root / "imgs").iterdir():
        path.rename(root / path.name)
    (root / "imgs").rmdir()
    source = make_source("ufine", root=str(root))
    assert source.load(next(iter(source.objects())).images[0].ref)


def test_paths_that_name_their_folder_or_come_from_windows(make_tree, tmp_path):
    def rewrite(entries):
        for entry in entries:
            entry["file_path"] = f"imgs/{entry['file_path']}".replace("/", "\\")
            entry["split"] = entry["split"].upper()

    root = make_tree("cuhk", rewrite)
    file = root / "reid_raw.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # as Windows' editors save UTF-8
    manifest = build(make_source("cuhk", root=str(root)), tmp_path / "set")
    assert manifest["skipped"]["count"] == 0 and manifest["splits"]["train"]["images"] == 12
    assert ShardSet.open(str(tmp_path / "set")).index("test").image_ids[0].startswith("imgs/")


def test_another_image_folder(make_tree, tmp_path):
    root = make_tree("cuhk")
    (root / "imgs").rename(root / "images")
    assert build(make_source("cuhk", root=str(root)), tmp_path / "one")["skipped"]["count"] == 0
    (root / "images").rename(tmp_path / "photographs")
    with pytest.raises(SourceError, match=r"No such file in .*--images names another folder"):
        build(make_source("cuhk", root=str(root)), tmp_path / "two")
    named = make_source("cuhk", root=str(root), images=str(tmp_path / "photographs"))
    assert build(named, tmp_path / "two")["skipped"]["count"] == 0


def test_files_that_are_not_there_and_one_too_many(make_tree, tmp_path):
    for options, said in (
        ({"root": str(tmp_path / "none")}, "--root .*none is no folder"),
        ({"root": str(tmp_path), "images": "nowhere"}, "--images nowhere is no folder"),
        ({"root": str(tmp_path), "annotations": "none.json"}, r"--annotations .*none.json is no file"),
    ):
        with pytest.raises(SourceError, match=said):
            make_source("cuhk", **options)
    root = make_tree("ufine")
    (root / "another.json").write_text("[]")
    with pytest.raises(SourceError, match=r"2 files that may hold the annotations \(another.json, anything.json\)"):
        make_source("ufine", root=str(root))
    root = make_tree("cuhk", lambda entries: [entry.pop("split") for entry in entries])
    (root / "reid_raw.json").rename(root / "caption_all.json")
    with pytest.raises(SourceError, match=r"reid_raw.json is missing.*caption_all.json, which is there, has no splits"):
        make_source("cuhk", root=str(root))
    source = make_source("cuhk", root=str(root), annotations=str(root / "caption_all.json"))
    with pytest.raises(SourceError, match=r"entry 1 has no 'split'.*caption_all.json has no splits: give reid_raw.json"):
        list(source.objects())
