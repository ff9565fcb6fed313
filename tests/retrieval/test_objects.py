"""Searching by object: against a slow twin over all images, where objects have many images, and over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from support.services import LIMITS, client_of

from mmref.cli import main
from mmref.errors import QueryError
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings
from mmref.retrieval import index
from mmref.retrieval.chunks import code_arrays
from mmref.retrieval.objects import Objects, rank_objects
from mmref.retrieval.ranking import Encoded, Ranker
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.service.answering import Ask, Engine
from mmref.retrieval.vectors import Approximate

DIM = 6


def unit(*shape, seed=0):
    found = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


class Part:
    """A segment in memory."""

    def __init__(self, features, first, space, refinement):
        self.features, self.uids = features, np.arange(first, first + len(features))
        self.codes = code_arrays(space, refinement, features)


def a_ranker(features, top_p=None, approximate=None, kind="sparse"):
    space = ReferenceSpace(unit(9, 2, DIM, seed=5))
    refinement = RefinementSettings(kind=kind, weight=0.5, top_r=4, tau=0.05, top_p=top_p)
    parts = [Part(part, first, space, refinement) for first, part in ((0, features[:90]), (90, features[90:]))]
    return Ranker(parts, approximate, space, refinement)


def crowd(seed=0):
    """Features of 400 images: object 0 has 330 of them, all near one direction; 19 others a few; 12 are of none."""
    rng = np.random.default_rng(seed)
    of = np.concatenate([np.zeros(330, int), rng.integers(1, 20, 58), np.full(12, -1)])
    features = unit(400, DIM, seed=seed)
    features[:330] = 0.1 * features[:330] + np.eye(DIM, dtype=np.float32)[0]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    order = rng.permutation(400)
    return features[order], of[order]


def brute_force(ranker, of, queries, top, images, refine, candidates, among):
    """[(object, score, initial score, rank before, [image rows])] of each query, by the ranking of every image."""
    available = len(of) if among is None else len(among)
    ranked = ranker.rank(queries, available, refine, candidates, among)
    answers = []
    for rows, scores, initial, before in zip(*ranked):
        found, best_initial = {}, {}
        for row, score, first in zip(rows.tolist(), scores.tolist(), initial.tolist()):
            if of[row] >= 0:
                found.setdefault(int(of[row]), []).append((row, score))
                best_initial[int(of[row])] = max(first, best_initial.get(int(of[row]), -2))
        by_initial = []
        for row in rows[np.argsort(before)].tolist():
            if of[row] >= 0 and of[row] not in by_initial:
                by_initial.append(int(of[row]))
        answers.append(
            [
                (o, held[0][1], best_initial[o], by_initial.index(o) + 1, [row for row, _ in held[:images]])
                for o, held in list(found.items())[:top]
            ]
        )
    return answers


@pytest.mark.parametrize("candidates", [0, 7, 300])
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("filtered", [True, False])
def test_objects_rank_as_a_slow_twin_ranks_them(candidates, refine, filtered):
    features, of = crowd()
    ranker = a_ranker(features)
    objects = Objects(pa.chunked_array([[None if o < 0 else f"o{o}" for o in part] for part in (of[:90], of[90:])]))
    numbers = {name: at for at, name in enumerate(objects.ids.to_pylist())}
    asked = np.concatenate([unit(4, DIM, seed=3), np.eye(DIM, dtype=np.float32)[:1]])
    queries = ranker.encode(asked, 0.0)
    among = np.flatnonzero(np.arange(400) % 3 > 0) if filtered else None
    moved = 0
    for top, images in ((1, 1), (6, 3), (20, 400)):
        expected = brute_force(ranker, of, queries, top, images, refine, candidates, among)
        for found, wanted in zip(rank_objects(ranker, objects, queries, top, images, refine, candidates, among), expected):
            assert [o.number for o in found] == [numbers[f"o{o}"] for o, *_ in wanted]
            assert len(found) == min(top, len(np.unique(of[of >= 0] if among is None else of[among][of[among] >= 0])))
            assert [o.scores[0] for o in found] == pytest.approx([score for _, score, *_ in wanted], abs=1e-6)
            assert [o.best_initial for o in found] == pytest.approx([w[2] for w in wanted], abs=1e-6)
            assert [o.rank_before for o in found] == [w[3] for w in wanted]
            assert [o.rows.tolist() for o in found] == [w[4] for w in wanted]
            moved += sum(o.rank_before != rank for rank, o in enumerate(found, 1))
            for o in found:
                assert len(o.rows) == len(o.scores) == len(o.initial) == len(set(o.before.tolist())) <= images
    assert (moved > 0) == refine


def test_what_an_approximate_search_does_not_come_across_is_found_exactly():
    """Where the one list that is looked into holds no more objects."""
    features, of = crowd()
    of[of < 0] = 0
    approximate = Approximate.build("ivf", [features], np.arange(400))
    approximate._apply(1)
    ranker = a_ranker(features, approximate=approximate)
    objects = Objects(pa.chunked_array([[f"o{o}" for o in of]]))
    queries = Encoded(np.eye(DIM, dtype=np.float32)[:1])
    assert objects.count(ranker.rank(queries, 400)[0][0]) < len(objects)
    (found,) = rank_objects(ranker, objects, queries, 20, 2)
    assert len({o.number for o in found}) == len(objects) > 15


@pytest.fixture(scope="module")
def searcher(split_index: Path) -> Searcher:
    return Searcher(str(split_index))


def test_a_searcher_answers_with_objects_and_their_best_images(searcher):
    everything = searcher.search("red circle", top=len(searcher))
    names = list(dict.fromkeys(r.object_id for r in everything))
    found = searcher.search_objects("red circle", images=2)
    assert [o.object_id for o in found] == names[:10] and [o.rank for o in found] == list(range(1, len(found) + 1))
    for o in found:
        own = [r for r in everything if r.object_id == o.object_id][:2]
        assert [(i.rank, i.id) for i in o.images] == [(at, r.id) for at, r in enumerate(own, 1)]
        assert [i.score for i in o.images] == pytest.approx([r.score for r in own], abs=1e-6) and o.score == o.images[0].score
        assert [[ref.object_id for ref in i.references] for i in o.images] == [
            [ref.object_id for ref in r.references] for r in own
        ]
    both = searcher.search_many_objects(["red circle", "blue star"], top=2, images=2)
    assert [o.object_id for o in both[0]] == names[:2] and len(both[1]) == 2
    (only,) = searcher.search_objects("red circle", where={"object_id": names[-1]})
    assert (only.object_id, only.rank, only.rank_before) == (names[-1], 1, 1)
    assert searcher.search_objects("x", where={"object_id": "nobody"}) == [] and searcher.search_many_objects([]) == []


def test_bad_questions_are_named(searcher, folder, run, tmp_path, capsys):
    count = len(searcher.objects)
    for top in (0, count + 1):
        with pytest.raises(QueryError, match=f"top is {top}: give 1 to {count}, the number of objects in test"):
            searcher.search_objects("x", top=top)
    with pytest.raises(QueryError, match="images of each object: give at least 1, found 0"):
        searcher.search_objects("x", images=0)
    index.create(str(folder), str(run), str(tmp_path / "none"), workers=0)
    assert main(["search", str(tmp_path / "none"), "x", "--by", "object"]) == 1
    assert "none knows no objects, so that images alone can be searched for" in capsys.readouterr().err
    answer = client_of(tmp_path / "none").get("/search", params={"text": "x", "by": "object"})
    assert (answer.status_code, answer.json()["error"]) == (400, "NoObjects")
    for argv, said in ((["--images", "2"], "give --by object with it"), (["--by", "object", "--judge"], "leave out --by object")):
        assert main(["search", str(searcher.index), "x", *argv]) == 2
        assert said in capsys.readouterr().err


def test_objects_on_the_terminal_and_on_a_page(searcher, tmp_path, capsys):
    found = searcher.search_objects("red circle", top=3, images=2)
    argv = ["search", str(searcher.index), "red circle", "--by", "object", "--top", "3", "--images", "2"]
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "before", "score", "before", "object", "images"]
    assert [line.split()[-1] for line in lines[1:]] == [i.id for o in found for i in o.images]
    assert [line.split()[-2] for line in lines[1:] if line[:4].strip()] == [o.object_id for o in found]
    assert main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["results"] == [o.to_dict() for o in found]
    page = tmp_path / "page.html"
    assert main([*argv, "--html", str(page)]) == 0
    text = page.read_text()
    assert text.count("<h2>") == 3 and text.count("data:image/webp") == sum(len(o.images) for o in found)
    assert [text.index(o.object_id) for o in found] == sorted(text.index(o.object_id) for o in found)


def test_objects_over_http(split_index, searcher):
    client = client_of(split_index)
    expected = [o.to_dict() for o in searcher.search_objects("red circle", top=3, images=2)]
    for o in expected:
        for image in o["images"]:
            del image["path"]
    asked = {"text": "red circle", "top": 3, "by": "object", "images": 2}
    for answer in (client.get("/search", params=asked), client.post("/search", json=asked)):
        assert answer.status_code == 200 and answer.json()["candidates"] == len(searcher)
        found = answer.json()["results"]
        assert [o["object_id"] for o in found] == [o["object_id"] for o in expected]
        for ours, theirs in zip(found, expected):
            assert ours.keys() == theirs.keys() and ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
            assert [i["id"] for i in ours["images"]] == [i["id"] for i in theirs["images"]]
            assert ours["images"][0].keys() == theirs["images"][0].keys()
    wrong = (
        ({"images": 21}, 400, "TooManyResults"),
        ({"images": 0}, 422, "InvalidRequest"),
        ({"by": "set"}, 422, "InvalidRequest"),
    )
    for more, status, error in wrong:
        answer = client.get("/search", params={**asked, **more})
        assert (answer.status_code, answer.json()["error"]) == (status, error)
    assert len(client.get("/search", params={**asked, "top": 20}).json()["results"]) == len(searcher.objects)
    parameters = client.get("/openapi.json").json()["paths"]["/search"]["get"]["parameters"]
    assert {"by", "images"} <= {p["name"] for p in parameters}
    engine = Engine(str(split_index), LIMITS, watch=False)
    together = engine.search([engine.prepare(a) for a in (Ask("red circle", top=3), Ask("red circle", top=3, images=2))])
    assert ["images" in answer["results"][0] for answer, _ in together] == [False, True], "one batch answers both"
