"""Index directories: what goes in, what survives a kill, adding, removing, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.disks import files_below
from support.images import write_images

from mmref.errors import ModelError, ModelMismatchError, SearchIndexError, StorageError
from mmref.retrieval import bundle, chunks, index, vectors
from mmref.retrieval.images import TableColumns, list_images
from mmref.retrieval.manifest import Manifest
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.set_aside import read_skipped
from mmref.retrieval.stores.export import export_index
from mmref.retrieval.vector_file import open_vectors


def ids(path: Path) -> list[str]:
    return Searcher(str(path)).items["id"].to_pylist()


def test_a_folder_becomes_an_index_and_broken_images_are_listed(folder, run, tmp_path):
    manifest = index.create(str(folder), str(run), str(tmp_path / "out"), workers=0)
    assert (manifest.items, manifest.skipped, manifest.kind) == (11, 1, "flat")
    skipped = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [s["id"] for s in skipped] == ["deep/broken.jpg"] and "not an image" in skipped[0]["problem"]
    searcher = Searcher(str(tmp_path / "out"))
    item = searcher.item("deep/03.png")
    assert (item["width"], item["height"], item["path"]) == (300, 23, str(folder / "deep" / "03.png"))
    with Image.open(io.BytesIO(searcher.thumbnail("deep/03.png"))) as thumbnail:
        assert thumbnail.format == "WEBP" and max(thumbnail.size) == 256
    assert searcher.image_bytes("deep/03.png") == (folder / "deep" / "03.png").read_bytes()
    pixels = np.asarray(Image.open(folder / "04.png"))
    row = searcher.row("04.png")
    np.testing.assert_allclose(searcher.segments[0].features[row], searcher.model.encode_images([pixels])[0], atol=1e-6)
    assert not list(tmp_path.glob("*.partial")) and not list((tmp_path / "out").glob("chunks"))


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_table_brings_object_ids_and_columns(folder, run, tmp_path, ending):
    import pandas as pd

    rows = [
        {"picture": f"{i:02d}.png", "object_id": f"o{i}", "colour": "red" if i else "blue", "caption": f"thing {i}"}
        for i in (0, 2, 2, 4)
    ]
    table = pd.DataFrame(rows)
    path = folder / f"t.{ending}"
    {"csv": lambda: table.to_csv(path, index=False), "parquet": lambda: table.to_parquet(path),
     "jsonl": lambda: table.to_json(path, orient="records", lines=True)}[ending]()  # fmt: skip
    index.create(str(path), str(run), str(tmp_path / "out"), columns=TableColumns(image="picture"), workers=0)
    searcher = Searcher(str(tmp_path / "out"))
    assert ids(tmp_path / "out") == ["00.png", "02.png", "04.png"], "an image of several rows is one item"
    assert searcher.item("02.png")["object_id"] == "o2"
    assert searcher.metadata_columns == ["colour", "caption"]
    assert {r.id for r in searcher.search("x", top=3, where={"colour": "red"})} == {"02.png", "04.png"}


def test_a_url_prefix_is_listed_and_read(folder, run, tmp_path):
    import fsspec

    fs = fsspec.filesystem("memory")
    for path in folder.rglob("*.png"):
        fs.pipe(f"/bucket/{path.relative_to(folder)}", path.read_bytes())
    index.create("memory://bucket", str(run), str(tmp_path / "out"), workers=0)
    searcher = Searcher(str(tmp_path / "out"))
    assert len(searcher) == 11
    assert searcher.image_bytes("deep/03.png") == (folder / "deep" / "03.png").read_bytes()


def test_a_killed_build_embeds_nothing_twice(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 2)
    seen: list[str] = []
    whole = chunks.embed_chunk

    def counted(model, locations, watch):
        arrays = whole(model, locations, watch)
        seen.extend(path for path, _, _ in locations)
        return arrays

    def dies(model, locations, watch):
        if len(seen) >= 6:
            raise KeyboardInterrupt
        return counted(model, locations, watch)

    monkeypatch.setattr(chunks, "embed_chunk", dies)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        index.create(str(folder), str(run), str(out), workers=0)
    with pytest.raises(SearchIndexError, match="was begun and is not finished"):
        Searcher(str(out))
    (tmp_path / "out.partial" / "chunks" / ".000009.tmp").write_bytes(b"half")
    monkeypatch.setattr(chunks, "embed_chunk", counted)
    index.create(str(folder), str(run), str(out), workers=0)
    assert len(seen) == len(set(seen)) == 12
    reference = tmp_path / "reference"
    monkeypatch.setattr(chunks, "embed_chunk", whole)
    index.create(str(folder), str(run), str(reference), workers=0)
    for name in ("features", "near", "weights", "uids"):
        arrays = [np.load(p / "segments" / "000000" / f"{name}.npy") for p in (out, reference)]
        np.testing.assert_allclose(*arrays, atol=1e-5)
    assert ids(out) == ids(reference)


def test_another_command_does_not_resume_what_was_begun(folder, run, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(index, "embed_listing", dies)
        index.create(str(folder), str(run), str(out), workers=0)
    index.create(str(folder / "deep"), str(run), str(out), workers=0)
    assert ids(out) == ["01.png", "03.png", "05.png", "07.png", "09.png"]


@pytest.mark.parametrize("kind", ["export", "run"])
def test_another_model_in_the_place_does_not_resume_what_was_begun(folder, run, split_index, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(chunks, "SMALLEST_CHUNK", 2)
    model = shutil.copytree({"export": split_index / "model", "run": run}[kind], tmp_path / "model")
    seen: list[str] = []
    whole = chunks.embed_chunk

    def dies(of, locations, watch):
        if len(seen) == 6:
            seen.clear()
            raise KeyboardInterrupt
        seen.extend(path for path, _, _ in locations)
        return whole(of, locations, watch)

    monkeypatch.setattr(chunks, "embed_chunk", dies)
    with pytest.raises(KeyboardInterrupt):
        index.create(str(folder), str(model), str(tmp_path / "out"), workers=0)
    if kind == "export":
        weights = load_file(model / "model.safetensors")
        save_file({name: tensor + 0.1 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    else:
        (model / "checkpoints" / "step-00000020-a").rename(model / "checkpoints" / "step-00000020-b")
        metrics = (model / "metrics.json").read_text("utf-8")
        (model / "metrics.json").write_text(metrics.replace("step-00000020-a", "step-00000020-b"), "utf-8")
    monkeypatch.setattr(chunks, "embed_chunk", lambda *given: seen.extend(path for path, _, _ in given[1]) or whole(*given))
    manifest = index.create(str(folder), str(model), str(tmp_path / "out"), workers=0)
    assert (
        len(set(seen)) == 12
        and "of another model, source or index, or had other options: starting over" in capsys.readouterr().err
    )
    assert kind == "run" or manifest.model == bundle.fingerprint(model)


def test_adding_and_removing_change_nothing_else(folder, run, tmp_path):
    out = tmp_path / "out"
    index.create(str(folder), str(run), str(out), workers=0)
    old = Searcher(str(out))
    before = {r.id: r.score for r in old.search("red star", top=11)}
    write_images(folder, range(11, 15))
    manifest = index.add(str(out), str(folder), workers=0)
    assert (manifest.items, manifest.generation) == (15, 2), "only what it does not hold"
    assert old.outdated and len(old.search("red star", top=11)) == 11, "a reader keeps what it opened"
    new = Searcher(str(out))
    after = {r.id: r.score for r in new.search("red star", top=15)}
    assert {k: after[k] for k in before} == pytest.approx(before, abs=1e-6)
    assert index.add(str(out), str(folder), workers=0).generation == 2, "nothing new"

    manifest = index.remove(str(out), ["00.png", "deep/11.png", "deep/13.png"])
    assert manifest.items == 12
    left = Searcher(str(out))
    assert set(ids(out)) == set(after) - {"00.png", "deep/11.png", "deep/13.png"}
    for result in left.search("red star", top=12):
        assert result.score == pytest.approx(after[result.id], abs=1e-6)
        assert left.thumbnail(result.id) == new.thumbnail(result.id)
    assert sorted(p.name for p in (out / "segments").iterdir()) == sorted(manifest.segments), "the old ones are gone"
    assert old.thumbnail("00.png"), "and still there for who had opened them"
    index.add(str(out), str(folder), workers=0)
    assert len(ids(out)) == len(set(ids(out))) == 15


def test_many_additions_are_joined(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MOST_SEGMENTS", 2)
    out = tmp_path / "out"
    index.create(str(folder), str(run), str(out), workers=0)
    for number, other in ((20, "02.png"), (21, "04.png")):
        write_images(folder, [number])
        shutil.copyfile(folder / other, folder / "00.png")
        manifest = index.add(str(out), str(folder), workers=0)
    assert len(manifest.segments) == 1
    reference = tmp_path / "reference"
    index.create(str(folder), str(run), str(reference), workers=0)
    joined, fresh = (Searcher(str(p)) for p in (out, reference))
    a, b = ({r.id: r.score for r in s.search("green square", top=len(s))} for s in (joined, fresh))
    assert a == pytest.approx(b, abs=1e-6)
    assert all(joined.thumbnail(i) == fresh.thumbnail(i) for i in a)
    assert not joined.segments[0].holds_others, "what had gone is not joined"


@pytest.mark.parametrize("kind", ["ivf", "hnsw", "ivfpq"])
def test_approximate_indexes_write_down_their_recall(folder, run, tmp_path, kind):
    write_images(folder, range(11, 80))
    out, exact = tmp_path / "out", tmp_path / "exact"
    manifest = index.create(str(folder), str(run), str(out), kind=kind, workers=0, recall=0.99)
    assert manifest.vectors["recall@10"] >= 0.99 and manifest.vectors["measured_on"] == "items"
    index.create(str(folder), str(run), str(exact), workers=0)

    def agree() -> float:
        a, b = (Searcher(str(p)).search("blue circle 7", top=10, refine=False) for p in (out, exact))
        scores = {r.id: r.score for r in b}
        assert all(r.score == pytest.approx(scores[r.id], abs=1e-6) for r in a if r.id in scores), "scores are exact"
        return len({r.id for r in a} & set(scores)) / 10

    assert agree() >= 0.8
    write_images(folder, range(80, 84))
    gone = [r.id for r in Searcher(str(out)).search("blue circle 7", top=3)]
    for path in (out, exact):
        index.add(str(path), str(folder), workers=0)
        index.remove(str(path), gone)
    assert len(Searcher(str(out))) == 81 and agree() >= 0.8
    more = [r.id for r in Searcher(str(out)).search("red", top=20)]
    for path in (out, exact):
        index.remove(str(path), more)
    rebuilt = open_vectors(out, Manifest.read(out))
    assert rebuilt is not None and len(rebuilt) == 61, "built again without what was removed"
    assert agree() >= 0.8


def test_columns_of_two_sources_may_have_other_types(folder, run, tmp_path, monkeypatch):
    """Not all years of the CSV are numbers, so that they are texts; those of the JSON lines are numbers. All prices are."""
    (folder / "a.csv").write_text("image,year,price\n00.png,2020,1\n02.png,ca. 2021,2\n")
    more = [{"image": f"{i:02d}.png", "year": 2020 + i, "price": i / 2, "new": bool(i)} for i in (4, 6)]
    (folder / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in more))
    out = tmp_path / "out"
    index.create(str(folder / "a.csv"), str(run), str(out), workers=0)
    index.add(str(out), str(folder / "b.jsonl"), workers=0)
    monkeypatch.setattr(index, "MOST_SEGMENTS", 2)
    for joined in (False, True):
        if joined:
            index.add(str(out), str(folder / "deep"), workers=0)
        searcher = Searcher(str(out))
        years = searcher.items["year"].to_pylist()
        assert years[:4] == ["2020", "ca. 2021", "2024", "2026"] and len(searcher.segments) == (1 if joined else 2)
        assert [r.id for r in searcher.search("x", where={"year": 2024})] == ["04.png"]
        assert searcher.items["price"].to_pylist()[:4] == [1.0, 2.0, 2.0, 3.0]
        assert {r.id for r in searcher.search("x", where={"new": True})} == {"04.png", "06.png"}


def test_whole_numbers_that_no_float_holds_become_text(folder, run, tmp_path, monkeypatch):
    """They stay what they are, in an index that opens, is joined and exported."""
    large = 2**53 + 1
    for name, rows in (("a", {"00.png": large, "02.png": 7}), ("b", {"04.png": 0.5, "06.png": 16.0})):
        lines = [json.dumps({"image": image, "number": number, "price": number % 3}) for image, number in rows.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    index.create(str(folder / "a.jsonl"), str(run), str(out), workers=0)
    index.add(str(out), str(folder / "b.jsonl"), workers=0)
    export_index(str(out), "parquet", str(tmp_path / "out.parquet"))
    expected = [str(large), "7", "0.5", "16"]
    assert pq.read_table(tmp_path / "out.parquet")["number"].to_pylist() == expected
    monkeypatch.setattr(index, "MOST_SEGMENTS", 2)
    for joined in (False, True):
        if joined:
            index.add(str(out), str(folder / "deep"), workers=0)
        searcher = Searcher(str(out))
        assert searcher.items["number"].to_pylist()[:4] == expected and len(searcher.segments) == (1 if joined else 2)
        assert [r.id for r in searcher.search("x", where={"number": large})] == ["00.png"]
        assert searcher.items["price"].to_pylist()[:4] == [large % 3, 1.0, 0.5, 1.0]


def test_a_source_of_broken_images_is_listed(own_index, tmp_path):
    """Names may hold what Unicode takes for the end of a line."""
    before, name = Manifest.read(own_index), "line\u2028end.png"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / name).write_bytes(b"no image")
    for _ in range(2):
        manifest = index.add(str(own_index), str(tmp_path / "broken"), workers=0)
        assert (manifest.items, manifest.skipped) == (before.items, before.skipped + 1)
        assert manifest.generation == before.generation + 1 == Manifest.read(own_index).generation
        assert [s["id"] for s in read_skipped(own_index)] == [name]
    assert len(Searcher(str(own_index))) == before.items


def test_an_index_keeps_to_its_model(own_index, make_config, run, folder, tmp_path, monkeypatch):
    from support.tiny_run import make_run

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_run(make_config({"train.seed": 5}), str(tmp_path / "other"), {})
    with pytest.raises(ModelMismatchError, match="features of two models cannot be compared"):
        index.add(str(own_index), str(folder), model=str(tmp_path / "other"), workers=0)
    assert index.add(str(own_index), str(folder), model=str(run), workers=0).items == 23
    card = own_index / "model" / "config.json"
    card.write_text(card.read_text().replace('"weight": 0.4', '"weight": 0.8'))
    with pytest.raises(ModelMismatchError, match="the model was replaced"):
        Searcher(str(own_index))


def test_what_cannot_be_indexed_is_said(folder, run, own_index, tmp_path):
    out = str(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SearchIndexError, match="holds no image"):
        index.create(str(tmp_path / "empty"), str(run), out, workers=0)
    with pytest.raises(SearchIndexError, match="is no folder, shard set or table"):
        index.create(str(tmp_path / "nowhere"), str(run), out, workers=0)
    with pytest.raises(ModelError, match="is not there: give a run directory"):
        index.create(str(folder), str(tmp_path / "nothing"), out, workers=0)
    with pytest.raises(SearchIndexError, match="exists already"):
        index.create(str(folder), str(run), str(own_index), workers=0)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"x")
    with pytest.raises(SearchIndexError, match="none of 1 images can be read"):
        index.create(str(broken), str(run), out, workers=0)
    with pytest.raises(SearchIndexError, match="has no item 'nobody'"):
        index.remove(str(own_index), ["nobody"])
    with pytest.raises(SearchIndexError, match="nothing would be left"):
        index.remove(str(own_index), ids(own_index))
    (tmp_path / "t.csv").write_text("picture\na.jpg\n")
    with pytest.raises(SearchIndexError, match="has no column 'image', only picture"):
        list_images(str(tmp_path / "t.csv"))
    with index.locked(own_index), pytest.raises(SearchIndexError, match=r"in use: process .* writes to it"):
        index.remove(str(own_index), ids(own_index)[:1])


def test_a_start_that_fails_leaves_nothing_and_touches_nothing(folder, run, own_index, tmp_path, monkeypatch):
    out, broken = tmp_path / "out", tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"x")
    before = sorted(p.name for p in tmp_path.iterdir())
    inside = sorted(str(p) for p in own_index.rglob("*") if p.name != ".lock")
    for images, model in [("nowhere", run), (folder, tmp_path / "nothing"), (broken, run)]:
        with pytest.raises((SearchIndexError, ModelError)):
            index.create(str(images), str(model), str(out), workers=0)
        with pytest.raises((SearchIndexError, ModelError)):
            index.add(str(own_index), "nowhere", model=str(model), workers=0)
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        assert sorted(str(p) for p in own_index.rglob("*") if p.name != ".lock") == inside
    (broken / "a.jpg").write_bytes((folder / "00.png").read_bytes())
    index.create(str(broken), str(run), str(out), workers=0)
    assert ids(out) == ["a.jpg"], "what was mended is looked at again"

    partial = tmp_path / "another.partial"
    partial.mkdir()
    (partial / "mine.txt").write_text("mine")
    with pytest.raises(SearchIndexError, match=r"was not made by mmref \(it holds 'mine.txt'\)"):
        index.create(str(folder), str(run), str(tmp_path / "another"), workers=0)
    assert (partial / "mine.txt").read_text() == "mine"
    with pytest.raises(SearchIndexError, match="is a URL"):
        index.create(str(folder), str(run), "s3://bucket/index", workers=0)


def test_an_empty_folder_is_as_good_as_none(folder, run, tmp_path, monkeypatch):
    out, link = tmp_path / "out", tmp_path / "link"
    out.mkdir(mode=0o750)
    link.symlink_to(out)
    index.create(str(folder), str(run), str(link), workers=0)
    assert len(Searcher(str(out))) == 11 and link.is_symlink() and out.stat().st_mode & 0o777 == 0o750
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / ".mine").write_text("mine")
    with pytest.raises(SearchIndexError, match="exists already and is not empty"):
        index.create(str(folder), str(run), str(tmp_path / "own"), workers=0)
    assert [p.name for p in (tmp_path / "own").iterdir()] == [".mine"]
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(index.os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    with pytest.raises(SearchIndexError, match="is where a disk is mounted"):
        index.create(str(folder), str(run), str(tmp_path / "disk"), workers=0)


def test_what_a_killed_writer_left_is_cleared(folder, run, tmp_path, monkeypatch):
    def dies(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(index, "embed_listing", dies)
        index.create(str(folder / "deep"), str(run), str(out), workers=0)
    work = tmp_path / "out.partial"
    (work / ".export-x").mkdir()  # killed while the run was exported
    index.create(str(folder / "deep"), str(run), str(out), workers=0)
    parts = {".lock", "manifest.json", "model", "segments", "skipped.jsonl"}
    assert {p.name for p in out.iterdir()} == parts
    for name in (".export-y", "chunks"):
        (out / name).mkdir()
    (out / ".manifest.json.123.tmp").write_text("{")
    (out / "mine.txt").write_text("mine")
    index.add(str(out), str(folder), workers=0)
    assert {p.name for p in out.iterdir()} == parts | {"mine.txt"}


@pytest.mark.parametrize("changed", [
    {"segments": ["../../elsewhere"]}, {"segments": ["/etc"]}, {"segments": ["."]}, {"segments": [["000000"]]},
    {"kind": "ivf", "vectors": {"file": "../vectors", "setting": 1}}, {"kind": "ivf", "vectors": {"file": "/x", "setting": 1}},
    {"kind": "ivf", "vectors": {}}, {"unheard": 1}, {"segments": None}, {"segments": []}, {"vectors": []}, {"version": 99},
])  # fmt: skip
def test_a_manifest_of_somebody_else_stays_inside_the_index(own_index, changed):
    path = own_index / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    before = set(own_index.parent.rglob("*"))
    for act in (lambda: Searcher(str(own_index)), lambda: index.remove(str(own_index), ["x"])):
        with pytest.raises(SearchIndexError, match=r"manifest\.json"):
            act()
    assert set(own_index.parent.rglob("*")) - before <= {own_index / ".lock"}


@pytest.mark.parametrize("damage", ["changed", "added"])
def test_another_tokenizer_is_another_model(own_index, damage):
    """Features of sentences depend on it as on the weights."""
    Searcher(str(own_index))
    file = own_index / "model" / "tokenizer" / ("tokenizer.json" if damage == "changed" else "added_tokens.json")
    file.write_text(file.read_text().replace('"##', '"#~') if damage == "changed" else "{}")
    with pytest.raises(ModelMismatchError, match="was replaced"):
        Searcher(str(own_index))


def test_an_index_of_before_tokenizers_counted_opens(own_index):
    path = own_index / "manifest.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"model": bundle.fingerprint(own_index / "model", tokenizer=False)}))
    assert len(Searcher(str(own_index))) == values["items"]


@pytest.mark.parametrize("text", ["[1]", "{}", '{"version": 1, "name": "set", "splits": {}}'])
def test_a_folder_of_something_else_is_no_index(text, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(SearchIndexError, match=r"is no index, its manifest\.json is of something else"):
        Manifest.read(tmp_path)


def test_an_index_whose_manifest_is_a_pipe_keeps_nobody_waiting(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(SearchIndexError, match="is no file but a pipe"):
        Searcher(tmp_path)


def test_a_damaged_index_is_named(own_index):
    features = own_index / "segments" / "000000" / "features.npy"
    features.write_bytes(features.read_bytes()[:-8])
    with pytest.raises(SearchIndexError, match="is damaged; make it again"):
        Searcher(str(own_index))
    features.unlink()
    with pytest.raises(SearchIndexError, match="is damaged; make it again"):
        Searcher(str(own_index))
    shutil.rmtree(own_index)
    with pytest.raises(SearchIndexError, match=r"is no index.*mmref index"):
        Searcher(str(own_index))


@pytest.fixture(scope="module", params=["ivf", "hnsw", "ivfpq"])
def approximate(request, run, tmp_path_factory) -> Path:
    """An index that is searched through faiss, only read."""
    root = tmp_path_factory.mktemp("approximate")
    write_images(root / "images", range(80))
    index.create(str(root / "images"), str(run), str(root / "out"), kind=request.param, workers=0)
    return root / "out"


@pytest.mark.parametrize("damage", ["short", "changed", "gone"])
def test_a_damaged_file_of_faiss_does_not_reach_it(approximate, tmp_path, damage, monkeypatch):
    """faiss may end the process over it."""
    out = Path(shutil.copytree(approximate, tmp_path / "out"))
    assert len(Searcher(str(out))) == 80
    (file,) = out.glob("vectors-*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data if damage == "changed" else data[:-9])
    if damage == "gone":
        file.unlink()
    monkeypatch.setattr(vectors.faiss, "read_index", lambda *_: pytest.fail("was read"))
    with pytest.raises(SearchIndexError, match=r"vectors-000001 .*the index is damaged; make it again"):
        Searcher(str(out))


@pytest.mark.parametrize("held", ["flat", "narrow", "other", "few", "text"])
def test_a_file_of_faiss_of_another_kind_is_named(approximate, tmp_path, held):
    """Of an index that does not say what it wrote, as the first ones do not."""
    out = Path(shutil.copytree(approximate, tmp_path / "out"))
    manifest = json.loads((out / "manifest.json").read_text())
    for name in ("bytes", "sha256"):
        manifest["vectors"].pop(name, None)
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert len(Searcher(str(out))) == 80
    kind, dim = manifest["kind"], manifest["dim"]
    features = np.random.default_rng(0).normal(size=(80, dim)).astype("float32")
    (file,) = out.glob("vectors-*")
    if held == "text":
        file.write_bytes(b"no index of faiss")
    elif held == "flat":
        vectors.faiss.write_index(vectors.faiss.IndexFlatIP(dim), str(file))
    else:
        other = {"ivf": "hnsw", "hnsw": "ivfpq", "ivfpq": "ivf"}[kind] if held == "other" else kind
        features = features[:70] if held == "few" else features[:, : dim // 2] if held == "narrow" else features
        vectors.Approximate.build(other, [np.ascontiguousarray(features)], np.arange(len(features))).write(file)
    with pytest.raises(SearchIndexError, match=r"vectors-000001 .*make (it|the index) again"):
        Searcher(str(out))


ODD_NAMES = (
    *(b"caf\xe9.png", rb"caf\xe9.png", b"line\nend.png", b"\x1b[31mred.png", b"space.png ", b"\xff/\xfe.png"),
    *("l\u2028.png".encode(), b"a#b?%41.png", b"-rf.png", b"quo'\"te&<b>.png"),
)


def test_any_name_is_held_shown_and_opened(run, tmp_path, capsys):
    """Names of files are bytes: no UTF-8 (out of an old zip), control characters, line ends."""
    from starlette.testclient import TestClient

    from mmref.cli import main
    from mmref.retrieval.service.answering import Engine
    from mmref.retrieval.service.app import build_app
    from mmref.retrieval.service.backend import Local
    from mmref.retrieval.service.limits import Limits

    root = os.fsencode(tmp_path / "photos") + b"\xe9"
    for number, name in enumerate(ODD_NAMES):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(file, "PNG")
        os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
        with open(os.path.join(root, name), "wb") as out:
            out.write(file.getvalue())
    with open(os.path.join(root, b"broken\xe9.png"), "wb") as out:
        out.write(b"no image")
    index_dir, source = tmp_path / "out", os.fsdecode(root)
    assert main(["index", source, "--model", str(run), "--out", str(index_dir), "--workers", "0"]) == 0
    assert index.add(str(index_dir), source, workers=0).generation == 1, "the same names mean the same files"
    searcher = Searcher(str(index_dir))
    assert len(searcher) == len(ODD_NAMES)
    assert {r"caf\xe9.png", r"caf\\xe9.png", "line\nend.png", r"\xff/\xfe.png"} <= set(ids(index_dir))
    assert [s["id"] for s in read_skipped(index_dir)] == [r"broken\xe9.png"]
    held = {searcher.image_bytes(item) for item in ids(index_dir)}
    assert len(held) == len(ODD_NAMES), "each opens its own file"
    capsys.readouterr()
    assert main(["search", str(index_dir), "red", "--top", "10"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11, "a line for each, whatever its name"
    assert main(["search", str(index_dir), "red", "--top", "10", "--json"]) == 0
    assert {r["id"] for r in json.loads(capsys.readouterr().out)["results"]} == set(ids(index_dir))
    assert main(["search", str(index_dir), "red", "--top", "10", "--html", str(tmp_path / "page.html")]) == 0
    assert main(["index", "info", str(index_dir)]) == 0
    limits = Limits()
    client = TestClient(build_app({"out": Local(Engine(str(index_dir), limits, watch=False))}, None, limits), "http://127.0.0.1")
    from urllib.parse import quote

    for item in ids(index_dir):
        twice = quote(quote(item, safe=""))  # Starlette's test client decodes a path twice, a server once
        assert client.get(f"/image/{twice}").content == searcher.image_bytes(item), item
    index.remove(str(index_dir), [r"caf\xe9.png"])
    assert r"caf\\xe9.png" in ids(index_dir) and r"caf\xe9.png" not in ids(index_dir)


@pytest.mark.parametrize(
    "failure", [RuntimeError("decoder"), ValueError("\udce9"), OSError(5, "torn"), MemoryError(), SyntaxError()]
)
def test_whatever_an_image_raises_costs_that_one(folder, run, tmp_path, monkeypatch, failure):
    decode = chunks.decoded

    def failing(data, name):
        if name.endswith("02.png"):
            raise failure
        return decode(data, name)

    monkeypatch.setattr(chunks, "decoded", failing)
    manifest = index.create(str(folder), str(run), str(tmp_path / "out"), workers=0)
    assert (manifest.items, manifest.skipped) == (10, 2)
    assert [s["id"] for s in read_skipped(tmp_path / "out")] == ["02.png", "deep/broken.jpg"]


def test_storage_that_does_not_answer_is_no_broken_image(folder, run, tmp_path, monkeypatch):
    def failing(*_):
        raise StorageError("the share is away")

    monkeypatch.setattr(chunks, "read_image_bytes", failing)
    with pytest.raises(StorageError, match="the share is away"):
        index.create(str(folder), str(run), str(tmp_path / "out"), workers=0)


def test_a_pipe_in_a_table_is_not_waited_for(folder, run, tmp_path):
    os.mkfifo(folder / "pipe.png")
    (folder / "t.csv").write_text("image\n00.png\npipe.png\n")
    manifest = index.create(str(folder / "t.csv"), str(run), str(tmp_path / "out"), workers=0)
    assert (manifest.items, manifest.skipped) == (1, 1)
    assert "is no file" in read_skipped(tmp_path / "out")[0]["problem"]


def test_a_full_disk_is_told_and_leaves_the_index_whole(folder, run, tmp_path):
    out = tmp_path / "out"
    index.create(str(folder), str(run), str(out), workers=0)
    before, items = Manifest.read(out), ids(out)
    write_images(folder, range(20, 90))
    told = set()
    for limit in (0, 500, 3_000, 20_000, 60_000, 150_000):
        try:
            with files_below(limit):
                index.add(str(out), str(folder), workers=0)
        except StorageError as error:
            assert "no space left for" in str(error) and "bytes are free" in str(error)
            told.add(limit)
            assert Manifest.read(out) == before and ids(out) == items
    assert {0, 500, 3_000, 20_000} <= told
    assert index.add(str(out), str(folder), workers=0).items == 81
    assert len(ids(out)) == 81


@pytest.mark.parametrize("limit", [0, 1_000, 30_000])
def test_a_full_disk_does_not_blame_the_model(folder, run, tmp_path, limit):
    from mmref.export.write import export_run

    model = export_run(str(run), str(tmp_path / "model"))
    with pytest.raises(StorageError, match="no space left for"), files_below(limit):
        index.create(str(folder), str(model), str(tmp_path / "out"), workers=0)
    assert not (tmp_path / "out").exists()
    assert index.create(str(folder), str(model), str(tmp_path / "out"), workers=0).items == 11


def test_segments_are_on_the_disk_before_the_manifest_names_them(folder, run, tmp_path, monkeypatch):
    synced: list[str] = []
    sync, write = os.fsync, Manifest.write

    def noted(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def written(manifest, path):
        for name in manifest.segments:
            files = {p.name for p in (path / "segments" / name).iterdir()}
            assert files <= {Path(p).name for p in synced}, "every file of it"
        write(manifest, path)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Manifest, "write", written)
    index.create(str(folder), str(run), str(tmp_path / "out"), workers=0)
    index.remove(str(tmp_path / "out"), ["00.png"])
