"""Searching: the same results as the evaluation, filters, images, both, many at once, many threads, and bad queries."""

from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import mmref
from mmref.data.sample_reader import SampleReader
from mmref.data.shard_set import ShardSet
from mmref.errors import QueryError
from mmref.evaluate.evaluation import CAPTIONS, Evaluation
from mmref.evaluate.features import read_pixels, read_queries
from mmref.evaluate.protocols import Chosen
from mmref.evaluate.split_features import SplitFeatures
from mmref.retrieval import index
from mmref.retrieval.searcher import Query, Searcher


@pytest.fixture
def searcher(split_index: Path) -> Searcher:
    return Searcher(str(split_index))


def evaluation_of(searcher: Searcher, root: Path, split: str) -> Evaluation:
    model, of = searcher.model, ShardSet.open(str(root)).index(split)
    queries = read_queries(of)
    pixels, _ = read_pixels(SampleReader(of), range(len(of)), model.config.data)
    image, text = model.encode_images(list(pixels)), model.encode_text(queries.texts)
    features = SplitFeatures(of, queries, image, np.arange(len(of)), text, [])
    return Evaluation(model.config, features, model.space, {CAPTIONS: Chosen(model.refinement)})


@pytest.mark.parametrize("kind", ["sparse", "dense", "expansion"])
def test_a_search_ranks_as_the_evaluation_does(kind, make_config, tiny_set, tmp_path, monkeypatch):
    from support.tiny_run import make_run

    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    make_run(make_config(), str(tmp_path / "run"), {"kind": kind, "top_p": 5})
    index.create(str(tiny_set), str(tmp_path / "run"), str(tmp_path / "index"), split="test", workers=0)
    searcher = Searcher(str(tmp_path / "index"))
    evaluation = evaluation_of(searcher, tiny_set, "test")
    if kind == "dense":  # an evaluation centres its queries by their own mean, a search by that of val
        searcher.ranker.text_mean = searcher.model.space.coordinates(evaluation.pair_features).mean(0)
    q, moved = evaluation.features.queries, 0
    for refine in (False, True):
        ranked = evaluation.text_to_image(evaluation.refine_images if refine else None)
        answers = searcher.search_many([q.texts[t] for t in q.text], top=len(searcher), refine=refine)
        for at, results in enumerate(answers):
            hits = [r.object_id == evaluation.features.index.object_ids[q.objects[at]] for r in results]
            assert hits.index(True) == ranked.first_rank[at] - 1, "the same first hit"
            assert [r.rank for r in results] == list(range(1, len(searcher) + 1))
            assert all(a.score >= b.score for a, b in pairwise(results))
            moved += sum(r.rank != r.rank_before for r in results)
    assert moved > 0, "refinement moved something"


def test_results_say_what_raised_them(searcher):
    results = searcher.search("red circle 0", top=len(searcher))
    for result in results:
        gain = result.score - result.initial
        assert gain >= -1e-6
        assert sum(r.gain for r in result.references) <= gain + 1e-5
        assert all(a.gain >= b.gain for a, b in pairwise(result.references))
    raised = [r for r in results if r.score > r.initial + 1e-3]
    assert raised and all(r.references and r.references[0].caption for r in raised)
    plain = searcher.search("red circle 0", top=len(searcher), refine=False)
    assert all(r.score == r.initial and r.rank == r.rank_before and not r.references for r in plain)
    assert {r.id: r.initial for r in results} == pytest.approx({r.id: r.initial for r in plain}, abs=1e-6)
    assert [r.rank_before for r in sorted(results, key=lambda r: r.rank_before)] == [r.rank for r in plain]


def test_only_the_first_candidates_are_refined(searcher):
    plain = searcher.search("blue star", top=len(searcher), refine=False)
    few = searcher.search("blue star", top=len(searcher), candidates=3)
    assert {r.id for r in few[:3]} == {r.id for r in plain[:3]}
    assert [r.id for r in few[3:]] == [r.id for r in plain[3:]]
    assert all(r.score == r.initial for r in few[3:])
    everything = searcher.search("blue star", top=3, candidates=0)
    assert [r.id for r in everything] == [r.id for r in searcher.search("blue star", top=len(searcher))[:3]]


def test_an_image_finds_itself_and_words_pull(searcher, tmp_path):
    item = searcher.items["id"][4].as_py()
    data = searcher.image_bytes(item)
    (tmp_path / "q.img").write_bytes(data)
    for image in (data, str(tmp_path / "q.img")):
        found = searcher.search(image=image, top=3, refine=False)
        assert found[0].id == item and found[0].score == pytest.approx(1, abs=1e-5)
    text = "grey square"
    only_text, only_image = searcher.search(text, top=5), searcher.search(image=data, top=5)
    for weight, expected in ((0.0, only_text), (1.0, only_image)):
        both = searcher.search(text, image=data, image_weight=weight, top=5)
        assert [(r.id, pytest.approx(r.score, abs=1e-5)) for r in both] == [(r.id, r.score) for r in expected]
    features = searcher.encode([Query(text), Query(image=data), Query(text, data, 0.25)]).features
    mixed = 0.75 * features[0] + 0.25 * features[1]
    np.testing.assert_allclose(features[2], mixed / np.linalg.norm(mixed), atol=1e-6)
    picture = Image.new("RGB", (30, 20), "red")
    assert len(searcher.search(image=picture)) == 10


def test_filters_leave_the_others_out(tiny_set, run, tmp_path):
    index.create(str(tiny_set), str(run), str(tmp_path / "all"), workers=0)
    searcher = Searcher(str(tmp_path / "all"))
    everything = searcher.search("green circle", top=len(searcher))
    val = searcher.search("green circle", top=len(searcher), where={"split": "val"})
    assert {r.metadata["split"] for r in val} == {"val"}
    assert {r.id for r in val} == {r.id for r in everything if r.metadata["split"] == "val"}
    order = [r.id for r in everything if r.metadata["split"] == "val"]
    assert [r.id for r in val] == order, "every candidate is refined, so the order stays"
    assert searcher.search("x", where={"split": "val", "object_id": "nobody"}) == []
    with pytest.raises(QueryError, match=r"has no column 'colour' to filter or sort by. It has: split, caption"):
        searcher.search("x", where={"colour": "red"})


def test_many_at_once_and_threads_answer_as_one(searcher, monkeypatch):
    texts = [f"{c} {s}" for c in ("red", "green", "blue") for s in ("circle", "square", "star")]
    alone = [searcher.search(text, top=4) for text in texts]

    def same(found):
        for a, b in zip(found, alone, strict=True):
            assert [r.id for r in a] == [r.id for r in b]
            assert [r.score for r in a] == pytest.approx([r.score for r in b], abs=1e-5)

    same(searcher.search_many(texts, top=4))
    fresh = Searcher(str(searcher.index), cached=2)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            same(list(pool.map(lambda text: fresh.search(text, top=4), texts)))
    assert len(fresh._encoder._kept) == 2
    monkeypatch.setattr(searcher.model, "encode_text", None)
    same(searcher.search_many(texts, top=4))  # from the cache
    assert searcher.search_many([]) == []


def test_bad_queries_are_named(searcher):
    for query in ({}, {"text": "  "}):
        with pytest.raises(QueryError, match="the query is empty"):
            searcher.search(**query)
    for image in (b"no image", "/nowhere.jpg"):
        with pytest.raises(QueryError, match="image of the query cannot be used"):
            searcher.search(image=image)
    for top in (0, len(searcher) + 1):
        with pytest.raises(QueryError, match=f"give 1 to {len(searcher)}"):
            searcher.search("x", top=top)
    with pytest.raises(QueryError, match=r"the query 'caf\\udce9' is no text that UTF-8 can hold"):
        searcher.search("caf\udce9")
    assert searcher.search("a thing", where={"split": "caf\udce9"}) == []
    with pytest.raises(QueryError, match="has no item 'x'"):
        searcher.thumbnail("x")
    with pytest.raises(QueryError, match="the query is 5, which is no text"):
        searcher.search(5)
    for name in ("top", "offset", "candidates"):
        with pytest.raises(QueryError, match=rf"{name} is 3\.0: give a whole number"):
            searcher.search("x", **{name: 3.0})
    assert len(searcher.search("x", top=np.int64(3), offset=np.int64(1))) == 3
    for weight in (2, "0.5", None):
        with pytest.raises(QueryError, match=f"weight of the image is {weight!r}"):
            searcher.search("x", image_weight=weight)
    for sort in (["split"], 5):
        with pytest.raises(QueryError, match="give the name of one column"):
            searcher.search("x", sort=sort)
    for search in (searcher.search_many, searcher.search_many_objects):
        for single in ("a bird", Query("a bird"), Path("a.jpg"), None):
            with pytest.raises(QueryError, match=r"queries is .*: give a list"):
                search(single)
    with pytest.raises(QueryError, match=r"within is .*: give a list"):
        searcher.search("x", within=searcher.items["id"][0].as_py())
    with pytest.raises(QueryError, match="has no item '3'"):
        searcher.item(3)
    with pytest.raises(QueryError, match="candidates is -1"):
        searcher.search("x", candidates=-1)


def test_queries_and_ids_come_as_arrays_columns_and_generators(searcher):
    texts = ["a bird", "a red circle"]
    ids = searcher.items["id"].slice(0, 3)
    for search in (searcher.search_many, searcher.search_many_objects):
        expected = search(texts, within=ids.to_pylist())
        for given in (np.array(texts), pa.array(texts), (text for text in texts)):
            assert search(given, within=ids) == expected
        assert search(text for text in ()) == search(np.array([])) == []


def test_a_small_index_answers_with_all_it_has(folder, run, tmp_path):
    index.create(str(folder / "deep"), str(run), str(tmp_path / "out"), workers=0)
    assert len(mmref.Searcher(str(tmp_path / "out")).search("red circle")) == 5


def test_a_script_that_holds_an_index_to_its_end_ends_in_silence(split_index):
    script = "import atexit, sys, mmref; searcher = mmref.Searcher(sys.argv[1]); atexit.register(lambda: searcher)"
    done = subprocess.run([sys.executable, "-c", script, str(split_index)], text=True, capture_output=True, timeout=300)
    assert done.returncode == 0 and "ignored" not in done.stderr, done.stderr


def test_a_searcher_goes_to_another_process_as_the_place_of_its_index(searcher):
    sent = pickle.loads(pickle.dumps(searcher))
    assert sent.search("a red circle", top=3) == searcher.search("a red circle", top=3)
    assert len(pickle.dumps(searcher)) < 1000 and pickle.dumps(sent.reopened()) == pickle.dumps(searcher)


def test_files_of_an_index_are_closed_with_it(own_index):
    def held() -> list[str]:
        links = [Path("/proc/self/fd") / number for number in os.listdir("/proc/self/fd")]
        return [file for link in links if link.is_symlink() and (file := os.readlink(link)).startswith(str(own_index))]

    searcher = Searcher(str(own_index))
    assert held()
    del searcher
    gc.collect()
    assert not held()


def test_three_lines(split_index):
    results = mmref.Searcher(str(split_index)).search("a small yellow bird", top=2)
    assert [r.rank for r in results] == [1, 2] and results[0].to_dict()["id"] == results[0].id
