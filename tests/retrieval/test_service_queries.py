"""Requests that cost more than they pay: JSON, URLs, filters and candidates beyond the limits, and what they are told."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from support.services import LIMITS, client_of, png

from mmref.retrieval.searcher import Searcher
from mmref.retrieval.service import app
from mmref.retrieval.service.limits import Limits

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(split_index: Path) -> TestClient:
    return client_of(split_index)


def said(client: TestClient, body: bytes | dict, status: int, error: str) -> dict:
    """What a body is refused with."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/search", content=content, headers=JSON)
    assert (answer.status_code, answer.json()["error"]) == (status, error), answer.text[:500]
    assert len(answer.text) < 1000
    return answer.json()


def keys(count: int) -> dict[str, int]:
    return {f"k{i}": i for i in range(count)}


@pytest.mark.parametrize("where", ["top", "where"])
def test_a_body_of_keys_is_not_parsed(split_index, where, monkeypatch):
    client = client_of(split_index, limits=Limits(rate=0, image_bytes=10_000_000))
    monkeypatch.setattr("mmref.retrieval.service.queries._parsed", None)
    body = keys(100_000) if where == "top" else {"text": "x", "where": keys(100_000)}
    assert "65,536" in said(client, body, 413, "TooLarge")["fix"]


def test_the_first_of_many_unknown_keys_are_named(client, monkeypatch):
    monkeypatch.setattr(app.SearchBody, "model_validate", None)  # which would make an error of each
    message = said(client, keys(4000), 422, "InvalidRequest")["message"]
    assert message == "4000 unknown keys: 'k0', 'k1', 'k2'."


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({"text": "x", "where": keys(17)}, 400, "BadFilter"),
        ({"text": "x", "where": {"split": "v" * 501}}, 400, "BadFilter"),
        ({"text": "x", "where": {"c" * 501: "v"}}, 400, "BadFilter"),
        ({"text": "x", "where": {"split": int("9" * 600)}}, 400, "BadFilter"),
        ({"text": "x", "where": [{"a": 1}] * 5000}, 400, "BadFilter"),
        ({"text": "x", "where": [{"a": 1}]}, 422, "InvalidRequest"),
        ({"text": "x", "where": ["a" + " " * 2000 + "=1"]}, 400, "BadFilter"),
        ({"text": "x", "within": ["a"] * 1001}, 400, "TooManyItems"),
        ({"text": "x", "within": ["nobody"]}, 404, "UnknownItem"),
        ({"text": "x", "offset": -1}, 422, "InvalidRequest"),
        (b'{"text": "x", "top": 1' + b"0" * 60_000 + b"}", 422, "InvalidRequest"),
        (b'{"text": "x", "top": 1' + b"0" * 4000 + b"}", 400, "TooManyResults"),
        (b'{"text": "x", "candidates": 1' + b"0" * 4000 + b"}", 400, "TooManyCandidates"),
        (b'{"text": "x", "top": 1e999}', 422, "InvalidRequest"),
        (b'{"text": "x", "image_weight": NaN}', 422, "InvalidRequest"),
        (b'{"text": "x", "text": "y"}', 422, "InvalidRequest"),
        (b'{"text": "x", "where": {"split": "a", "split": "test"}}', 422, "InvalidRequest"),
        (b'{"text": "x", "where": ' + b"[" * 60_000, 422, "InvalidRequest"),
        (b'{"text": "x", "where": ' + b'{"a":' * 10_000, 422, "InvalidRequest"),
        (b'{"text": "x", "where": ' + b"[" * 400 + b"]" * 400 + b"}", 422, "InvalidRequest"),
        (b'{"text": "x", "where": {"\\ud800": "x"}}', 422, "InvalidRequest"),
        (b'{"text": "x", "image": "' + b"A" * 50_000, 422, "InvalidRequest"),
        (b'{"text": "x", "image": "' + b"A" * 66_000, 413, "TooLarge"),
        (b'"image":"' * 8000, 413, "TooLarge"),
        (b'{"text": "\xed\xa0\x80"}', 422, "InvalidRequest"),
    ],
)  # fmt: skip
def test_odd_json_is_refused(client, body, status, error):
    said(client, body, status, error)


def test_ids_of_a_search_within_results_have_room_of_their_own(client):
    """A thousand of 500 bytes; nothing else may be as long, and they may not be longer."""
    ids = [f"{n:04d}" + "é" * 248 for n in range(1000)]
    body = json.dumps({"text": "x", "within": ids, "where": ["split=test"]}, ensure_ascii=False).encode()
    assert len(body) > 500_000
    assert "0000é" in said(client, body, 404, "UnknownItem")["message"]
    said(client, {"text": "x", "within": ["a" * 600] * 1000}, 413, "TooLarge")
    said(client, {"text": "x" * 66_000, "within": ["a" * 500] * 100}, 413, "TooLarge")
    said(client, {"text": "x", "where": ["a" * 500] * 1000}, 413, "TooLarge")
    image = base64.b64encode(b"x" * 50_000).decode()
    said(client, {"text": "x", "image": image, "within": ["a" * 500] * 1000}, 404, "UnknownItem")


def test_json_is_read_beside_the_loop(client, monkeypatch):
    threads, read = [], app.read_json
    monkeypatch.setattr(app, "read_json", lambda *a: threads.append(threading.current_thread().name) or read(*a))
    assert client.post("/search", json={"text": "x"}).status_code == 200
    assert [name.rpartition("_")[0] for name in threads] == ["mmref json"]


def test_an_image_in_json_is_found_wherever_it_stands(split_index):
    client = client_of(split_index, limits=Limits(rate=0, pixels=100_000))
    data = png(200, 200)
    assert len(data) > 100_000, "larger than what is parsed"
    parameters = {"text": 'a "image": "b"'}
    expected = client.post("/search", content=data, params=parameters, headers={"content-type": "image/png"})
    assert expected.status_code == 200
    encoded, text = base64.b64encode(data).decode(), json.dumps('a "image": "b"')
    for body in (
        f'{{"text": {text}, "image": "{encoded}"}}',
        f'{{"image"  :\n "{encoded}", "where": {{}}, "text": {text}}}',
        f'{{"where": {{}}, "image": "{encoded.replace("/", chr(92) + "/")}", "text": {text}}}',
    ):
        answer = client.post("/search", content=body, headers=JSON)
        assert answer.status_code == 200, answer.text[:300]
        assert answer.json()["results"] == expected.json()["results"]
    where = f'{{"text": "x", "where": {{"image": "red"}}, "image": "{encoded}"}}'
    said(client, where.encode(), 400, "UnknownColumn")
    said(client, f'{{"image": "{encoded}", "image": "{encoded[:40]}"}}'.encode(), 422, "InvalidRequest")
    said(client, f'{{"image": "{encoded[:-9]}%%%"}}'.encode(), 400, "UnreadableImage")


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("&".join(f"a{i}=1" for i in range(5000)), "TooManyParameters"),
        ("&".join(f"where=c{i}=1" for i in range(3000)), "TooManyParameters"),
        ("&" * 30_000, "TooManyParameters"),
        ("text=x&text=y", "RepeatedParameter"),
        ("text=x&top=1&%74op=2", "RepeatedParameter"),
        ("text=x&where=split=>a", "BadFilter"),
        ("text=x&where=width>=wide", "BadFilter"),
        ("text=x&where=width~3", "BadFilter"),
        ("text=x&sort=colour", "UnknownColumn"),
        ("text=x&offset=9991", "TooDeep"),
        ("text=x&where=split=" + "v" * 501, "BadFilter"),
        ("text=x&where=" + "c" * 501 + "=v", "BadFilter"),
        ("text=x&top=1" + "0" * 4000, "TooManyResults"),
        ("text=x&candidates=30000", "TooManyCandidates"),
    ],
)
def test_odd_parameters_are_refused(client, query, error):
    for answer in (
        client.get(f"/search?{query}"),
        client.post(f"/search?{query}", content=png(), headers={"content-type": "image/png"}),
        client.get(f"/explain?id=10-0&{query}"),
    ):
        assert (answer.status_code, answer.json()["error"]) == (400, error) and len(answer.text) < 1000


def test_candidates_are_limited_and_the_answer_says_how_many(split_index):
    searcher = Searcher(str(split_index))
    small = client_of(split_index, limits=Limits(rate=0, candidates=5))
    for asked, refined in (({}, 5), ({"candidates": 0}, 5), ({"candidates": 3}, 3), ({"refine": False}, 0)):
        answer = small.get("/search", params={"text": "red circle", "top": 12, **asked}).json()
        assert answer["candidates"] == refined, asked
        expected = searcher.search("red circle", top=12, candidates=refined or None, refine=refined > 0)
        assert [r["id"] for r in answer["results"]] == [r.id for r in expected]
    assert small.get("/search", params={"text": "x", "candidates": 6}).json()["error"] == "TooManyCandidates"
    all_of_them = client_of(split_index).get("/search", params={"text": "x", "candidates": 0}).json()
    assert all_of_them["candidates"] == len(searcher), "0 is all where the limit allows it"


def test_without_top_no_more_results_are_asked_for_than_are_allowed(split_index):
    small, large = client_of(split_index, limits=Limits(rate=0, top=4)), client_of(split_index)
    for client, count in ((small, 4), (large, 10)):
        asked: dict = {"text": "red circle"}
        assert len(client.get("/search", params=asked).json()["results"]) == count
        assert len(client.post("/search", json=asked).json()["results"]) == count
    assert len(small.get("/search", params={"text": "red circle", "by": "object"}).json()["results"]) == 4
    assert small.get("/search", params={"text": "x", "top": 5}).json()["error"] == "TooManyResults"


def test_candidates_are_charged(split_index, monkeypatch):
    monkeypatch.setattr(app, "CANDIDATES", 2)
    client = client_of(split_index, limits=Limits(rate=0.001, burst=14))
    asked = {"text": "x", "candidates": 0}
    assert [client.get("/search", params=asked).status_code for _ in range(3)] == [200, 429, 429]
    client = client_of(split_index, limits=Limits(rate=0.001, burst=14))
    client.get("/search?text=x")  # its answer says how many items there are: 12
    assert [client.get("/search", params=asked).status_code for _ in range(4)] == [200, 200, 429, 429]


def test_the_limits_are_told(client):
    told = client.get("/indexes").json()["limits"]
    assert told == {
        "text": 100,
        "image_bytes": 50_000,
        "pixels": 20_000,
        "top": 20,
        "depth": 10_000,
        "candidates": 10_000,
        "filters": 16,
        "within": 1000,
        "within_bytes": 512_000,
    }
    assert told["text"] == LIMITS.text
