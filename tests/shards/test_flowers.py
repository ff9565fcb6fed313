"""The Oxford Flowers-102 source on a tiny tree in the native layout."""

from __future__ import annotations

import pytest

from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import SourceError
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.sources.flowers import FlowersSource

CLASSES = ["class_00001", "class_00002", "class_00003"]


@pytest.fixture
def flowers(tmp_path, encode):
    """Three species of two photographs each, ten captions an image; returns the folder."""
    root, number = tmp_path / "flowers", 0
    (root / "jpg").mkdir(parents=True)
    for name in CLASSES:
        (root / "text_c10" / name).mkdir(parents=True)
        for _ in range(2):
            number += 1
            (root / "jpg" / f"image_{number:05d}.jpg").write_bytes(encode(number, "JPEG"))
            lines = [f"flower {number} with petal {k}" for k in range(10)]
            (root / "text_c10" / name / f"image_{number:05d}.txt").write_text("\n".join(lines) + "\n")
        (root / "text_c10" / name / "image_00001.h5").write_bytes(b"features that some releases carry")
    for split, name in zip(("train", "val", "test"), CLASSES):
        (root / f"{split}classes.txt").write_text(name + "\n")
    return root


def test_native_layout(flowers, tmp_path, encode):
    manifest = build_shards(FlowersSource(str(flowers)), str(tmp_path / "set"), BuildOptions(progress=False))
    counts = {split: (e["objects"], e["images"], e["captions"]) for split, e in manifest["splits"].items()}
    assert counts == dict.fromkeys(("train", "val", "test"), (1, 2, 20))
    shards = ShardSet.open(str(tmp_path / "set"))
    assert shards.verify() == []
    raw = SampleReader(shards.index("val")).read(1)
    assert raw.image_bytes == encode(4, "JPEG") and raw.meta["object_id"] == "class_00002"
    assert raw.meta["image_id"] == "image_00004" and raw.meta["captions"][3] == "flower 4 with petal 3"
    assert raw.meta["caption_kinds"] == ["human"] * 10
    assert "train+val+test: 6 images, the publication has 8,189" in manifest["warnings"]
    assert "train: 1 objects, the publication has 62" in manifest["warnings"]


def test_folders_apart_as_the_two_downloads_leave_them(flowers):
    (flowers / "cvpr2016_flowers").mkdir()
    for name in ("text_c10", *(f"{split}classes.txt" for split in ("train", "val", "test"))):
        (flowers / name).rename(flowers / "cvpr2016_flowers" / name)
    assert {o.object_id: o.split for o in FlowersSource(str(flowers)).objects()} == dict(zip(CLASSES, ("train", "val", "test")))


def test_left_out_are_images_without_captions_and_classes_without_a_split(flowers, encode):
    (flowers / "jpg" / "image_00099.jpg").write_bytes(encode(99, "JPEG"))
    (flowers / "testclasses.txt").unlink()
    source = FlowersSource(str(flowers))
    assert [o.object_id for o in source.objects()] == CLASSES[:2]
    assert source.skipped == ["image_00099.jpg: no captions in any class of text_c10/"]


def test_without_split_files_a_hash_splits(flowers):
    for split in ("train", "val", "test"):
        (flowers / f"{split}classes.txt").unlink()
    source = FlowersSource(str(flowers), {"all": 1.0})
    assert [o.split for o in source.objects()] == ["all"] * 3
    assert "no trainclasses.txt" in source.warnings[0] and source.origin.endswith("hash of their names")


def test_without_train_classes_nothing_is_built(flowers):
    """Of the usual pair one is not looked for, and nothing says which of its classes are val."""
    for split in ("train", "val"):
        (flowers / f"{split}classes.txt").unlink()
    with pytest.raises(SourceError, match=r"testclasses.txt but no trainclasses.txt.*left to train on\.$"):
        FlowersSource(str(flowers))
    (flowers / "trainvalclasses.txt").write_text("\n".join(CLASSES[:2]))
    with pytest.raises(SourceError, match=r"trainvalclasses.txt does not say which .* are val"):
        FlowersSource(str(flowers))


def test_classes_without_captions_have_no_images(flowers):
    for path in (flowers / "text_c10").glob("*/*.txt"):
        path.rename(path.with_suffix(".t7"))
    with pytest.raises(SourceError, match="no objects with images"):
        build_shards(FlowersSource(str(flowers)), str(flowers / "set"))


def test_upper_case_endings(flowers):
    for path in (flowers / "jpg").iterdir():
        path.rename(path.with_suffix(".JPG"))
    source = FlowersSource(str(flowers))
    refs = [image.ref for o in source.objects() for image in o.images]
    assert len(refs) == 6 and all(source.load(ref) for ref in refs) and source.skipped == []


def test_wrong_folder_and_lists(flowers, tmp_path):
    with pytest.raises(SourceError, match="jpg/ is missing"):
        FlowersSource(str(tmp_path / "nothing"))
    (flowers / "valclasses.txt").write_text("class_00104\n")
    with pytest.raises(SourceError, match="'class_00104', which text_c10/ does not have"):
        list(FlowersSource(str(flowers)).objects())
    (flowers / "valclasses.txt").write_text(CLASSES[0])
    with pytest.raises(SourceError, match=r"is in valclasses.txt and in trainclasses.txt"):
        list(FlowersSource(str(flowers)).objects())


def test_while_choosing_the_test_species_stay_apart(flowers):
    (flowers / "trainclasses.txt").write_text(f"{CLASSES[0]}\n{CLASSES[2]}\n")
    (flowers / "testclasses.txt").write_text("")
    found = {o.object_id: o.split for o in FlowersSource(str(flowers), val_fraction=0.5).objects()}
    assert found[CLASSES[1]] == "test" and sorted((found[CLASSES[0]], found[CLASSES[2]])) == ["train", "val"]
