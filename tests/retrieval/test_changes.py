"""`mmref index add` and `sync`: an index holds what its sources hold now, and what differs is said."""

from __future__ import annotations

import codecs
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.images import write_images
from support.old_index import as_of_old
from support.tiny_set import TinySource, build_tiny_set

from mmref.data.decode import decode_rgb
from mmref.errors import ManyMissingError, SearchIndexError
from mmref.retrieval import chunks, index
from mmref.retrieval.images import read_image_bytes
from mmref.retrieval.manifest import Manifest, Source
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.set_aside import read_left_out, read_skipped

OF_FOLDERS = "2 folders taken as objects (--folders plain: they mean nothing)"  # of `photos`


def write(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)


def paths(out: Path) -> dict[str, str]:
    items = Searcher(str(out)).items
    return dict(zip(items["id"].to_pylist(), items["path"].to_pylist()))


def feature(out: Path, item: str) -> np.ndarray:
    searcher = Searcher(str(out))
    row = searcher.row(item)
    return np.concatenate([s.features for s in searcher.segments])[row]


@pytest.fixture
def places(tmp_path: Path, run: Path) -> tuple[Path, Path, Path]:
    """Two folders with pictures of the same names, and an index of the first."""
    for number, name in enumerate(("2023/a.png", "2023/b.png", "2024/a.png", "2024/b.png", "2024/c.png")):
        write(tmp_path / name, number)
    index.create(str(tmp_path / "2023"), str(run), str(tmp_path / "out"), workers=0)
    return tmp_path / "2023", tmp_path / "2024", tmp_path / "out"


def test_pictures_of_the_same_name_elsewhere_are_others(places):
    first, second, out = places
    for _ in range(2):
        manifest = index.add(str(out), str(second), workers=0)
        assert paths(out) == {
            "a.png": f"{first}/a.png", "b.png": f"{first}/b.png",
            "2024/a.png": f"{second}/a.png", "2024/b.png": f"{second}/b.png", "c.png": f"{second}/c.png",
        }  # fmt: skip
        assert manifest.generation == 2, "the second time nothing is new"
    assert manifest.notes == ["0 images added"]
    third = second.parent / "other" / "2024"
    write(third / "a.png", 9)
    write(third / "2024" / "a.png", 10)
    manifest = index.add(str(out), str(third), workers=0)
    assert paths(out)["other/2024/a.png"] == f"{third}/a.png"
    assert paths(out)["2024/2024/a.png"] == f"{third}/2024/a.png"
    assert manifest.notes == [
        "2 images added",
        "2 have the names of items from elsewhere, and are called 2024/2024/a.png, other/2024/a.png",
    ]


def test_the_same_file_by_another_way_is_no_other(places, tmp_path):
    first, _, out = places
    os.symlink(first, tmp_path / "link")
    index.add(str(out), str(tmp_path / "link"), workers=0)
    index.add(str(out), str(first), workers=0)
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n2023/a.png,one\n")
    index.add(str(out), str(table), workers=0)
    assert list(paths(out)) == ["a.png", "b.png"]


def test_a_changed_file_is_embedded_again(places):
    _, second, out = places
    index.add(str(out), str(second), workers=0)
    kept, old = feature(out, "a.png"), feature(out, "2024/a.png")
    write(second / "a.png", 77)
    write(second / "c.png", 78)
    manifest = index.add(str(out), str(second), workers=0)
    assert manifest.notes == ["0 images added", "2 have changed since and were embedded again"]
    assert manifest.items == 5 == len(paths(out)) and paths(out)["2024/a.png"] == f"{second}/a.png"
    pixels = np.asarray(Image.open(second / "a.png"))
    np.testing.assert_allclose(feature(out, "2024/a.png"), Searcher(str(out)).model.encode_images([pixels])[0], atol=1e-6)
    assert not np.allclose(feature(out, "2024/a.png"), old) and np.allclose(feature(out, "a.png"), kept)
    (second / "a.png").write_bytes(b"broken now")
    manifest = index.add(str(out), str(second), workers=0)
    assert manifest.notes[1:] == ["1 have changed since, cannot be read any more and were removed: 2024/a.png"]
    assert "2024/a.png" not in paths(out) and manifest.items == 4 and manifest.skipped == 1
    write(second / "a.png", 79)
    manifest = index.add(str(out), str(second), workers=0)
    assert manifest.items == 5 and manifest.skipped == 0 and paths(out)["2024/a.png"] == f"{second}/a.png"


def test_what_is_gone_is_named_and_removed_on_request(places):
    first, second, out = places
    index.add(str(out), str(second), workers=0)
    (second / "b.png").unlink()
    (first / "b.png").unlink()
    manifest = index.add(str(out), str(second), workers=0)
    assert manifest.notes[1:] == [
        f"1 items are not in {second} any more (`mmref index sync` removes them): 2024/b.png"
    ] and len(paths(out)) == 5  # fmt: skip
    manifest = index.sync(str(out), Source(str(second)), workers=0)
    assert manifest.notes[1:] == [f"1 items are not in {second} any more and were removed: 2024/b.png"]
    assert set(paths(out)) == {"a.png", "b.png", "2024/a.png", "c.png"}, "of other sources nothing goes"
    (first / "a.png").unlink()
    (second / "a.png").unlink()
    with pytest.raises(SearchIndexError, match="holds no image"):
        index.add(str(out), str(first), workers=0)


def test_what_cannot_be_looked_into_is_not_gone(places, monkeypatch):
    first, _, out = places
    write(first / "deep" / "d.png", 5)
    index.add(str(out), str(first), workers=0)
    scandir = os.scandir

    def scan(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    manifest = index.sync(str(out), Source(str(first)), workers=0)
    assert "deep/d.png" in paths(out) and manifest.items == 3
    assert read_skipped(out) == [
        {"id": "deep/", "path": str(first), "problem": "a folder that cannot be listed: Permission denied"}
    ]


def test_lists_that_were_edited_are_read(places):
    """A line is deleted to have an image back, by programs that leave a mark, empty lines or none of the file."""
    first, _, out = places
    (first / "broken.png").write_bytes(b"no image")
    index.add(str(out), str(first), workers=0)
    index.remove(str(out), ["a.png"], for_good=True)
    for name, read in (("skipped.jsonl", read_skipped), ("left_out.jsonl", read_left_out)):
        lines = read(out)
        assert len(lines) == 1
        (out / name).write_bytes(codecs.BOM_UTF8 + (out / name).read_bytes() + b"\n  \r\n")
        assert read(out) == lines
    assert index.sync(str(out), Source(str(first)), workers=0).skipped == 1 and set(paths(out)) == {"b.png"}
    for name in ("skipped.jsonl", "left_out.jsonl"):
        (out / name).unlink()
    assert index.add(str(out), str(first), workers=0).skipped == 1 and set(paths(out)) == {"a.png", "b.png"}


@pytest.mark.parametrize("name", ["skipped.jsonl", "left_out.jsonl"])
@pytest.mark.parametrize(
    ("line", "said"),
    [("{'id': 1}", "is not JSON"), ("[1]", "expected an object {...}, found list"), ('{"id": "x"}', "has no '")],
)
def test_a_line_that_is_none_is_named(places, name, line, said):
    first, _, out = places
    (out / name).write_text(f"\n{line}\n")
    with pytest.raises(SearchIndexError, match=re.escape(f"{name}, line 2 {said}".replace("2 exp", "2: exp"))):
        index.add(str(out), str(first), workers=0)


def test_a_moved_folder_keeps_its_ids_and_a_disk_that_is_away_its_items(places, tmp_path):
    first, second, out = places
    os.rename(first, tmp_path / "moved")
    manifest = index.add(str(out), str(tmp_path / "moved"), workers=0)
    assert paths(out) == {"a.png": f"{tmp_path}/moved/a.png", "b.png": f"{tmp_path}/moved/b.png"}
    assert manifest.items == 2
    os.rename(tmp_path / "moved", tmp_path / "away")
    index.add(str(out), str(second), workers=0)
    assert paths(out)["a.png"] == f"{tmp_path}/moved/a.png" and paths(out)["2024/a.png"] == f"{second}/a.png"


def test_indexes_made_before_there_were_stamps_open_and_grow(places):
    first, second, out = places
    as_of_old(out / "segments" / "000000", without="file_stamp")
    assert index.add(str(out), str(first), workers=0).generation == 1
    index.add(str(out), str(second), workers=0)
    assert len(paths(out)) == 5 and "file_stamp" not in Searcher(str(out)).metadata_columns


def test_a_shard_set_built_anew_is_held_as_it_is_now(run, tiny_set, tmp_path):
    from support.tiny_set import TinySource, build_tiny_set

    class Other(TinySource):
        def load(self, ref: int) -> bytes:
            return super().load(ref + 1000)

    shards, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(tiny_set, shards)
    index.create(str(shards), str(run), str(out), split="test", workers=0)
    before, old = paths(out), feature(out, "18-0")
    shutil.rmtree(shards)
    shutil.copytree(tiny_set, shards)
    assert index.add(str(out), str(shards), split="test", workers=0).generation == 1, "the same content"
    shutil.rmtree(shards)
    build_tiny_set(shards, Other())
    manifest = index.add(str(out), str(shards), split="test", workers=0)
    assert set(paths(out)) == set(before) and manifest.items == len(before)
    index.create(str(shards), str(run), str(tmp_path / "fresh"), split="test", workers=0)
    for item in before:
        np.testing.assert_allclose(feature(out, item), feature(tmp_path / "fresh", item), atol=1e-6)
    assert not np.allclose(feature(out, "18-0"), old)


def test_a_folder_that_changed_since_a_kill_is_listed_anew(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 2)
    seen: list[str] = []
    whole = chunks.embed_chunk

    def dies(model, locations, watch):
        if len(seen) >= 6:
            raise KeyboardInterrupt
        seen.extend(Path(path).name for path, _, _ in locations)
        return whole(model, locations, watch)

    monkeypatch.setattr(chunks, "embed_chunk", dies)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        index.create(str(folder), str(run), str(out), workers=0)
    assert seen == ["00.png", "02.png", "04.png", "06.png", "08.png", "10.png"]
    (folder / "02.png").unlink()  # of the first finished chunk
    write(folder / "10.png", 99)  # of the third
    write_images(folder, [12])
    again: list[str] = []

    def counted(model, locations, watch):
        again.extend(Path(path).name for path, _, _ in locations)
        return whole(model, locations, watch)

    monkeypatch.setattr(chunks, "embed_chunk", counted)
    index.create(str(folder), str(run), str(out), workers=0)
    assert not {"04.png", "06.png"} & set(again) and {"00.png", "08.png", "10.png", "12.png"} <= set(again)
    monkeypatch.setattr(chunks, "embed_chunk", whole)
    index.create(str(folder), str(run), str(tmp_path / "reference"), workers=0)
    assert set(paths(out)) == set(paths(tmp_path / "reference"))
    for item in paths(out):
        np.testing.assert_allclose(feature(out, item), feature(tmp_path / "reference", item), atol=1e-5)
        assert Searcher(str(out)).thumbnail(item) == Searcher(str(tmp_path / "reference")).thumbnail(item)


def test_the_same_words_in_another_directory_are_another_command(folder, run, tmp_path, monkeypatch):
    for name in ("one", "two"):
        write(tmp_path / name / "photos" / f"{name}.png", 1)
    monkeypatch.chdir(tmp_path / "one")

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(index, "embed_listing", dies)
        index.create("photos", str(run), str(tmp_path / "out"), workers=0)
    monkeypatch.chdir(tmp_path / "two")
    index.create("photos", str(run), str(tmp_path / "out"), workers=0)
    assert list(paths(tmp_path / "out")) == ["two.png"]


# -- sync ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path, run: Path) -> tuple[Path, Path]:
    """A folder of sixteen pictures, and an index of it."""
    for number in range(16):
        write(tmp_path / "photos" / f"{number % 2}" / f"{number}.png", number)
    index.create(str(tmp_path / "photos"), str(run), str(tmp_path / "out"), workers=0)
    return tmp_path / "photos", tmp_path / "out"


def synced(out: Path, root: Path, **how) -> Manifest:
    return index.sync(str(out), Source(str(root)), workers=0, **how)


def test_a_manifest_is_read_as_it_was_written_whatever_the_terminal_says(tmp_path):
    """Else a sync looks for the source in another place, and finds all of it missing."""
    place = "/bilder/é"
    Manifest(1, 1, 8, 1, ["1"], "model", "flat", sources=[place], listed=[Source(place).to_dict()]).write(tmp_path)
    code = f"from pathlib import Path; from mmref.retrieval.manifest import Manifest; m = Manifest.read(Path({str(tmp_path)!r}))"
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    argv = [sys.executable, "-c", f"{code}; print(ascii(m.sources + [m.listed[0]['images']]))"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ascii([place, place])


def test_sync_is_one_change_that_a_dry_run_tells_before(photos):
    root, out = photos
    kept = Searcher(str(out))
    old = feature(out, "1/1.png")
    write(root / "new.png", 50)
    write(root / "0" / "2.png", 51)
    (root / "1" / "3.png").unlink()
    os.utime(root / "1" / "1.png", (1, 1))
    os.rename(root / "0" / "4.png", root / "0" / "moved.png")
    lines: list[str] = []
    before = (out / "manifest.json").read_bytes(), sorted(out.rglob("*"))
    told = synced(out, root, dry_run=lines.append)
    assert (out / "manifest.json").read_bytes() == before[0] and sorted(out.rglob("*")) == before[1]
    assert lines == [
        f"~ 0/2.png  {root}/0/2.png", f"+ 0/moved.png  {root}/0/moved.png", f"+ new.png  {root}/new.png", "= 1/1.png",
        "- 0/4.png", "- 1/3.png",
    ]  # fmt: skip
    manifest = synced(out, root)
    assert (
        manifest.notes
        == told.notes
        == [
            "2 images added",
            "1 have changed since and were embedded again",
            "1 have another place or time of change and the same content, and keep their features",
            f"2 items are not in {root} any more and were removed: 0/4.png, 1/3.png",
        ]
    )
    assert manifest.generation == 2 and manifest.items == 16 == len(paths(out)) and kept.outdated
    assert set(paths(out)) == {f"{n % 2}/{n}.png" for n in range(16)} - {"0/4.png", "1/3.png"} | {"new.png", "0/moved.png"}
    np.testing.assert_array_equal(feature(out, "1/1.png"), old)
    assert synced(out, root).generation == 2, "what was touched is known by its new time"
    assert [len(kept.items), kept.search("red", top=1)[0].rank] == [16, 1], "who has it open keeps what it opened"


def test_what_was_only_touched_is_not_embedded(photos, monkeypatch):
    root, out = photos
    rows = {name: feature(out, name) for name in paths(out)}
    for path in root.rglob("*.png"):
        os.utime(path, (5, 5))
    monkeypatch.setattr(chunks, "embed_chunk", None)
    manifest = synced(out, root)
    assert manifest.notes == [
        "0 images added", "16 have another place or time of change and the same content, and keep their features", OF_FOLDERS
    ]  # fmt: skip
    searcher = Searcher(str(out))
    assert searcher.items["file_stamp"].to_pylist() == [
        f"{os.stat(p).st_size}-5000000000" for p in searcher.items["path"].to_pylist()
    ]
    assert (np.diff(searcher.segments[0].uids) > 0).all() and set(searcher.items["width"].to_pylist()) == {30}
    for name, row in rows.items():
        np.testing.assert_array_equal(feature(out, name), row)


def test_a_disk_that_is_not_there_removes_nothing(photos):
    root, out = photos
    before = (out / "manifest.json").read_bytes()
    os.rename(root, root.with_name("away"))
    with pytest.raises(ManyMissingError, match=r"no folder.*Nothing was removed.*--remove-up-to 1`"):
        synced(out, root)
    root.mkdir()  # where it was mounted
    with pytest.raises(ManyMissingError, match=r"holds no image.*the disk may not be there"):
        synced(out, root)
    shutil.copytree(root.with_name("away") / "0", root / "0")
    shutil.copytree(root.with_name("away") / "1", root / "1")
    for number in range(1, 16, 2):
        (root / "1" / f"{number}.png").unlink()
    for number in (0, 2, 4):
        (root / "0" / f"{number}.png").unlink()
    with pytest.raises(ManyMissingError, match=r"11 of 16 items are not in .*That is 69%, and at most 20%.*--remove-up-to 0.69`"):
        synced(out, root)
    with pytest.raises(ManyMissingError, match="at most 0%"):
        synced(out, root, remove_up_to=0.0)
    assert (out / "manifest.json").read_bytes() == before and not (out / ".adding").exists()
    assert synced(out, root, remove_up_to=0.69).items == 5


def test_what_is_there_but_cannot_be_looked_at_is_not_gone(photos, tmp_path):
    root, out = photos
    write(tmp_path / "disk" / "linked.png", 30)
    os.symlink(tmp_path / "disk" / "linked.png", root / "linked.png")
    assert synced(out, root).items == 17
    (tmp_path / "disk" / "linked.png").unlink()
    assert synced(out, root).items == 17 and "linked.png" in paths(out)
    assert read_skipped(out)[0]["problem"] == "a link to nothing"
    (root / "linked.png").unlink()
    assert synced(out, root).items == 16


def test_a_source_that_is_gone_for_good(photos, tmp_path):
    root, out = photos
    shutil.rmtree(root)
    with pytest.raises(SearchIndexError, match="nothing would be left"):
        synced(out, root, remove_up_to=1.0)
    write(tmp_path / "more" / "one.png", 60)
    index.add(str(out), str(tmp_path / "more"), workers=0)
    assert synced(out, root, remove_up_to=1.0).items == 1 and set(paths(out)) == {"one.png"}


def test_an_index_knows_how_its_sources_were_read(tmp_path, run):
    for number in range(4):
        write(tmp_path / f"{number}.png", number)
    table = tmp_path / "t.csv"
    table.write_text("file,who\n0.png,a\n1.png,b\n2.png,c\n")
    columns = index.TableColumns(image="file", object_id="who")
    index.create(str(table), str(run), str(tmp_path / "out"), columns=columns, workers=0)
    (found,) = index.sources_of(str(tmp_path / "out"))
    assert found == Source(str(table), None, columns)
    table.write_text("file,who\n0.png,a\n3.png,d\n2.png,c\n")
    manifest = index.sync(str(tmp_path / "out"), found, workers=0)
    assert set(paths(tmp_path / "out")) == {"0.png", "2.png", "3.png"}, "of a table, too, which the index has alone"
    assert manifest.listed == [found.to_dict()]


def test_a_shard_set_that_was_built_anew_is_not_embedded_again(tmp_path, run):
    root = build_tiny_set(tmp_path / "set")
    out = tmp_path / "out"
    index.create(str(root), str(run), str(out), split="test", workers=0)
    before = Searcher(str(out))
    shutil.rmtree(root)

    class Another(TinySource):
        def objects(self):
            yield from (replace(o, images=o.images[1:]) if len(o.images) == 5 else o for o in super().objects())

    build_tiny_set(root, Another())
    (source,) = index.sources_of(str(out))
    assert source.split == "test"
    manifest = index.sync(str(out), source, workers=0)
    searcher = Searcher(str(out))
    ids = searcher.items["id"].to_pylist()
    assert manifest.notes[0] == "0 images added" and "keep their features" in manifest.notes[1] and "gone" not in manifest.notes
    gone = set(before.items["id"].to_pylist()) - set(ids)
    assert len(gone) == len(before) - len(ids) > 0 and all(name.endswith("-0") for name in gone)
    row = dict(zip(ids, searcher.items.select(["path", "offset", "length"]).to_pylist()))[ids[-1]]
    pixels = decode_rgb(read_image_bytes(**row), "it")
    np.testing.assert_allclose(feature(out, ids[-1]), searcher.model.encode_images([pixels])[0], atol=1e-5)


def test_what_was_removed_for_good_stays_out_until_it_is_another_image(photos):
    root, out = photos
    index.remove(str(out), ["0/0.png", "1/1.png", "0/2.png"], for_good=True)
    os.utime(root / "1" / "1.png", (1, 1))
    write(root / "0" / "2.png", 70)
    manifest = synced(out, root)
    assert manifest.notes == ["1 images added", "2 stay out, since they were removed for good (left_out.jsonl)", OF_FOLDERS]
    assert {"0/0.png", "1/1.png"}.isdisjoint(paths(out)) and "0/2.png" in paths(out)
    (out / "left_out.jsonl").unlink()
    assert index.add(str(out), str(root), workers=0).items == 16


def on_disk(out: Path) -> dict[Path, bytes]:
    """The files of thumbnails of an index."""
    return {path: path.read_bytes() for path in (out / "segments").rglob("thumbnails.bin")}


def test_thumbnails_of_what_has_gone_leave_the_disk(photos, monkeypatch):
    monkeypatch.setattr(index, "MOST_SEGMENTS", 2)
    root, out = photos
    before = {name: Searcher(str(out)).thumbnail(name) for name in paths(out)}
    for turn in range(5):
        numbers = [(5 * turn + number) % 15 for number in range(5)]
        for number in numbers:
            write(root / f"{number % 2}" / f"{number}.png", 100 + 15 * turn + number)
        synced(out, root)
        held = {name: Searcher(str(out)).thumbnail(name) for name in paths(out)}
        changed = {f"{number % 2}/{number}.png" for number in numbers}
        assert {name for name in held if held[name] != before[name]} == changed
        assert sum(map(len, on_disk(out).values())) <= 2 * sum(map(len, held.values()))
        before = held


def test_a_removed_image_has_no_thumbnail_on_the_disk(photos):
    root, out = photos
    before = Searcher(str(out)).thumbnail("0/0.png")
    write(root / "0" / "0.png", 70)
    synced(out, root)
    changed = Searcher(str(out)).thumbnail("0/0.png")
    assert any(before in data for data in on_disk(out).values()), "fifteen others are in its file"
    kept = {name: Searcher(str(out)).thumbnail(name) for name in paths(out) if name != "0/0.png"}
    index.remove(str(out), ["1/1.png"])
    one = kept.pop("1/1.png")
    assert any(one in data for data in on_disk(out).values())
    write(root / "0" / "16.png", 71)
    index.add(str(out), str(root), workers=0)
    index.remove(str(out), ["0/0.png", "1/1.png"], for_good=True)
    assert not any(gone in data for data in on_disk(out).values() for gone in (before, changed, one))
    searcher = Searcher(str(out))
    assert set(paths(out)) == {*kept, "0/16.png"} and all(searcher.thumbnail(name) == kept[name] for name in kept)


def test_an_index_without_hashes_embeds_what_was_touched(photos):
    root, out = photos
    as_of_old(out / "segments" / "000000", without="file_sha256")
    os.utime(root / "1" / "1.png", (1, 1))
    assert synced(out, root).notes == ["0 images added", "1 have changed since and were embedded again", OF_FOLDERS]
    os.utime(root / "1" / "1.png", (2, 2))
    assert "keep their features" in synced(out, root).notes[1], "from then on it has one"
