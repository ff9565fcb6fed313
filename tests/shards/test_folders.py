"""A folder of folders: objects, captions from every place they may lie in, splits, and all that lies about besides."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mmref.data.shard_set import ShardSet
from mmref.errors import SourceError
from mmref.shards.build import BuildOptions, build_shards
from mmref.shards.sources.folders import FolderSource


@pytest.fixture
def put(tmp_path, encode):
    """Writes files below tmp_path/things: texts, bytes, or pictures by a number."""
    root = tmp_path / "things"
    root.mkdir()

    def write(files: dict[str, str | bytes | int]) -> Path:
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            data = encode(content) if isinstance(content, int) else content
            path.write_bytes(data.encode() if isinstance(data, str) else data)
        return root

    return write


def listed(root: Path, **options) -> dict[str, list[str]]:
    return {image.image_id: image.captions for image in FolderSource(str(root), **options).images()}


def test_captions_from_everywhere(put):
    root = put({
        "red_chair/a.png": 1, "red_chair/a.txt": "a chair\n\n  red  \n", "red_chair/b.png": 2, "red_chair/b.png.TXT": "legs",
        "red_chair/captions.txt": "a chair, painted", "mug/c.png": 3, "mug/d e.png": 4, "mug/sub/f.png": 5,
        "mug/captions.csv": 'file_name,caption\nc.png,"blue, small"\nc.png,a mug\n',
        "metadata.jsonl": '{"file_name": "mug/d e.png", "text": "from below"}\n{"file_name": "mug", "text": "for coffee"}\n',
        "mug/sub/metadata.parquet": b"no parquet", "mug/readme.txt": "nothing",
    })  # fmt: skip
    source = FolderSource(str(root))
    images = {image.image_id: image for image in source.images()}
    assert {name: image.captions for name, image in images.items()} == {
        "red_chair/a.png": ["a chair", "red", "a chair, painted"],
        "red_chair/b.png": ["legs", "a chair, painted"],
        "mug/c.png": ["blue, small", "a mug", "for coffee"],
        "mug/d e.png": ["from below", "for coffee"],
        "mug/sub/f.png": ["for coffee"],
    }
    assert {image.object_id for image in images.values()} == {"red_chair", "mug"}
    assert [what for what, _ in source.left_out] == ["mug/sub/metadata.parquet"]
    assert source.passed_over == {".txt": 1, ".parquet": 1}, "what was taken for captions is not passed over"
    assert any("deeper than object/picture: 1 (mug/sub/f.png" in line for line in source.warnings)


def test_a_table_whose_captions_are_written_lists_is_left_out_whole(put):
    root = put({
        "a/1.png": 1, "a/1.txt": "one", "a/captions.csv": "file_name,caption\n1.png,\"['a red', 'mug']\"\n1.png,\"['two']\"\n",
    })  # fmt: skip
    source = FolderSource(str(root))
    assert [image.captions for image in source.images()] == [["one"]]
    ((name, why),) = source.left_out
    assert name == "a/captions.csv" and why.startswith(
        "it: the captions of column 'caption' are lists that were written as texts"
    )


def test_half_broken_files_are_named_and_nothing_stops(put, tmp_path):
    root = put({
        "a/1.png": 1, "a/1.txt": "one", "a/2.png": 2, "a/2.txt": "caf\xe9".encode("latin-1"), "b/3.png": b"no picture",
        "b/3.txt": "three", "b/4.png": 4, "b/4.txt": " \n", "captions.csv": "file;text\n1;2\n", "captions.jsonl": "{broken\n",
        "captions.txt": "x.jpg,a caption", "metadata.csv": "file_name,text\na/9.png,gone\na/../../9.png,out\na/2.png,two\n",
        "c/.hidden.png": 5, "d/film.mp4": b"", "e/metadata.jsonl": '{"name": "1.png"}',
    })  # fmt: skip
    (root / "none" / "inside").mkdir(parents=True)
    os.symlink("../..", root / "a" / "loop")
    os.symlink("nowhere", root / "a" / "dead.png")
    odd = os.fsencode(root) + b"/a/caf\xe9"
    Path(os.fsdecode(odd + b".png")).write_bytes((root / "a" / "1.png").read_bytes())
    Path(os.fsdecode(odd + b".txt")).write_text("a café")
    source = FolderSource(str(root), fractions={"train": 1.0})
    manifest = build_shards(source, str(tmp_path / "out"), BuildOptions(workers=0, min_shards=1, progress=False))
    left = dict(line.split(": ", 1) for line in manifest["skipped"]["first"])
    words = {
        "a/2.txt": "is not UTF-8",
        "b/3.png": "not an image",
        "b/4.png": "no caption",
        "captions.csv": "no column of file names|comma",
        "captions.jsonl": "line 1 is not JSON",
        "captions.txt": "call",
        "metadata.csv, row 2": "no picture 'a/9.png'",
        "metadata.csv, row 3": "no picture",
        "none/": "without pictures",
        "c/": "without pictures",
        "d/": "without pictures",
        "e/": "without pictures",
        "e/metadata.jsonl": "no column of file names, only name",
        "a/loop/": "holds this one",
        "a/dead.png": "a link to nothing",
    }
    assert set(left) == set(words)
    for name, told in words.items():
        assert any(word in left[name] for word in told.split("|")), (name, left[name])
    taken = ShardSet.open(str(tmp_path / "out"))
    found = {name for split in taken.splits for name in taken.index(split).image_ids}
    assert found == {"a/1.png", "a/2.png", r"a/caf\xe9.png"}
    assert any("1 hidden" in line and "1 .mp4" in line for line in manifest["warnings"])


def test_lines_of_a_text_are_captions_as_cells_of_a_table_are(put):
    root = put({
        "a/1.png": 1, "a/1.txt": "one\rtwo\r\n\u200b\n\ufeffthree\n", "a/2.png": 2, "a/2.txt": "so\nn\0ul\n", "b/3.png": 3,
        "b/captions.txt": "\u2060\nof b",
    })  # fmt: skip
    source = FolderSource(str(root))
    found = {image.image_id: image.captions for image in source.images()}
    assert found == {"a/1.png": ["one", "two", "three"], "a/2.png": [], "b/3.png": ["of b"]}
    assert source.left_out == [("a/2.txt", "line 2: txt holds a NUL character: 'n\\x00ul'")]


def test_folders_of_splits(put):
    files = {f"{split}/{o}/{i}.png": i for split, o in (("Train", "x"), ("validation", "y"), ("test", "z")) for i in range(2)}
    root = put({**files, "Train/metadata.csv": "file_name,text\nx/0.png,here\n"})
    source = FolderSource(str(root), caption_from_folder=True)
    assert {o.object_id: o.split for o in source.objects()} == {"x": "train", "y": "val", "z": "test"}
    assert listed(root, caption_from_folder=True)["Train/x/0.png"] == ["here"]
    put({"Train/y/9.png": 9})
    with pytest.raises(SourceError, match=r"object 'y' is in 'train' and in 'val'.*--resplit"):
        FolderSource(str(root), caption_from_folder=True).objects()
    again = FolderSource(str(root), caption_from_folder=True, resplit=True, fractions={"all": 1.0})
    assert {o.object_id: len(o.images) for o in again.objects()} == {"x": 2, "y": 3, "z": 2}
    put({"more/u/9.png": 9})
    source = FolderSource(str(root), caption_from_folder=True, depth=2)
    assert {o.object_id for o in source.objects()} == {"Train/x", "Train/y", "validation/y", "test/z", "more/u"}
    assert any("may be splits, and 'more' is none" in line for line in source.warnings)


def test_names_of_folders_are_captions_only_when_asked(put):
    root = put({"red_chair--old/1.png": 1, "red_chair--old/2.png": 2, "red_chair--old/1.txt": "mine", "3.png": 3})
    assert listed(root, caption_from_folder=True) == {
        "3.png": [],
        "red_chair--old/1.png": ["mine"],
        "red_chair--old/2.png": ["red chair old"],
    }
    (root / "red_chair--old" / "1.txt").write_text("")
    with pytest.raises(SourceError, match=r"none of 3 pictures has a caption.*metadata.jsonl.*--caption-from-folder"):
        listed(root)


def test_imagefolder_of_hugging_face(put):
    rows = '{"file_name": "%d.png", "text": "thing %d", "object_id": "o%d", "lang": "en"}\n'
    files = {f"{s}/{i}.png": i for s in ("train", "test") for i in range(4)}
    texts = {
        f"{s}/metadata.jsonl": "".join(rows % (i, i, (i // 2) + 10 * (s == "test")) for i in range(4)) for s in ("train", "test")
    }
    objects = FolderSource(str(put({**files, **texts}))).objects()
    assert [(o.split, o.object_id, len(o.images)) for o in objects] == [
        ("test", "o10", 2), ("test", "o11", 2), ("train", "o0", 2), ("train", "o1", 2),
    ]  # fmt: skip


def test_columns_of_captions(put):
    root = put({"a/1.png": 1, "captions.csv": "file,title,note\na\\1.png,one,two\n"})
    assert listed(root, captions=["title", "note"]) == {"a/1.png": ["one", "two"]}, "a path of Windows is found too"
    with pytest.raises(
        SourceError, match=r"captions.csv: no column of captions, only file, title, note: name it with --captions"
    ):
        listed(root)
    said = r"captions.csv has no column 'titel', only file, title, note. Did you mean 'title'\? Name yours with --captions"
    with pytest.raises(SourceError, match=said):
        listed(root, captions=["titel"])
    with pytest.raises(SourceError, match=said):
        listed(root, captions=["titel"], caption_from_folder=True)
    put({"metadata.jsonl": '{"file_name": "a/1.png", "text": "three"}'})
    assert listed(root, captions=["text"]) == {"a/1.png": ["three"]}, "one of two tables has it"
    for name in ("captions.csv", "metadata.jsonl"):
        (root / name).unlink()
    with pytest.raises(SourceError, match=r"has no column 'title': no captions\.csv"):
        listed(root, captions=["title"], caption_from_folder=True)


def test_captions_of_several_columns_keep_their_kinds(put):
    root = put({
        "a/1.png": 1, "a/1.txt": "from a file", "a/2.png": 2, "b/3.png": 3,
        "captions.csv": "file_name,short,long\na/1.png,one,one is long\na/2.png,,two is long\n",
    })  # fmt: skip
    images = FolderSource(str(root), captions=["short", "long"], caption_from_folder=True).images()
    assert {image.image_id: dict(zip(image.caption_kinds, image.captions, strict=True)) for image in images} == {
        "a/1.png": {"txt": "from a file", "short": "one", "long": "one is long"},
        "a/2.png": {"long": "two is long"},
        "b/3.png": {"folder": "b"},
    }
    assert {image.caption_kinds for image in FolderSource(str(root), captions=["long"]).images()} == {None}


def test_an_image_of_two_objects(put):
    rows = "file_name,text,object_id\na/1.png,one,o0\na/2.png,two,o1\na/1.png,again,o0\na/1.png,other,o9\n"
    root = put({"a/1.png": 1, "a/2.png": 2, "metadata.csv": rows})
    said = r"metadata.csv, row 5: image 'a/1.png' belongs to the objects 'o0' \(metadata.csv, row 2\) and 'o9'"
    with pytest.raises(SourceError, match=said):
        listed(root)
    source = FolderSource(str(root), strict=False)
    objects = {image.image_id: image.object_id for image in source.images()}
    assert objects == {"a/1.png": "o0", "a/2.png": "o1"}, "an index leaves the row out"
    assert [what for what, _ in source.left_out] == ["metadata.csv, row 5"]


def test_texts_whose_names_differ_a_little(put):
    """Another form of Unicode, as a Mac writes it, and other capitals, as cameras do, where it is plain which image is meant."""
    root = put({
        "a/caf\u00e9.jpg": 1, "a/cafe\u0301.txt": "decomposed", "a/IMG_3.JPG": 2, "a/img_3.txt": "lower", "a/Two.jpg": 3,
        "a/two.jpg": 4, "a/TWO.txt": "of either", "a/own.jpg": 5, "a/own.txt": "its own", "a/OWN.txt": "of none",
        "b/img_4.png": 6, "B/IMG_4.txt": "in another folder", "b/CAPTIONS.png": 7, "b/captions.txt": "of all",
    })  # fmt: skip
    assert listed(root) == {
        "a/caf\u00e9.jpg": ["decomposed"], "a/IMG_3.JPG": ["lower"], "a/Two.jpg": [], "a/two.jpg": [], "a/own.jpg": ["its own"],
        "b/img_4.png": ["of all"], "b/CAPTIONS.png": ["of all"],
    }  # fmt: skip


def test_pictures_kept_in_one_folder_are_no_object(put):
    """Hugging Face's usual layout: metadata.csv beside images/."""
    texts = "file_name,text\n" + "".join(f"images/{i}.png,thing {i}\n" for i in range(4))
    root = put({**{f"images/{i}.png": i for i in range(4)}, "metadata.csv": texts})
    source = FolderSource(str(root))
    assert [len(item.images) for item in source.objects()] == [1, 1, 1, 1]
    assert any("all pictures are in 'images' and a table names them" in line for line in source.warnings)
    kept = {image.object_id for image in FolderSource(str(root), strict=False).images()}
    assert kept == {"images"}, "an index is told what it asks for by --folders"
    put({"metadata.csv": "file_name,text,object_id\nimages/0.png,one,o\nimages/1.png,two,o\n"})
    assert {item.object_id: len(item.images) for item in FolderSource(str(root)).objects()} == {"o": 2, "images": 2}
    put({"metadata.csv": "file_name,text\nimages,all alike\n"})
    assert [item.object_id for item in FolderSource(str(root)).objects()] == ["images"], "a row about the folder"


def test_a_set_may_be_built_inside_its_source(put, tmp_path):
    root = put({f"o{i}/1.png": i for i in range(4)})
    options = {"caption_from_folder": True, "fractions": {"train": 1.0}}
    for overwrite in (False, True):
        manifest = build_shards(
            FolderSource(str(root), **options), str(root / "set"), BuildOptions(progress=False, overwrite=overwrite)
        )
        assert manifest["skipped"]["count"] == 0 and manifest["splits"]["train"]["objects"] == 4


def test_names_in_another_form_of_unicode(put):
    root = put({"ku\u0308che/1.png": 1, "metadata.csv": "file_name,text\nk\u00fcche/1.png,a kitchen\n"})
    assert listed(root) == {"ku\u0308che/1.png": ["a kitchen"]}


def test_what_is_no_folder(tmp_path):
    with pytest.raises(SourceError, match=r"is no folder.*shards build table"):
        FolderSource(str(tmp_path / "none")).objects()
