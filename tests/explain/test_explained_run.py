"""`mmref explain` on a tiny run: maps, words, gains, pictures, and the section of the report."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re

import numpy as np
import pytest
from PIL import Image
from support.tiny_run import make_run
from support.tiny_set import TinySource, build_tiny_set

import mmref
from mmref.cli import main
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import QueryError, ShardSetError
from mmref.evaluate.report import section_path, with_section
from mmref.explain import figure, fonts, section
from mmref.explain.explained_run import ExplainedRun
from mmref.explain.figure import draw, enlarged, headline, lines, overlay
from mmref.explain.fonts import fonts_for
from mmref.explain.section import distinct, render, slug, write
from mmref.export.write import export_run
from mmref.retrieval.heat_maps import hidden
from mmref.run.directory import RunDir

QUERY = "grey square 19"  # a caption of the test split


@pytest.fixture(scope="module")
def run_dir(tiny_set, tmp_path_factory):
    """A run with a reconstruction head and a sparse refinement."""
    from support.tiny_set import tiny_config

    path = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        make_run(tiny_config(tiny_set, {"loss.w_rec": 0.2}), str(path), {})
    return path


@pytest.fixture(scope="module")
def objects(tiny_set):
    """Ids of the training objects by row; the first two have no trained reference."""
    return list(ShardSet.open(str(tiny_set)).index("train").object_ids)


@pytest.fixture(scope="module")
def run(run_dir):
    return ExplainedRun(str(run_dir), grid=4)


@pytest.fixture(scope="module")
def exported(run_dir, tmp_path_factory):
    return mmref.load(export_run(str(run_dir), str(tmp_path_factory.mktemp("out") / "out")))


def test_a_query_s_results_are_those_of_the_model(run, exported, tiny_set):
    found = run.explain_query(QUERY)
    index = ShardSet.open(str(tiny_set)).index("test")
    images = exported.encode_images([SampleReader(index).read(i).image_bytes for i in range(len(index))])
    text = exported.encode_text([QUERY])
    order = np.argsort(-exported.refine(text, images)[0], kind="stable")
    right = next(r for r, i in enumerate(order) if index.object_ids[index.object_row[i]] == "thing.19")
    shown = [*order[:3], *([order[right]] if right >= 3 else [])]
    assert [m.image_id for m in found.moves] == [index.image_ids[i] for i in shown]
    initial = (text @ images.T)[0]
    for move, at in zip(found.moves, shown):
        assert move.rank == 1 + list(order).index(at)
        assert move.before == 1 + (initial > initial[at]).sum()
        assert move.gain == pytest.approx(exported.refine(text, images)[0, at] - initial[at], abs=1e-5)
        assert sum(part for _, part in move.references) <= move.gain + 1e-5
        assert move.right == (index.object_ids[index.object_row[at]] == "thing.19")
    if found.moves[0].references:
        assert found.reference == found.moves[0].references[0][0]


def test_the_first_right_image_is_shown_wherever_it_is(run):
    queries = dict.fromkeys(run.queries.texts)
    last = [run.explain_query(text).moves[-1] for text in queries]
    assert any(m.rank > 3 for m in last) and all(m.right for m in last if m.rank > 3)
    assert len(last) > 1


def test_maps_are_what_hiding_costs(run, exported):
    view = run.explain_query(QUERY).views[0]
    assert set(view.heat) == {"caption", "reference", "image"}
    features = exported.encode_images(hidden(view.pixels, 4))
    text = exported.encode_text([QUERY])[0]
    assert view.cosine["caption"] == pytest.approx(float(features[0] @ text), abs=1e-5)
    assert view.cosine["image"] == pytest.approx(1.0, abs=1e-5)
    cost = (features[0] - features[1:]) @ text
    np.testing.assert_allclose(view.heat["caption"], cost.reshape(4, 4), atol=1e-5)
    np.testing.assert_allclose(view.heat["image"], (1 - features[1:] @ features[0]).reshape(4, 4), atol=1e-5)
    assert (view.heat["image"] >= -1e-6).all(), "nothing is more like an image than itself"


def test_a_training_object_has_its_own_reference(run, objects):
    name = objects[5]
    found = run.explain_object(name)
    assert found.kind == "object" and found.reference == name and found.title == f"{name} (train)"
    assert all(c.endswith(f" {name.split('.')[1]}") for c in found.captions) and found.read and not found.moves
    reference = run.references[run.reference_ids.index(name)]
    unit = reference[0] / np.linalg.norm(reference[0])
    pixels = found.views[0].pixels
    own = run.encoder.images(pixels[None])[0]
    assert found.views[0].cosine["reference"] == pytest.approx(float(own @ unit), abs=1e-5)


def test_an_object_that_was_not_trained_gets_a_reference_of_its_features(run, objects):
    for name in ("thing.19", objects[0]):  # of test; of train, and never visited
        found = run.explain_object(name)
        assert found.reference == f"{name}, not trained: the mean of its features"
        assert found.views[0].cosine["reference"] > 0


def test_an_object_is_explained_by_the_images_that_can_be_read(run, objects, monkeypatch):
    whole = [view.image_id for view in run.explain_object(objects[5]).views]
    assert len(whole) > 1
    read, broken = SampleReader.read, set(whole[:1])

    def damaged(self, i):
        raw = read(self, i)
        bad = self.index.image_ids[i] in broken
        return dataclasses.replace(raw, image_bytes=raw.image_bytes[:20]) if bad else raw

    monkeypatch.setattr(SampleReader, "read", damaged)
    assert [view.image_id for view in run.explain_object(objects[5]).views] == whole[1:]
    broken.update(whole)
    with pytest.raises(QueryError, match="no readable image with a caption"):
        run.explain_object(objects[5])


def test_captions_that_refinement_moved_come_first(run):
    chosen = run.moved(4)
    assert len(set(chosen)) == 4 and set(chosen) <= set(run.queries.texts)
    still = dataclasses.replace(run.refinement, weight=0.0)
    before = run.refinement
    run.refinement = still
    try:
        assert len(run.moved(2)) == 2, "also where nothing moved"
        assert run.explain_query(QUERY).moves[0].references == []
    finally:
        run.refinement = before


def test_any_sentence_can_be_asked(run):
    found = run.explain_query("something nobody wrote")
    assert [m.right for m in found.moves] == [None] * 3
    with pytest.raises(QueryError, match="empty"):
        run.explain_query("  ")
    with pytest.raises(QueryError, match=r"no object 'nobody'"):
        run.explain_object("nobody")


@pytest.mark.parametrize("kind", ["dense", "expansion"])
def test_other_refinements_are_explained_alike(tiny_set, make_config, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_run(make_config(), str(tmp_path / "run"), {"kind": kind})
    run = ExplainedRun(str(tmp_path / "run"), grid=2)
    found = run.explain_query("something nobody wrote")
    model = mmref.load(export_run(str(tmp_path / "run"), str(tmp_path / "out")))
    index = ShardSet.open(str(tiny_set)).index("test")
    images = model.encode_images([SampleReader(index).read(i).image_bytes for i in range(len(index))])
    if kind == "expansion":  # an export centres dense codes by the captions of val
        order = np.argsort(-model.refine(model.encode_text(["something nobody wrote"]), images)[0], kind="stable")
        assert [m.image_id for m in found.moves] == [index.image_ids[i] for i in order[:3]]
    assert found.read == "" and found.telling == [], "no reconstruction head, no words"
    assert any(m.references for m in found.moves)


def test_a_run_without_references_has_maps_of_caption_and_image(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    align = {"loss.w_guide": 0.0, "loss.w_fuse": 0.0}
    make_run(make_config(align), str(tmp_path / "run"), {})
    run = ExplainedRun(str(tmp_path / "run"), grid=2)
    for found in (run.explain_query(QUERY), run.explain_object("thing.7")):
        assert found.reference == "" and set(found.views[0].heat) == {"caption", "image"}
        assert "has set no references" in render([found], [b"png"])


def full_disk(*_):
    raise OSError("the disk is full")


def test_pictures_and_section_are_written_and_replaced(run_dir, objects, tmp_path, capsys, monkeypatch):
    import shutil

    trained, number = objects[5], objects[5].split(".")[1]

    path = tmp_path / "run"
    shutil.copytree(run_dir, path)
    report = "<html><!-- explanations -->\n<!-- end of explanations --><p>rest</p></html>"
    (path / "report.html").write_text(report)
    assert main(["explain", str(path), "--query", QUERY, "--object", trained, "--grid", "2"]) == 0
    said = capsys.readouterr().out
    assert "the reference says: " in said and "before" in said and "report.html" in said
    pictures = sorted((path / "explain").glob("*.png"))
    assert [p.name for p in pictures] == [f"1-object-thing-{number}-train.png", "2-query-grey-square-19.png"]
    for picture in pictures:
        assert np.asarray(Image.open(picture)).std() > 10
    page = (path / "report.html").read_text()
    assert page.count("<h2>Explained</h2>") == 1 and page.endswith("<p>rest</p></html>")
    assert page.count("<article") == 2 and f" {number}”" in page and f'data-object="{trained}"' in page
    assert 'src="data:image/png;base64,' in page and "http" not in page.replace("http-equiv", "")
    (path / "explain" / "mine.txt").write_text("mine")
    before = {p.name for p in (path / "explain").iterdir()}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(RunDir, "write_bytes", full_disk)
        main(["explain", str(path), "--query", "<b>red</b>", "--grid", "2"])
    assert {p.name for p in (path / "explain").iterdir()} == before, "the old ones go when the new are there"
    assert main(["explain", str(path), "--query", "<b>red</b>", "--grid", "2"]) == 0
    page = (path / "report.html").read_text()
    assert page.count("<h2>Explained</h2>") == 1 and "&lt;b&gt;red" in page
    assert page.count("<article") == 1, "what was explained before is gone"
    checkpoint = json.loads((path / "metrics.json").read_text())["checkpoint"]
    assert (path / section_path(checkpoint)).read_text() in page
    left = {p.name for p in (path / "explain").iterdir()}
    assert "mine.txt" in left and len(left) == 3, "earlier pictures are gone, and nothing else"


def test_without_arguments_it_chooses(run_dir, tmp_path, capsys):
    import shutil

    path = tmp_path / "run"
    shutil.copytree(run_dir, path)
    assert main(["explain", str(path), "--examples", "2", "--grid", "1"]) == 0
    assert {p.name.split("-")[1] for p in (path / "explain").glob("*.png")} == {"query", "object"}


def test_what_cannot_be_explained_is_said(run_dir):
    with pytest.raises(ShardSetError, match="no split `dev`"):
        ExplainedRun(str(run_dir), split="dev")
    with pytest.raises(QueryError, match="at least 1 cell"):
        ExplainedRun(str(run_dir), grid=0)


def test_colour_lies_where_hiding_costs():
    picture = np.full((40, 60, 3), 120, np.uint8)
    heat = np.zeros((2, 3), np.float32)
    heat[0, 2], heat[1, 0] = 0.5, -0.5
    drawn = overlay(picture, heat)
    change = np.abs(drawn.astype(int) - 120).sum(2)
    assert drawn.shape == picture.shape and change[:10, 50:].mean() > 100
    assert change[30:, :10].max() <= 3, "a part whose hiding helps stays as it is"
    assert (overlay(picture, -np.abs(heat)) == 120).all()


def test_small_images_are_enlarged_and_shapes_kept(run):
    assert enlarged(np.zeros((16, 32, 3), np.uint8)).shape == (200, 400, 3)
    assert enlarged(np.zeros((300, 250, 3), np.uint8)).shape == (300, 250, 3)
    picture = Image.open(io.BytesIO(draw(run.explain_object("thing.7"))))
    assert picture.format == "PNG" and picture.size[0] > 600


def test_names_and_captions_for_people():
    assert slug("a red bird: <b>!") == "a-red-bird-b" and slug("") == "untitled" and len(slug("x" * 99)) == 40
    assert distinct(["a", "a", "b"]) == ["a", "b"] and len(distinct([str(i) for i in range(100)])) == 6
    assert with_section("<p>an old report</p>", "new") == "<p>an old report</p>"


def test_pictures_and_results_are_labelled_with_the_shortest_caption(run, objects):
    """Captions of the tiny set are `<color> <shape> <number>`, and a longer sentence of each image."""
    asked = run.explain_query(QUERY)
    known = run.explain_object(objects[5])
    for shown in (*asked.views, *asked.moves, *known.views):
        number = shown.object_id.split(".")[1]
        assert shown.label.split()[-1] == number and len(shown.label.split()) == 3
    page = render([asked], [b"png"])
    for name in {asked.reference, *(name for m in asked.moves for name, _ in m.references)}:
        assert asked.labels[name].split()[-1] == name.split(".")[1] and f'title="{name}">{asked.labels[name]}</div>' in page
    first = asked.moves[0]
    named = f"{first.label} (image {first.image_id} of {first.object_id})"
    assert page.count(named) == 2, "of the figure, and of the row"
    assert f'data-object="{first.object_id}"' in page and "text-overflow: ellipsis" in page
    assert f"{first.label}</div>" in page and f">{first.image_id}" not in page


def test_text_above_an_image_ends_where_it_is_cut():
    assert lines("grey square") == ["grey square"] and lines("") == []
    cut = lines("a person in a grey coat with a black bag over the left shoulder who walks past a red car and a tree")
    assert len(cut) == 2 and cut[-1].endswith(" …") and max(map(len, cut)) <= 42


def test_a_picture_says_what_it_explains(run, objects):
    said = headline(run.explain_query(QUERY), 200).split("\n")
    assert said[0] == f"“{QUERY}”" and re.match(r"reference of \w+ \w+ \d+: ", said[1])
    found = run.explain_object(objects[5])
    assert headline(found, 300) == f"{objects[5]} (train)\nreference of {found.views[0].label}: “{found.read}”"
    assert max(map(len, headline(found, 20).split("\n"))) <= 20


def test_a_font_with_the_letters_is_looked_for(monkeypatch):
    assert fonts_for("a red bird, été \n") == (["DejaVu Sans"], "")
    have = {"DejaVuSans.ttf": {"x"}, "STIXGeneral.ttf": set("红色")}
    monkeypatch.setattr(fonts, "_letters", lambda path: have.get(os.path.basename(path), set()))
    assert fonts_for("红色的 x") == (["DejaVu Sans", "STIXGeneral"], "的")
    assert fonts_for("x\n") == (["DejaVu Sans"], "")


def test_letters_without_a_font_are_told_once(run, tmp_path, monkeypatch, capsys, recwarn):
    found = dataclasses.replace(run.explain_query(QUERY), title="红色 的 圆")
    for module in (figure, section):
        monkeypatch.setattr(module, "fonts_for", lambda text: (["DejaVu Sans"], "红色"))
    assert draw(found).startswith(b"\x89PNG")
    monkeypatch.setattr(section, "draw", lambda explanation: b"png")
    write(RunDir(str(tmp_path)), "step-1", [found, found])
    assert "no font here has 2 letters of the pictures (红色)" in (said := capsys.readouterr().err) and said.count("no font") == 1
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_dollars_are_no_mathematics(run):
    """Matplotlib takes what is between two of them for a formula, and ends where it is none."""
    found = run.explain_query("was $20 (20% off), now $16")
    found.views[0] = dataclasses.replace(found.views[0], note=found.title)
    assert draw(found).startswith(b"\x89PNG")


def test_another_set_has_pictures_and_a_section_of_its_own(run_dir, tmp_path, capsys):
    import shutil

    path, other = tmp_path / "run", build_tiny_set(tmp_path / "other", TinySource("other", first=100))
    shutil.copytree(run_dir, path)
    for name in ("report.html", "report-other.html"):
        (path / name).write_text("<!-- explanations -->\n<!-- end of explanations -->")
    argv = ["explain", str(path), "--grid", "1", "--query"]
    assert main([*argv, "red circle"]) == 0 and main([*argv, "blue star", "--data", str(other)]) == 0
    assert [p.name for p in (path / "explain").glob("*.png")] == ["1-query-red-circle.png"]
    assert [p.name for p in (path / "explain-other").glob("*.png")] == ["1-query-blue-star.png"]
    own, others = (path / "report.html").read_text(), (path / "report-other.html").read_text()
    assert "“red circle”" in own and "“blue star”" not in own and "“blue star”" in others and "“red circle”" not in others


def test_ids_of_another_set_are_no_trained_objects(run_dir, run, objects, tiny_set, tmp_path):
    """Numbers of persons or classes are those of others there."""
    other = ExplainedRun(str(run_dir), str(build_tiny_set(tmp_path / "other", TinySource("other"))), grid=1)
    assert set(objects) <= set(other.reference_ids) | set(objects[:2]) and objects[-1] in other.shards.index("train").object_ids
    assert "not trained" not in run.explain_object(objects[-1]).reference
    assert other.explain_object(objects[-1]).reference.endswith("not trained: the mean of its features")
    assert other._train_captions(objects[-1]) == [] != run._train_captions(objects[-1])
    (tmp_path / "link").symlink_to(tiny_set)
    assert "not trained" not in ExplainedRun(str(run_dir), str(tmp_path / "link"), grid=1).explain_object(objects[-1]).reference
