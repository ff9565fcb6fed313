"""mmref index, search and judge as they are typed."""

from __future__ import annotations

import builtins
import json
import math
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.images import write_images

from mmref.cli import main
from mmref.export.model import Model
from mmref.retrieval import index
from mmref.retrieval.feedback import Judgements
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.set_aside import read_skipped


def test_from_a_folder_to_an_answer(folder, run, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["index", str(folder), "--model", str(run), "--out", out, "--workers", "0"]) == 0
    assert "11 images, 8 numbers each, flat, 1 could not be read (skipped.jsonl)" in capsys.readouterr().out
    assert main(["search", out, "a red star", "--top", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["rank", "before"] and [line.split()[0] for line in lines[1:]] == list("1234")
    assert main(["index", "remove", out, "00.png", "02.png"]) == 0
    assert main(["index", "add", out, str(folder), "--workers", "0"]) == 0
    assert "2 images added" in capsys.readouterr().out
    assert main(["index", "info", out]) == 0
    info = capsys.readouterr().out
    assert "generation 3" in info and "columns: id, path" in info
    assert main(["index", "info", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["items"] == 11


def test_a_folder_is_followed(folder, run, tmp_path, capsys):
    out, more = str(tmp_path / "out"), tmp_path / "more"
    assert main(["index", str(folder), "--model", str(run), "--out", out, "--workers", "0"]) == 0
    write_images(more, range(3))
    assert main(["index", "add", out, str(more), "--workers", "0"]) == 0
    (folder / "00.png").unlink()
    (more / "02.png").unlink()
    capsys.readouterr()
    assert main(["index", "sync", out, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        f"{folder}:", f"? deep/broken.jpg  {folder}/deep/broken.jpg", "- 00.png", "dry run: 0 images added",
    ]  # fmt: skip
    assert "dry run: 1 could not be read the last time and are tried again: deep/broken.jpg" in lines
    assert main(["index", "sync", out, str(more), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert f"1 items are not in {more} any more and were removed: more/02.png" in said and "13 images" in said
    assert main(["index", "sync", out, "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert f"{folder}:" in said and f"{more}:" in said and f"{out}: 12 images" in said
    assert main(["index", "remove", out, "02.png", "--for-good"]) == 0
    assert main(["index", "sync", out, str(folder), "--workers", "0"]) == 0
    assert "1 stay out" in capsys.readouterr().out
    assert main(["index", "sync", out, "--split", "test"]) == 2
    assert "need IMAGES" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["index", "sync", out, str(tmp_path / "empty")]) == 1
    said = capsys.readouterr().err
    assert "ManyMissingError" in said and "Nothing was removed" in said


def test_columns_of_all_sources_are_named(own_index, tmp_path, capsys):
    write_images(tmp_path, range(2))
    (tmp_path / "t.csv").write_text("image,mood\n00.png,glad\n")
    assert main(["index", "add", str(own_index), str(tmp_path / "t.csv"), "--workers", "0"]) == 0
    capsys.readouterr()
    assert main(["index", "info", str(own_index)]) == 0
    (columns,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("columns: ")]
    names = columns.removeprefix("columns: ").split(", ")
    assert names[:2] == ["id", "path"] and names[-1] == "mood" and len(names) == len(set(names))


def test_a_table_is_read_as_it_was_the_first_time(run, tmp_path, capsys):
    write_images(tmp_path, range(4))
    table, out = tmp_path / "t.csv", str(tmp_path / "out")
    table.write_text("file,sku\n00.png,a\n")
    named = ["--image-column", "file", "--object-column", "sku", "--workers", "0"]
    assert main(["index", str(table), "--model", str(run), "--out", out, *named]) == 0
    table.write_text("file,sku\n00.png,a\n02.png,c\n")
    capsys.readouterr()
    assert main(["index", "add", out, str(table), "--workers", "0"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "1 images added"
    assert Searcher(out).item("02.png")["object_id"] == "c"
    assert main(["index", "add", out, str(table), "--image-column", "sku", "--workers", "0"]) == 0
    assert "2 items are not in" in capsys.readouterr().out, "options that are given count"


def test_json_batches_filters_and_images(split_index, tmp_path, capsys):
    sentences = tmp_path / "queries.txt"
    sentences.write_text("red circle\n\nblue star\n")
    assert main(["search", str(split_index), "--batch", str(sentences), "--json", "--top", "2", "--no-refine"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f["query"] for f in found] == ["red circle", "blue star"]
    assert all(r["score"] == r["initial"] and r["rank"] == r["rank_before"] for f in found for r in f["results"])
    searcher = Searcher(str(split_index))
    assert [r["id"] for r in found[1]["results"]] == [r.id for r in searcher.search("blue star", top=2, refine=False)]
    item = searcher.items["id"][3].as_py()
    (tmp_path / "q.png").write_bytes(searcher.image_bytes(item))
    argv = ["--image", str(tmp_path / "q.png"), "--where", f"object_id={searcher.item(item)['object_id']}", "--json"]
    assert main(["search", str(split_index), *argv]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert {r["object_id"] for r in found} == {searcher.item(item)["object_id"]}
    assert main(["search", str(split_index), "red", *argv, "--image-weight", "0.2"]) == 0


def test_a_search_says_that_nothing_is_close(split_index, tmp_path, capsys, monkeypatch):
    search = ["search", str(split_index), "a red star", "--top", "2"]
    page = tmp_path / "page.html"
    for enough, close in ((None, None), (-2.0, True), (2.0, False)):
        monkeypatch.setattr(Model, "close_cosine", enough)
        for more in ([], ["--by", "object"]):
            assert main([*search, *more]) == 0
            assert ("no close match" in capsys.readouterr().out) is (close is False)
        assert main([*search, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["close_match"] is close
        assert main([*search, "--html", str(page)]) == 0
        assert ("<p>No close match" in page.read_text()) is (close is False)
        capsys.readouterr()
    assert main([*search[:2], "--image", str(drawing(tmp_path)), "--top", "2"]) == 0
    assert "no close match" not in capsys.readouterr().out, "cosines of images with one another are others"


def drawing(folder):
    Image.new("RGB", (16, 16), "red").save(folder / "red.png")
    return folder / "red.png"


def test_the_page_is_self_contained(split_index, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["search", str(split_index), "<b>red & blue</b>", "--html", str(page), "--top", "3"]) == 0
    text = page.read_text()
    assert "&lt;b&gt;red &amp; blue&lt;/b&gt;" in text and "<b>red" not in text
    assert len(re.findall(r'src="data:image/webp;base64,[A-Za-z0-9+/=]{50,}"', text)) == 3
    assert not re.search(r"(src|href)=\"(?!data:)", text) and "http" not in text


def test_a_name_that_a_terminal_or_a_browser_would_obey(run, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    name = "a\x1b[2J\n<i>\u202e.png"
    Image.new("RGB", (9, 7)).save(tmp_path / "images" / name)
    out, page = str(tmp_path / "out"), tmp_path / "page.html"
    assert main(["index", str(tmp_path / "images"), "--model", str(run), "--out", out, "--workers", "0"]) == 0
    capsys.readouterr()
    assert main(["search", out, "red"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(r" a\x1b[2J\n<i>\u202e.png")
    assert main(["search", out, "red", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["id"] == name, "for programs it stays what it is"
    assert main(["search", out, "red", "--html", str(page)]) == 0
    assert "<i>" not in page.read_text() and "&lt;i&gt;" in page.read_text()


def test_judging_on_the_terminal_and_by_command(own_index, tmp_path, capsys, monkeypatch):
    answers = iter(["y", "", "n", "q"])
    monkeypatch.setattr(builtins, "input", lambda _: next(answers))
    assert main(["search", str(own_index), "red circle", "--judge", "--top", "6"]) == 0
    assert "2 judgements saved" in capsys.readouterr().out
    ids = [r.id for r in Searcher(str(own_index)).search("red circle", top=6)]
    lines = [json.loads(line) for line in (own_index / "judgements.jsonl").read_text().splitlines()]
    assert [(line["id"], line["relevant"]) for line in lines] == [(ids[0], True), (ids[2], False)]
    assert main(["judge", str(own_index), "blue star", "--right", ids[4], "--wrong", ids[5]]) == 0
    assert main(["judge", "export", str(own_index), "--out", str(tmp_path / "t"), "--split", "test"]) == 0
    assert "4 images in" in capsys.readouterr().out
    assert main(["judge", str(own_index), "blue star", "--right", ids[1], "nobody"]) == 1
    assert len((own_index / "judgements.jsonl").read_text().splitlines()) == 4, "all ids are known, or none is saved"
    assert main(["judge", str(own_index), "blue star", "--take-back", ids[4]]) == 0
    assert [(j.query, j.id) for j in Judgements(own_index / "judgements.jsonl").read()] == [
        ("red circle", ids[0]), ("red circle", ids[2]), ("blue star", ids[5]),
    ]  # fmt: skip


def test_a_sentence_may_follow_a_condition(split_index, capsys):
    asked = []
    for argv in (
        ["a b", "--where", "split=test", "object_id=o3"],
        ["--where", "split=test", "object_id=o3", "a b"],
        ["--where", "split=test", "--where=object_id=o3", "--top", "2", "a b"],
        ["--where", "split=test", "object_id=o3", "--json", "--", "a b"],
        ["--top", "2", "--where", "split=test", "--no-refine", "a b", "--where", "object_id=o3"],
        ["--where", "width>=10", "object_id!=o3", "caption~e", "height<900", "a b"],
        ["--where", "object_id in o3,o4", "--where", "caption is not missing", "a b"],
    ):
        main(["search", str(split_index), *argv, "--json"] if "--" not in argv else ["search", str(split_index), *argv])
        out, err = capsys.readouterr()
        asked.append(json.loads(out)["query"] if out else err)
    assert asked == ["a b"] * 7
    assert main(["search", "--where", "split=test", "--json", str(split_index), "a = b"]) == 0
    assert json.loads(capsys.readouterr().out)["query"] == "a = b"


USAGE = {"not of the form COLUMN=VALUE", "not both", "name the items to remove", "--wrong or --take-back"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["search", "{index}", ""], "the query is empty"),
        (["search", "{index}"], "the query is empty"),
        (["search", "{index}", "x", "--top", "99"], "give 1 to 12"),
        (["search", "{index}", "x", "--image", "/nowhere.png"], "image of the query cannot be used"),
        (["search", "{index}", "x", "--where", "split"], "not of the form COLUMN=VALUE"),
        (["search", "{index}", "x", "--where", "size=3"], "has no column 'size'"),
        (["search", "{index}", "--batch", "/nowhere.txt"], "/nowhere.txt cannot be read"),
        (["search", "{index}", "x", "--batch", "/nowhere.txt"], "not both"),
        (["search", "{index}", "x", "--html", "/"], "--html / cannot be written: it is a folder"),
        (["search", "/nowhere", "x"], "is no index"),
        (["index", "info", "/nowhere"], "is no index"),
        (["index", "remove", "{index}"], "name the items to remove"),
        (["judge", "{index}", "x"], "--wrong or --take-back"),
        (["judge", "export", "{index}", "--out", "/tmp"], "judge results first"),
    ],
)
def test_errors_are_named_without_a_traceback(argv, said, split_index, capsys):
    assert main([part.format(index=split_index) for part in argv]) == (2 if said in USAGE else 1)
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_columns_that_are_no_metadata(run, tmp_path, capsys):
    """They are named, and cost no image."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / name)
    columns = {
        "image": ["a.png", "./b.png"], "id": [7, 8], "thumb": [b"\xff\xd8", b"\xff\xd8"], "tags": [["x"], ["y"]],
        "kind": [b"bird", b"cat"], "caption": [["one"], ["two"]],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    out = str(tmp_path / "out")
    assert main(["index", str(tmp_path / "t.parquet"), "--model", str(run), "--out", out, "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "not taken: id (the index has its own), thumb (no single values), tags (no single values)\n" in said
    assert Searcher(out).items["kind"].to_pylist() == ["bird", "cat"] and not read_skipped(tmp_path / "out")
    assert index.add(out, str(tmp_path), workers=0).items == 2, "./b.png is the b.png of the folder"


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_an_infinite_number_costs_no_image(run, tmp_path, capsys, ending):
    """JSON, in which answers are given, has none: it is kept as missing, which is said."""
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (20, 20), "red").save(tmp_path / name)
    rows = [{"image": f"{n}.png", "price": p, "size": s} for n, p, s in zip("abc", (1.5, math.inf, -math.inf), (1, 2, 3))]
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    else:
        (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = str(tmp_path / "out")
    assert main(["index", str(tmp_path / f"t.{ending}"), "--model", str(run), "--out", out, "--workers", "0"]) == 0
    assert "infinite numbers of the table that are kept as missing: price (2)\n" in capsys.readouterr().out
    items = Searcher(out).items
    assert items["price"].to_pylist() == [1.5, None, None] and items["size"].to_pylist() == [1, 2, 3]
    assert not read_skipped(tmp_path / "out")


def test_the_image_of_a_query_is_found_as_those_of_a_table(split_index, tmp_path, capsys):
    """By a URL, and by a name in the other form of Unicode."""
    path = tmp_path / "cafe\u0301.png"
    Image.new("RGB", (20, 20), "red").save(path)
    answers = set()
    for image in (path, tmp_path / "caf\u00e9.png", path.as_uri()):
        assert main(["search", str(split_index), "--image", str(image), "--top", "1", "--json"]) == 0
        answers.add(json.dumps(json.loads(capsys.readouterr().out)["results"]))
    assert len(answers) == 1
