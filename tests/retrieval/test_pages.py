"""Pages of results, searches within results, and their order: in Python, on the terminal, over HTTP."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from support.services import client_of, png

from mmref.cli import main
from mmref.errors import QueryError, UnknownColumnError
from mmref.retrieval import index
from mmref.retrieval.searcher import Searcher


@pytest.fixture(scope="module")
def searcher(tiny_set: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Searcher:
    """Of all 60 and more images of the tiny set."""
    path = tmp_path_factory.mktemp("all") / "all"
    index.create(str(tiny_set), str(run), str(path), workers=0)
    return Searcher(str(path))


@pytest.fixture(scope="module")
def client(searcher: Searcher) -> TestClient:
    return client_of(searcher.index)


def told(results):
    return [(r.rank, r.rank_before, r.score, r.id if hasattr(r, "id") else r.object_id) for r in results]


@pytest.mark.parametrize("candidates", [None, 3, 15, 0])
@pytest.mark.parametrize("where", [None, "split=train"])
def test_a_second_page_goes_on_where_the_first_ended(searcher, client, candidates, where):
    """With fewer candidates than a page, and more than both."""
    how = {"candidates": candidates, "where": where}
    whole = told(searcher.search("red circle 0", top=20, **how))
    pages = [told(searcher.search("red circle 0", top=10, offset=offset, **how)) for offset in (0, 10)]
    assert [one[0] for one in whole] == list(range(1, 21)) and pages[0] + pages[1] == whole
    asked = {"text": "red circle 0", "top": 10, **{name: value for name, value in how.items() if value is not None}}
    ids = [r["id"] for offset in (0, 10) for r in client.get("/search", params=asked | {"offset": offset}).json()["results"]]
    assert ids == [one[-1] for one in whole]
    objects = told(searcher.search_objects("red circle 0", top=8, **how))
    assert [told(searcher.search_objects("red circle 0", top=4, offset=o, **how)) for o in (0, 4)] == [objects[:4], objects[4:]]
    found = client.get("/search", params=asked | {"by": "object", "top": 4, "offset": 4}).json()["results"]
    assert [(o["rank"], o["object_id"]) for o in found] == [(one[0], one[-1]) for one in objects[4:]]


def test_behind_the_last_result_there_is_nothing(searcher, client, capsys):
    count = len(searcher)
    assert told(searcher.search("x", top=10, offset=count - 3)) == told(searcher.search("x", top=count))[-3:]
    assert searcher.search("x", offset=count + 5) == [] and searcher.search_objects("x", offset=500) == []
    assert client.get("/search", params={"text": "x", "offset": count}).json()["results"] == []
    with pytest.raises(QueryError, match="offset is -1: give the number of results to pass over"):
        searcher.search("x", offset=-1)
    assert main(["search", str(searcher.index), "red circle", "--top", "3", "--offset", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["6", "7", "8"]


def test_a_search_within_results(searcher, client):
    within = [r.id for r in searcher.search("red circle", top=7)]
    everything = searcher.search("blue star", top=len(searcher), candidates=0)
    expected = [r.id for r in everything if r.id in within]
    found = searcher.search("blue star", within=within)
    assert [r.id for r in found] == expected and [r.rank for r in found] == list(range(1, 8))
    assert [r.id for r in searcher.search("blue star", within=[*within, within[0]], where="split=train")] == [
        r.id for r in everything if r.id in within and r.metadata["split"] == "train"
    ]
    assert {o.object_id for o in searcher.search_objects("blue star", within=within)} == {r.object_id for r in found}
    assert searcher.search("blue star", within=[]) == []
    with pytest.raises(QueryError, match="has no item 'nobody'"):
        searcher.search("x", within=["nobody"])
    assert client.post("/search", json={"text": "blue star", "within": []}).json()["results"] == []
    asked = {"text": "blue star", "within": within}
    image = client.post("/search", params={"within": within}, content=png(), headers={"content-type": "image/png"})
    assert {r["id"] for r in image.json()["results"]} == set(within)
    for answer in (client.get("/search", params=asked), client.post("/search", json=asked)):
        assert [r["id"] for r in answer.json()["results"]] == expected


def test_results_in_the_order_of_a_column(searcher, client, capsys):
    found = searcher.search("red circle", top=12, sort="-object_id")
    best = searcher.search("red circle", top=12)
    assert {r.id for r in found} == {r.id for r in best}, "the same results, in another order"
    assert [r.object_id for r in found] == sorted((r.object_id for r in best), reverse=True)
    ranks = {}
    for r in found:
        ranks.setdefault(r.object_id, []).append(r.rank)
    assert all(each == sorted(each) for each in ranks.values()), "of equal values the better first"
    objects = searcher.search_objects("red circle", top=5, sort="object_id")
    assert [o.object_id for o in objects] == sorted(o.object_id for o in objects)
    answer = client.get("/search", params={"text": "red circle", "top": 12, "sort": "-object_id"}).json()
    assert [r["id"] for r in answer["results"]] == [r.id for r in found]
    with pytest.raises(UnknownColumnError, match=r"Did you mean 'object_id'\?"):
        searcher.search("x", sort="-objectid")
    assert main(["search", str(searcher.index), "red circle", "--top", "12", "--sort=-object_id", "--json"]) == 0
    assert [r["id"] for r in json.loads(capsys.readouterr().out)["results"]] == [r.id for r in found]


def test_searches_of_one_batch_keep_their_own_pages(searcher):
    from support.services import LIMITS

    from mmref.retrieval.service.answering import Ask, Engine

    engine = Engine(str(searcher.index), LIMITS, watch=False)
    asks = [
        Ask("red circle", top=5), Ask("red circle", top=5, offset=5), Ask("red circle", top=5, sort="-id"),
        Ask("red circle", top=5, within=(searcher.items["id"][3].as_py(),)),
    ]  # fmt: skip
    answers = [answer["results"] for answer, _ in engine.search([engine.prepare(ask) for ask in asks])]
    ids = [[r["id"] for r in answer] for answer in answers]
    whole = [r.id for r in searcher.search("red circle", top=10)]
    assert ids[:2] == [whole[:5], whole[5:]] and ids[2] == sorted(whole[:5], reverse=True) and ids[3] == [asks[3].within[0]]


def test_the_description_names_every_parameter(client):
    parameters = client.get("/openapi.json").json()["paths"]["/search"]["get"]["parameters"]
    assert {"offset", "sort", "within", "where"} <= {p["name"] for p in parameters}
    assert all(p.get("description") or p["schema"].get("description") for p in parameters)
