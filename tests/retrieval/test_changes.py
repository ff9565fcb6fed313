"""`mmref index add`: an index holds what its sources hold now, and what differs is said."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.images import write_images

from mmref.errors import SearchIndexError
from mmref.retrieval import chunks, index
from mmref.retrieval.searcher import Searcher


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
        f"1 items are not in {second} any more (--remove-missing removes them): 2024/b.png"
    ] and len(paths(out)) == 5  # fmt: skip
    manifest = index.add(str(out), str(second), workers=0, remove_missing=True)
    assert manifest.notes[1:] == [f"1 items are not in {second} any more and were removed: 2024/b.png"]
    assert set(paths(out)) == {"a.png", "b.png", "2024/a.png", "c.png"}, "of other sources nothing goes"
    (first / "a.png").unlink()
    (second / "a.png").unlink()
    with pytest.raises(SearchIndexError, match="holds no image"):
        index.add(str(out), str(first), workers=0, remove_missing=True)


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
    manifest = index.add(str(out), str(first), workers=0, remove_missing=True)
    assert "deep/d.png" in paths(out) and manifest.items == 3
    assert index.read_skipped(out) == [
        {"id": "deep/", "path": str(first), "problem": "a folder that cannot be listed: Permission denied"}
    ]


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
    items = out / "segments" / "000000" / "items.parquet"
    pq.write_table(pq.read_table(items).drop_columns(["file_stamp"]), items)
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
        patch.setattr(index, "_embed", dies)
        index.create("photos", str(run), str(tmp_path / "out"), workers=0)
    monkeypatch.chdir(tmp_path / "two")
    index.create("photos", str(run), str(tmp_path / "out"), workers=0)
    assert list(paths(tmp_path / "out")) == ["two.png"]
