"""The CUB source on a tiny tree in the native layout, and on the real one when MMREF_CUB says where it is."""

from __future__ import annotations

import os
import tarfile

import pytest

from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import SourceError
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.samples import hash_fraction
from mmref.shards.sources.cub import CubSource

CLASSES = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Sooty_Albatross"]


@pytest.fixture
def cub(tmp_path, encode):
    """Three species of two photographs each, ten captions an image, native layout; returns the folder."""
    root = tmp_path / "cub"
    folder, text = root / "CUB_200_2011", root / "text_c10"
    images, labels = [], []
    for c, name in enumerate(CLASSES):
        for i in range(2):
            images.append(f"{2 * c + i + 1} {name}/Bird_{c}_{i}.jpg")
            labels.append(f"{2 * c + i + 1} {c + 1}")
            (folder / "images" / name).mkdir(parents=True, exist_ok=True)
            (folder / "images" / name / f"Bird_{c}_{i}.jpg").write_bytes(encode(2 * c + i, "JPEG"))
            (text / name).mkdir(parents=True, exist_ok=True)
            lines = [f"bird {c} of caption {k}" for k in range(9)] + ["bird 0 of caption 0"]  # people repeat themselves
            (text / name / f"Bird_{c}_{i}.txt").write_text("\n".join(lines) + "\n")
    (folder / "images.txt").write_text("\n".join(images) + "\n")
    (folder / "image_class_labels.txt").write_text("\n".join(labels) + "\n")
    (folder / "classes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(CLASSES, 1)))
    (folder / "trainclasses.txt").write_text(CLASSES[0] + "\n")
    (folder / "valclasses.txt").write_text(CLASSES[2] + "\n")
    return root


@pytest.mark.parametrize("below", ["", "CUB_200_2011"])
def test_native_layout(cub, tmp_path, encode, below):
    manifest = build_shards(CubSource(str(cub / below)), str(tmp_path / "set"), BuildOptions(progress=False))
    counts = {split: (e["objects"], e["images"], e["captions"]) for split, e in manifest["splits"].items()}
    assert counts == {"train": (1, 2, 20), "val": (1, 2, 20)}, "a class in no split file is left out"
    shards = ShardSet.open(str(tmp_path / "set"))
    assert shards.verify() == []
    raw = SampleReader(shards.index("val")).read(1)
    assert raw.image_bytes == encode(5, "JPEG") and raw.image_ext == "jpg"
    assert raw.meta["object_id"] == CLASSES[2] and raw.meta["image_id"] == f"{CLASSES[2]}/Bird_2_1"
    assert raw.meta["captions"][1] == "bird 2 of caption 1" and raw.meta["caption_kinds"] == ["human"] * 10
    assert "." not in shards.index("val").keys[1] and "/" not in shards.index("val").keys[1]


def test_missing_captions_image_and_label(cub, tmp_path):
    (cub / "text_c10" / CLASSES[0] / "Bird_0_0.txt").unlink()
    (cub / "CUB_200_2011" / "images" / CLASSES[2] / "Bird_2_0.jpg").unlink()
    labels = cub / "CUB_200_2011" / "image_class_labels.txt"
    labels.write_text(labels.read_text().replace("4 2\n", ""))
    manifest = build_shards(CubSource(str(cub)), str(tmp_path / "set"), BuildOptions(progress=False))
    assert [e["images"] for e in manifest["splits"].values()] == [1, 1]
    unlabelled, captionless, missing = manifest["skipped"]["first"]
    assert "Bird_1_1" in unlabelled and "no class" in unlabelled
    assert "Bird_0_0" in captionless and "no caption" in captionless
    assert "Bird_2_0" in missing and "No such file" in missing


def test_without_split_files_a_hash_splits(cub, tmp_path):
    for name in ("trainclasses.txt", "valclasses.txt"):
        (cub / "CUB_200_2011" / name).unlink()
    source = CubSource(str(cub), {"all": 1.0})
    assert [(o.object_id, o.split) for o in source.objects()] == [(name, "all") for name in CLASSES]
    manifest = build_shards(source, str(tmp_path / "set"), BuildOptions(progress=False))
    assert "no trainclasses.txt" in manifest["warnings"][0] and str(cub) in manifest["warnings"][0]
    assert manifest["source"].endswith("classes split by a hash of their names")
    assert "hash" not in CubSource.origin


def test_the_captions_release_spells_some_species_differently(cub, tmp_path):
    """As Reed's: `Sootys` for `Sooty`, in folders, images and class-split files."""
    theirs = CLASSES[2].replace("Sooty", "Sootys")
    (cub / "text_c10" / CLASSES[2]).rename(cub / "text_c10" / theirs)
    folder, images = cub / "CUB_200_2011", cub / "text_c10" / theirs
    (images / "Bird_2_1.txt").rename(images / "Birds_2_1.txt")
    # and as the two archives unpack: the class-split files beside the captions; a blank line at the end of a list
    (cub / "cvpr2016_cub").mkdir()
    for path in (cub / "text_c10", folder / "trainclasses.txt", folder / "valclasses.txt"):
        path.rename(cub / "cvpr2016_cub" / path.name)
    (cub / "cvpr2016_cub" / "valclasses.txt").write_text(theirs + "\n\n")
    with open(folder / "images.txt", "a") as listing:
        listing.write("\n")
    manifest = build_shards(CubSource(str(cub)), str(tmp_path / "set"), BuildOptions(progress=False))
    counts = {split: (e["objects"], e["images"], e["captions"]) for split, e in manifest["splits"].items()}
    assert counts == {"train": (1, 2, 20), "val": (1, 2, 20)} and manifest["skipped"]["count"] == 0
    raw = SampleReader(ShardSet.open(str(tmp_path / "set")).index("val")).read(1)
    assert raw.meta["object_id"] == CLASSES[2] and raw.meta["captions"][1] == "bird 2 of caption 1"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("valclasses.txt", CLASSES[0], "is in valclasses.txt and in trainclasses.txt"),
        ("valclasses.txt", "004.Ani", "'004.Ani', which classes.txt does not have"),
        ("images.txt", "1\n", "line 1: expected `<id> <value>`"),
        ("images.txt", None, "cannot be read"),
    ],
)
def test_broken_lists(cub, file, text, message):
    path = cub / "CUB_200_2011" / file
    path.write_text(text) if text else path.unlink()
    with pytest.raises(SourceError, match=message):
        CubSource(str(cub)).objects()


def test_wrong_folder(tmp_path, cub):
    with pytest.raises(SourceError, match="CUB_200_2011/images/ is missing"):
        CubSource(str(cub / "text_c10"))
    (tmp_path / "cub.tar").write_text("")
    with pytest.raises(SourceError, match="Unpack it"):
        CubSource(str(tmp_path / "cub.tar"))


@pytest.mark.skipif("MMREF_CUB" not in os.environ, reason="MMREF_CUB does not say where CUB-200-2011 is")
def test_real_cub(tmp_path):
    """MMREF_CUB: folder with CUB_200_2011/ and text_c10/, or a tar of the two."""
    path = os.environ["MMREF_CUB"]
    if os.path.isfile(path):
        with tarfile.open(path) as tar:
            tar.extractall(tmp_path / "cub", filter="data")
        path = str(tmp_path / "cub")
    source = CubSource(path)
    listed = list(source.objects())
    manifest = build_shards(source, str(tmp_path / "set"), BuildOptions(progress=False))
    splits = manifest["splits"]
    assert manifest["skipped"]["count"] == 0
    assert sum(e["images"] for e in splits.values()) == sum(len(item.images) for item in listed)
    for split, entry in splits.items():
        assert entry["objects"] == sum(item.split == split for item in listed)
        assert 9.9 < entry["captions"] / entry["images"] <= 10, "ten captions an image"
    assert ShardSet.open(str(tmp_path / "set")).verify() == []


def grow(cub, encode, count):
    """`count` more train species of one photograph each."""
    folder = cub / "CUB_200_2011"
    names = [f"{i:03d}.More_{i}" for i in range(4, 4 + count)]
    for number, name in enumerate(names, 4):
        (folder / "images" / name).mkdir()
        (folder / "images" / name / "a.jpg").write_bytes(encode(number, "JPEG"))
        (cub / "text_c10" / name).mkdir()
        (cub / "text_c10" / name / "a.txt").write_text(f"a {name}\n")
        for file, line in (("images.txt", f"{100 + number} {name}/a.jpg"), ("image_class_labels.txt", f"{100 + number} {number}"),
                           ("classes.txt", f"{number} {name}"), ("trainclasses.txt", name)):  # fmt: skip
            with open(folder / file, "a") as listing:
                listing.write(line + "\n")
    return names


def test_while_choosing_the_test_species_stay_apart(cub, tmp_path, encode):
    (cub / "CUB_200_2011" / "testclasses.txt").write_text(CLASSES[1] + "\n")
    train = [CLASSES[0], *grow(cub, encode, 9)]
    published = {o.object_id: o.split for o in CubSource(str(cub)).objects()}
    assert published[CLASSES[1]] == "test" and published[CLASSES[2]] == "val"
    source = CubSource(str(cub), val_fraction=0.3)
    found = {o.object_id: o.split for o in source.objects()}
    assert found[CLASSES[2]] == "test" and CLASSES[1] not in found, "reported on val species, test species left out"
    held_out = sorted(n for n in train if found[n] == "val")
    assert held_out == sorted(sorted(train, key=hash_fraction)[:3])
    assert all(found[n] == "train" for n in train if n not in held_out)
    again = {o.object_id: o.split for o in CubSource(str(cub), val_fraction=0.3).objects()}
    assert again == found, "always the same ones"
    manifest = build_shards(source, str(tmp_path / "set"), BuildOptions(progress=False))
    assert [manifest["splits"][s]["objects"] for s in ("train", "val", "test")] == [7, 3, 1]
    assert "held out" in manifest["source"] and "without the published test classes" in manifest["source"]
    assert manifest["warnings"] == [
        "train+val: 10 objects, the publication has 100", "test: 1 objects, the publication has 50"]  # fmt: skip
    assert "held out" not in CubSource(str(cub)).origin, "the option of one source is not that of the next"


def test_holding_out_needs_the_published_splits(cub):
    (cub / "CUB_200_2011" / "valclasses.txt").unlink()
    with pytest.raises(SourceError, match=r"needs trainclasses.txt and valclasses.txt, found \['train'\]"):
        CubSource(str(cub), val_fraction=0.2).objects()
    (cub / "CUB_200_2011" / "trainclasses.txt").unlink()
    with pytest.raises(SourceError, match="no class-split file"):
        CubSource(str(cub), val_fraction=0.2).objects()
    with pytest.raises(SourceError, match="below 1"):
        CubSource(str(cub), val_fraction=1.0).objects()
