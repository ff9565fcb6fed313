"""`mmref index duplicates`: what is alike is found as a loop over all pairs finds it, and is taken out for good."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.browser import browser, find_chromium
from support.images import write_images
from support.old_index import as_of_old

from mmref.cli import main
from mmref.errors import QueryError, SearchIndexError, UsageError
from mmref.retrieval import duplicates as module
from mmref.retrieval import index
from mmref.retrieval.duplicates import as_table, find_duplicates, read_choice
from mmref.retrieval.duplicates_command import duplicates_main
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.show import render_duplicates


def picture(path: Path, number: int, size: tuple[int, int] = (30, 20), **how) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST).save(path, **how)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, run: Path) -> tuple[Path, Path]:
    """Pictures: 0 three times with the same bytes, 1 also larger, the rest by themselves; and their index."""
    root = tmp_path_factory.mktemp("alike")
    for number in range(6):
        picture(root / "photos" / f"{number}.png", number)
    for name in ("0 again.png", "deep/0.png"):
        (root / "photos" / name).parent.mkdir(exist_ok=True)
        shutil.copy(root / "photos" / "0.png", root / "photos" / name)
    picture(root / "photos" / "large" / "1.png", 1, (60, 40))
    index.create(str(root / "photos"), str(run), str(root / "out"), workers=0)
    return root / "photos", root / "out"


@pytest.fixture
def own(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[1], tmp_path / "out"))


def names(found) -> list[list[str]]:
    return [[member.id for member in group.members] for group in found.groups]


def test_the_same_bytes_and_no_features(made):
    found = find_duplicates(str(made[1]), above=1)
    assert names(found) == [["0 again.png", "0.png", "deep/0.png"]] and found.groups[0].same_bytes
    assert [member.leave_out for member in found.groups[0].members] == [False, True, True]
    assert found.left_out() == ["0.png", "deep/0.png"]


def literal(features: np.ndarray, above: float) -> list[list[int]]:
    """Groups by walking from row to row."""
    left, groups = set(range(len(features))), []
    while left:
        group, todo = [], [min(left)]
        left.discard(todo[0])
        while todo:
            row = todo.pop()
            group.append(row)
            near = [other for other in sorted(left) if features[row] @ features[other] >= above]
            left -= set(near)
            todo += near
        groups.append(sorted(group))
    return [group for group in groups if len(group) > 1]


@pytest.mark.parametrize(("block", "pairs"), [(3, 1 << 20), (7, 0), (2048, 1 << 20), (3, 4)])
def test_blocks_find_what_a_loop_over_all_pairs_finds(block, pairs, split_index, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    monkeypatch.setattr(module, "MOST_PAIRS", pairs)
    searcher = Searcher(str(split_index))
    features = np.concatenate([np.asarray(s.features, np.float32) for s in searcher.segments])
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    ids = searcher.items["id"].to_pylist()
    pairs = np.sort((features @ features.T)[np.triu_indices(len(features), 1)])
    for above in (float(pairs[-3] + pairs[-4]) / 2, float(pairs[-8] + pairs[-9]) / 2, 0.5):
        found = find_duplicates(str(split_index), above=above)
        expected = {tuple(ids[row] for row in group) for group in literal(features, above)}
        assert {tuple(sorted(group, key=ids.index)) for group in names(found)} == expected and expected
        for group in found.groups:
            first = features[ids.index(group.members[0].id)]
            for member in group.members:
                assert member.cosine == pytest.approx(float(first @ features[ids.index(member.id)]), abs=1e-4)
        assert [group.lowest for group in found.groups] == sorted((group.lowest for group in found.groups), reverse=True)


def test_a_chain_is_one_group_that_tells_how_unlike_its_ends_are(own):
    folder = own / "segments" / "000000"
    features = np.load(folder / "features.npy")
    angle = np.deg2rad(np.array([0, 10, 20, 30, 90, 150, 210, 270, 330]))
    turned = np.zeros(features.shape, np.float32)
    turned[:, 0], turned[:, 1] = np.cos(angle), np.sin(angle)
    np.save(folder / "features.npy", turned)
    as_of_old(folder, without="file_sha256")
    found = find_duplicates(str(own), above=0.98)
    (group,) = found.groups
    assert len(group.members) == 4 and group.lowest == pytest.approx(np.cos(np.deg2rad(30)), abs=1e-4)


def test_the_largest_is_kept_on_request(made):
    cosine = next(m.cosine for g in find_duplicates(str(made[1]), above=0.9).groups for m in g.members if m.id == "large/1.png")
    for keep, kept in (("first", "1.png"), ("largest", "large/1.png")):
        found = find_duplicates(str(made[1]), above=cosine - 0.01, keep=keep)
        group = next(g for g in found.groups if "1.png" in [m.id for m in g.members])
        assert group.members[0].id == kept and not group.members[0].leave_out
        assert not group.same_bytes or keep == "none"


def test_an_index_without_hashes_reads_the_files(made, own):
    as_of_old(own / "segments" / "000000", without="file_sha256")
    assert names(find_duplicates(str(own), above=1)) == names(find_duplicates(str(made[1]), above=1))
    near = find_duplicates(str(own), above=0.9999)
    assert near.groups[0].same_bytes and near.groups[0].members[0].id == "0 again.png"


def test_an_approximate_index_is_asked_and_said(tmp_path, run, capsys):
    write_images(tmp_path / "photos", range(12))
    shutil.copytree(tmp_path / "photos", tmp_path / "photos" / "again")
    index.create(str(tmp_path / "photos"), str(run), str(tmp_path / "out"), kind="hnsw", workers=0)
    found = find_duplicates(str(tmp_path / "out"), above=0.9999)
    assert not found.exact and all(len(group.members) >= 2 for group in found.groups)
    assert len(found.members()) == found.items
    assert duplicates_main([str(tmp_path / "out")]) == 0
    assert "approximate index: some may be missed" in capsys.readouterr().out


def test_a_table_is_reviewed_and_left_out_for_good(made, own, tmp_path, capsys):
    for ending in ("csv", "jsonl"):
        assert duplicates_main([str(own), "--above", "1", "--table", str(tmp_path / f"t.{ending}"), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert [m["id"] for m in told["groups"][0]["members"]] == ["0 again.png", "0.png", "deep/0.png"]
        assert read_choice(str(tmp_path / f"t.{ending}")) == ["0.png", "deep/0.png"]
    rows = list(csv.DictReader((tmp_path / "t.csv").open()))
    assert [row["leave_out"] for row in rows] == ["no", "yes", "yes"] and {row["same_bytes"] for row in rows} == {"yes"}
    text = (tmp_path / "t.csv").read_text().replace("yes,deep/0.png", "no,deep/0.png")
    (tmp_path / "t.csv").write_text(text)
    assert duplicates_main([str(own), "--leave-out", str(tmp_path / "t.csv")]) == 0
    assert "1 images left out for good" in capsys.readouterr().out
    ids = Searcher(str(own)).items["id"].to_pylist()
    assert "0.png" not in ids and "deep/0.png" in ids
    manifest = index.add(str(own), str(made[0]), workers=0)
    assert manifest.items == 8 and "1 stay out" in manifest.notes[1]


def test_a_choice_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "t.csv").write_text("id,leave_out\na.png,maybe\n")
    with pytest.raises(QueryError, match=r"row 2: leave_out is 'maybe'; write yes or no"):
        read_choice(str(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_text("id,leave_out\na.png,no\n")
    with pytest.raises(QueryError, match="names no image"):
        read_choice(str(tmp_path / "t.csv"))
    (tmp_path / "ids.txt").write_text("a.png\n\nb c.png\na.png\n")
    assert read_choice(str(tmp_path / "ids.txt")) == ["a.png", "b c.png"]


def test_names_may_begin_and_end_with_spaces(tmp_path, run):
    chosen = [" a.png", "b.png "]
    (tmp_path / "ids.txt").write_bytes(" a.png\r\n  \r\nb.png ".encode("utf-8-sig"))
    (tmp_path / "t.csv").write_text('id,leave_out\n" a.png",yes\nb.png , yes \nc.png,no\n')
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"id": name, "leave_out": "yes"}) + "\n" for name in chosen))
    for name in ("ids.txt", "t.csv", "t.jsonl"):
        assert read_choice(str(tmp_path / name)) == chosen
    for number, name in enumerate((" a.png", "b.png")):
        picture(tmp_path / "photos" / name, number)
    index.create(str(tmp_path / "photos"), str(run), str(tmp_path / "out"), workers=0)
    (tmp_path / "ids.txt").write_text(" a.png\n")
    assert main(["index", "remove", str(tmp_path / "out"), "--ids-file", str(tmp_path / "ids.txt")]) == 0
    assert Searcher(str(tmp_path / "out")).items["id"].to_pylist() == ["b.png"]


def test_remove_takes_all_but_one_of_each_group_but_not_most_of_an_index(own, capsys):
    before = (own / "manifest.json").read_bytes()
    with pytest.raises(SearchIndexError, match=r"8 of 9 images would go\. Nothing was removed"):
        duplicates_main([str(own), "--above", "0.0001", "--remove"])
    assert (own / "manifest.json").read_bytes() == before
    assert duplicates_main([str(own), "--above", "1", "--remove"]) == 0
    out = capsys.readouterr().out
    assert "1 groups with the same bytes, of 3 images; 2 are not the one kept" in out and "2 images left out for good" in out
    assert not find_duplicates(str(own), above=1).groups
    assert duplicates_main([str(own), "--above", "1", "--remove"]) == 0


@pytest.mark.parametrize("above", ["0", "-1", "1.2", "nan"])
def test_a_threshold_that_is_none_is_named(own, above):
    with pytest.raises(QueryError, match="--above"):
        duplicates_main([str(own), f"--above={above}"])


def test_options_that_do_not_go_together(own, tmp_path):
    with pytest.raises(UsageError, match="give it alone"):
        duplicates_main([str(own), "--leave-out", "x", "--remove"])
    with pytest.raises(UsageError, match="--remove needs --above"):
        duplicates_main([str(own), "--remove"])
    with pytest.raises(UsageError, match=r"\.csv or \.jsonl"):
        duplicates_main([str(own), "--table", str(tmp_path / "t.txt")])


def test_the_command_is_found(own, capsys):
    assert main(["index", "duplicates", str(own), "--above", "1"]) == 0
    assert "0 again.png, 0.png, deep/0.png" in capsys.readouterr().out


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_is_reviewed_in_a_browser(made, tmp_path, width):
    found = find_duplicates(str(made[1]), above=0.9999)
    (tmp_path / "page.html").write_text(render_duplicates(found))
    with browser(find_chromium() or "") as page:
        page.screen(width, 800, phone=width < 500)
        page.open((tmp_path / "page.html").as_uri())
        marked = "[...document.querySelectorAll(':checked')].map(box => box.value)"
        assert page.run(marked) == found.left_out()
        assert f"{len(found.left_out())} of {len(found.members())}" in page.run("document.getElementById('count').textContent")
        assert page.run("document.documentElement.scrollWidth") <= width
        page.run("document.querySelector('label').click()")
        assert page.run(marked)[0] == found.groups[0].members[0].id
        saved = page.run("""(async () => {
            let blob; URL.createObjectURL = given => { blob = given; return '#'; };
            HTMLAnchorElement.prototype.click = () => {};
            document.getElementById('save').onclick();
            return await blob.text();
        })()""")
        assert saved.split("\n")[:-1] == page.run(marked)
        page.run("document.getElementById('none').click()")
        assert page.run("document.getElementById('save').disabled")
        assert not page.errors and all(url.startswith(("file:", "data:", "blob:")) for url in page.requested)
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(Path(folder, f"duplicates-{width}.png"))


def test_names_are_escaped_on_the_page(tmp_path, run):
    for name in ("<b>one.png", "two&.png"):
        picture(tmp_path / "photos" / name, 3)
    index.create(str(tmp_path / "photos"), str(run), str(tmp_path / "out"), workers=0)
    page = render_duplicates(find_duplicates(str(tmp_path / "out"), above=1))
    assert "<b>one" not in page and "&lt;b&gt;one.png" in page and 'value="two&amp;.png"' in page
    assert as_table(find_duplicates(str(tmp_path / "out"), above=1), ".csv").decode().count("photos") == 2
