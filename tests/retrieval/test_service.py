"""The service over HTTP, in this process: what it answers, what it refuses and how, and indexes that change meanwhile."""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import os
import shutil
import struct
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from starlette.testclient import TestClient
from support.services import LIMITS, TOKEN, client_of, listening, png

from mmref.data.decode import decode_rgb
from mmref.errors import ModelMismatchError, ReaderLeftError, SearchIndexError, ServeError
from mmref.export.model import Model
from mmref.retrieval import bundle, index
from mmref.retrieval.filters import read_where
from mmref.retrieval.manifest import Manifest
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.service import answering, app, command, guard, server
from mmref.retrieval.service.access import Access, Rates
from mmref.retrieval.service.answering import Ask, Engine
from mmref.retrieval.service.app import build_app
from mmref.retrieval.service.backend import Local
from mmref.retrieval.service.limits import Limits


@pytest.fixture(scope="module")
def client(split_index: Path) -> TestClient:
    return client_of(split_index)


@pytest.fixture(scope="module")
def searcher(split_index: Path) -> Searcher:
    return Searcher(str(split_index))


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few hundred bytes that says it has billions of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def same(answer: dict, results: list) -> None:
    """An answer of the service holds the results of the searcher, without paths."""
    assert [r["id"] for r in answer["results"]] == [r.id for r in results]
    for ours, theirs in zip(answer["results"], results):
        expected = theirs.to_dict()
        del expected["path"]
        assert ours.keys() == expected.keys()
        assert ours["score"] == pytest.approx(theirs.score, abs=1e-5) and ours["rank_before"] == theirs.rank_before


# -- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_says_whether_anything_is_close(client, searcher, monkeypatch):
    asked = {"text": "red circle", "top": 5}
    assert client.get("/search", params=asked).json()["close_match"] is None, "nobody has said what is close"
    best = max(r.initial for r in searcher.search(**asked))
    for enough, close in ((best + 1e-3, False), (best - 1e-3, True)):
        monkeypatch.setattr(Model, "close_cosine", enough)
        assert client.get("/search", params=asked).json()["close_match"] is close
        assert client.get("/search", params={**asked, "by": "object"}).json()["close_match"] is close
        image = client.post("/search", content=png(), headers={"content-type": "image/png"}).json()
        assert image["close_match"] is None, "cosines of images with one another are others"


def test_examples_are_of_the_index_or_else_of_the_model(client, searcher, folder, run, tmp_path):
    (found,) = client.get("/indexes").json()["indexes"]
    sentences, items = found["examples"]["sentences"], found["examples"]["items"]
    assert len(set(sentences)) == 4 and set(sentences) <= set(searcher.items["caption"].to_pylist())
    assert len(set(items)) == 12 and set(items) <= set(searcher.items["id"].to_pylist())
    index.create(str(folder), str(run), str(tmp_path / "own"), workers=0)  # of images without captions
    engine = Engine(str(tmp_path / "own"), LIMITS, watch=False)
    found = engine.info()["examples"]
    references = bundle.read_reference_captions(tmp_path / "own" / "model").values()
    assert len(set(found["sentences"])) == 4 and set(found["sentences"]) <= set(references)
    assert len(set(found["items"])) == 11, "all that there are"


def test_text_image_and_both_answer_as_the_searcher_does(client, searcher):
    same(client.get("/search", params={"text": "red circle", "top": 5}).json(), searcher.search("red circle", top=5))
    plain = client.get("/search", params={"text": "red circle", "refine": False, "top": 5}).json()
    same(plain, searcher.search("red circle", top=5, refine=False))
    few = client.get("/search", params={"text": "red circle", "candidates": 2, "top": 5}).json()
    same(few, searcher.search("red circle", top=5, candidates=2))
    data, as_png = png(), {"content-type": "image/png"}
    found = client.post("/search", params={"top": 4}, content=data, headers=as_png).json()
    same(found, searcher.search(image=data, top=4))
    both = searcher.search("blue star", image=data, image_weight=0.3, top=4)
    given = {"text": "blue star", "image_weight": 0.3, "top": 4}
    same(client.post("/search", params=given, content=data, headers=as_png).json(), both)
    same(client.post("/search", json={**given, "image": base64.b64encode(data).decode()}).json(), both)
    assert not any("path" in r for r in found["results"])
    assert set(found["seconds"]) == {"encode", "rank", "describe"} and found["items"] == len(searcher)


def test_more_results_than_items_are_all_items(client, searcher):
    assert len(client.get("/search", params={"text": "x", "top": 20}).json()["results"]) == len(searcher)


def test_filters(client, searcher):
    some = searcher.items["object_id"][0].as_py()
    expected = searcher.search("red", where={"object_id": some, "split": "test"})
    where = [f"object_id={some}", "split=test"]
    same(client.get("/search", params={"text": "red", "where": where}).json(), expected)
    same(client.post("/search", json={"text": "red", "where": {"object_id": some, "split": "test"}}).json(), expected)
    headers = {"content-type": "image/png"}
    found = client.post("/search", params={"where": where}, content=png(), headers=headers).json()
    assert {r["object_id"] for r in found["results"]} == {some}
    assert client.get("/search", params={"text": "red", "where": "object_id=nobody"}).json()["results"] == []


def test_items_and_their_pictures(client, searcher):
    item = searcher.items["id"][5].as_py()
    found = client.get(f"/items/{item}").json()
    assert found["id"] == item and found["metadata"]["split"] == "test" and "path" not in found
    thumbnail = client.get(f"/thumbnail/{item}")
    assert thumbnail.content == searcher.thumbnail(item) and thumbnail.headers["content-type"] == "image/webp"
    image = client.get(f"/image/{item}")
    assert image.content == searcher.image_bytes(item) and image.headers["content-type"].startswith("image/")
    assert image.headers["cache-control"].startswith("private")


def test_an_id_may_look_like_a_path_and_is_none(run, folder, tmp_path):
    index.create(str(folder), str(run), str(tmp_path / "own"), workers=0)
    client = client_of(tmp_path / "own")
    for written in ("deep/01.png", "deep%2F01.png"):
        assert client.get(f"/items/{written}").json()["id"] == "deep/01.png"
    (tmp_path / "secret.png").write_bytes(png())
    for written in (
        "..%2F..%2Fsecret.png",
        "%2Fetc%2Fpasswd",
        "deep%2F..%2F00.png",
        "01.png%00",
        "manifest.json",
        "%ff",
    ):
        for kind in ("items", "thumbnail", "image"):
            answer = client.get(f"/{kind}/{written}")
            assert answer.status_code == 404 and answer.json()["error"] == "UnknownItem", written
    (folder / "00.png").unlink()
    gone = client.get("/image/00.png")
    assert (gone.status_code, gone.json()["error"]) == (404, "ImageGone") and str(folder) not in gone.text
    assert client.get("/thumbnail/00.png").status_code == 200


def test_what_a_browser_cannot_show_becomes_png(run, tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (9, 7), (200, 30, 40)).save(tmp_path / "images" / "a.tif")
    index.create(str(tmp_path / "images"), str(run), str(tmp_path / "own"), workers=0)
    answer = client_of(tmp_path / "own").get("/image/a.tif")
    assert answer.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(answer.content)).getpixel((3, 3)) == (200, 30, 40)


def test_an_explanation_adds_up(client, searcher):
    result = client.get("/search", params={"text": "red circle 0", "top": 12}).json()["results"][0]
    found = client.get("/explain", params={"text": "red circle 0", "id": result["id"]}).json()
    assert found["cosine"] == pytest.approx(result["initial"], abs=1e-4)
    assert found["cosine"] + found["gain"] == pytest.approx(result["score"], abs=1e-4)
    assert np.array(found["heat"]).shape == (7, 7)
    assert [r["object_id"] for r in found["shared"]] == [r["object_id"] for r in result["references"]]
    assert len(found["references"]) == 5 and all(r["item_id"] is None for r in found["references"]), "train objects"
    image = client.post(
        "/explain",
        params={"id": result["id"]},
        content=searcher.image_bytes(result["id"]),
        headers={"content-type": "image/x"},
    )
    assert image.json()["cosine"] == pytest.approx(1, abs=1e-4)


def test_several_indexes(split_index, run, folder, tmp_path):
    index.create(str(folder), str(run), str(tmp_path / "own"), workers=0)
    client = client_of(split_index, tmp_path / "own")
    objects = len(Searcher(str(split_index)).objects)
    names = [(i["name"], i["items"], i["objects"]) for i in client.get("/indexes").json()["indexes"]]
    assert names == [(split_index.name, 12, objects), ("own", 11, 0)], "a folder of images knows no objects"
    assert client.get("/search", params={"text": "x"}).json()["index"] == split_index.name
    assert client.get("/search", params={"text": "x", "index": "own"}).json()["index"] == "own"
    assert client.get("/items/00.png", params={"index": "own"}).status_code == 200
    assert client.get("/items/00.png").status_code == 404


def test_filters_that_can_be_chosen_are_listed(client):
    columns = {c["name"]: c["values"] for c in client.get("/indexes").json()["indexes"][0]["columns"]}
    assert columns["split"] == [["test", 12]] and "path" not in columns and "object_id" not in columns


def test_numbers_that_a_page_cannot_hold_are_not_offered():
    """JavaScript reads 2**53 + 1 as 2**53, of which there is no item."""
    whole = pa.chunked_array([[2**53 - 1, 2**53 - 1, -3, None]])
    assert answering._values(whole) == [[2**53 - 1, 2], [-3, 1]]
    for far in (2**53 + 1, -(2**53) - 1):
        assert answering._values(pa.chunked_array([[far, 3]])) is None
    assert answering._values(pa.chunked_array([[1e300]])) == [[1e300, 1]], "as it is in JavaScript"


def test_health_metrics_and_description(client):
    assert client.get("/healthz").json()["status"] == "ok"
    client.get("/search", params={"text": "counted"})
    client.get("/items/nobody")
    text = client.get("/metrics").text
    assert 'mmref_requests_total{route="/search",status="200"}' in text
    assert 'mmref_requests_total{route="/items/{item_id:path}",status="404"}' in text
    assert 'mmref_stage_seconds_total{index="test",stage="rank"}' in text and 'mmref_index_items{index="test"} 12.0' in text
    described = client.get("/openapi.json").json()
    assert {"/search", "/explain", "/items/{item_id}"} <= set(described["paths"])
    assert "image/*" in described["paths"]["/search"]["post"]["requestBody"]["content"]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "status", "error"),
    [
        ({}, 400, "EmptyQuery"),
        ({"text": "  "}, 400, "EmptyQuery"),
        ({"text": "x" * 101}, 400, "TextTooLong"),
        ({"text": "x", "top": 21}, 400, "TooManyResults"),
        ({"text": "x", "top": 0}, 422, "InvalidRequest"),
        ({"text": "x", "top": "ten"}, 422, "InvalidRequest"),
        ({"text": "x", "refine": "perhaps"}, 422, "InvalidRequest"),
        ({"text": "x", "candidates": -1}, 422, "InvalidRequest"),
        ({"text": "x", "image_weight": "nan"}, 422, "InvalidRequest"),
        ({"text": "x", "tpo": 3}, 422, "InvalidRequest"),
        ({"text": "x", "where": "colour"}, 400, "BadFilter"),
        ({"text": "x", "where": "colour=red"}, 400, "UnknownColumn"),
        ({"text": "x", "where": "path=/etc/passwd"}, 400, "UnknownColumn"),
        ({"text": "x", "where": [f"c{i}=1" for i in range(17)]}, 400, "BadFilter"),
        ({"text": "x", "index": "../other"}, 404, "UnknownIndex"),
    ],
)
def test_bad_queries_are_refused(client, parameters, status, error):
    for answer in (
        client.get("/search", params=parameters),
        client.get("/explain", params=parameters | {"id": "10-0"}),
    ):
        assert (answer.status_code, answer.json()["error"]) == (status, error)
        assert set(answer.json()) == {"error", "message", "fix"} and all(answer.json().values())


@pytest.mark.parametrize(
    ("body", "kind", "status", "error"),
    [
        (b"no image", "image/png", 400, "UnreadableImage"),
        (b"", "image/png", 400, "UnreadableImage"),
        (png()[:200], "image/png", 400, "UnreadableImage"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 400, "UnreadableImage"),
        (png(101, 200)[:400], "image/png", 413, "ImageTooLarge"),
        (bomb(), "image/png", 413, "ImageTooLarge"),
        (bomb(18_000), "image/png", 413, "ImageTooLarge"),
        (b"x" * 50_001, "image/png", 413, "TooLarge"),
        (b"x" * 200_000, "image/png", 413, "TooLarge"),
        (b"a=b", "application/x-www-form-urlencoded", 415, "UnknownBody"),
        (b"x", "multipart/form-data; boundary=x", 415, "UnknownBody"),
        (b"{", "application/json", 422, "InvalidRequest"),
        (b"[]", "application/json", 422, "InvalidRequest"),
        (b"\xff\xfe", "application/json", 422, "InvalidRequest"),
        (b'{"text": 7}', "application/json", 422, "InvalidRequest"),
        (b'{"text": "\\ud800"}', "application/json", 422, "InvalidRequest"),
        (b'{"text": "x", "where": {"split": [1]}}', "application/json", 422, "InvalidRequest"),
        (b'{"text": "x", "image": "/etc/passwd"}', "application/json", 400, "UnreadableImage"),
        (b'{"text": "x", "image": "%%%"}', "application/json", 400, "UnreadableImage"),
        (b"{" * 5000, "application/json", 422, "InvalidRequest"),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused(client, body, kind, status, error):
    answer = client.post("/search", content=body, headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]) == (status, error), answer.text
    assert set(answer.json()) == {"error", "message", "fix"} and all(answer.json().values())


def test_a_body_without_end_is_cut_off(client):
    sent = 0

    def stream():
        nonlocal sent
        for _ in range(1000):
            sent += 1000
            yield b"x" * 1000

    answer = client.post("/search", content=stream(), headers={"content-type": "image/png"})
    assert (answer.status_code, answer.json()["error"]) == (413, "TooLarge")


def test_odd_requests_get_json_too(client):
    for answer, status in (
        (client.get("/nowhere"), 404),
        (client.get("/../../etc/passwd"), 404),
        (client.get("/page/../engine.py"), 404),
        (client.delete("/search"), 405),
        (client.post("/search", headers={"content-length": "-5"}), 413),
        (client.get("/explain", params={"text": "x", "id": "nobody"}), 404),
        (client.get("/explain", params={"text": "x"}), 422),
    ):
        assert answer.status_code == status and set(answer.json()) == {"error", "message", "fix"}


def test_head_answers_as_get_without_the_body(client):
    """Monitors and balancers ask so; a service that refuses is taken for one that is down."""
    item = client.get("/search", params={"text": "a thing", "top": 1}).json()["results"][0]["id"]
    paths = ["/", "/page.css", "/healthz", "/metrics", "/indexes", "/openapi.json", "/search?text=a%20thing"]
    for path in (*paths, f"/items/{item}", f"/thumbnail/{item}", f"/image/{item}"):
        head, get = client.head(path), client.get(path)
        assert (head.status_code, head.content) == (200, b"") and get.content
        for name in ("content-type", "content-security-policy", "cache-control"):
            assert head.headers[name] == get.headers[name]
        if path not in ("/metrics", "/search?text=a%20thing"):  # the second holds its own time
            assert int(head.headers["content-length"]) == len(get.content)
    assert client.head("/items/no-such-item").status_code == 404 and client.head("/search").status_code == 400
    assert client.head("/session").status_code == client.options("/search").status_code == 405
    assert 'route="/healthz",status="200"' in client.get("/metrics").text


def test_every_answer_carries_the_headers_of_safety(client):
    for path in ("/", "/page.js", "/search?text=x", "/search", "/nowhere", "/thumbnail/nobody"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"], path
        assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        assert "cache-control" in headers and "access-control-allow-origin" not in headers


def test_other_names_and_other_sites_are_refused(client, split_index):
    assert client.get("/search?text=x", headers={"host": "evil.example"}).status_code == 421
    assert client.get("/search?text=x", headers={"host": "localhost:8000"}).status_code == 200
    assert client.get("/search?text=x", headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert client.get("/", headers={"sec-fetch-site": "cross-site"}).status_code == 200
    assert client.get("/healthz", headers={"host": ""}).status_code == 200, "as balancers ask, by HTTP/1.0"
    assert client.get("/metrics", headers={"host": ""}).status_code == 421
    elsewhere = client_of(split_index, access=Access(TOKEN), host="search.example")
    assert elsewhere.get("/healthz").status_code == 200, "where there is a token, any name will do"


def test_a_token_is_asked_for(split_index):
    client = client_of(split_index, access=Access(TOKEN))
    for path in (
        "/search?text=x",
        "/indexes",
        "/items/10-0",
        "/image/10-0",
        "/thumbnail/10-0",
        "/metrics",
        "/openapi.json",
    ):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}, {"cookie": "mmref=é"}):
            answer = client.get(path, headers={k: v.encode() for k, v in headers.items()})
            assert (answer.status_code, answer.json()["error"]) == (401, "TokenMissing"), (path, headers)
    for path in ("/", "/page.js", "/common.js", "/detail.js", "/filters.js", "/page.css", "/icon.svg", "/healthz"):
        assert client.get(path).status_code == 200
    assert client.get("/search?text=x", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.post("/session", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert client.post("/session", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 204
    assert TOKEN not in str(client.cookies)
    assert client.get("/thumbnail/" + client.get("/search?text=x").json()["results"][0]["id"]).status_code == 200
    assert client_of(split_index, access=Access(TOKEN + "x")).get("/indexes", cookies=dict(client.cookies)).status_code == 401


def test_rates(split_index):
    client = client_of(split_index, limits=Limits(rate=0.01, burst=2))
    codes = [client.get("/search?text=x").status_code for _ in range(4)]
    assert codes == [200, 200, 429, 429]
    refused = client.get("/search?text=x")
    assert refused.json()["error"] == "TooManyRequests" and int(refused.headers["retry-after"]) > 1
    assert client.get("/indexes").status_code == 200, "only what costs is counted"
    rates = Rates(2.0, 4.0)
    assert [rates.take("a", 1, 0.0) for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert rates.take("b", 1, 0.0) == 0 and rates.take("a", 1, 0.5) == 0 and rates.take("a", 1, 0.5) == 0.5
    assert rates.take("a", 4, 100.0) == 0, "it fills no further than the burst"


def test_what_fails_inside_says_nothing_of_the_inside(split_index, monkeypatch, caplog):
    client = client_of(split_index)

    def fail(*_):
        raise RuntimeError("secret /path")

    monkeypatch.setattr(Engine, "search", fail)
    with caplog.at_level(logging.ERROR):
        answer = client.get("/search?text=x")
    assert (answer.status_code, answer.json()["error"]) == (500, "InternalError") and "secret" not in answer.text
    assert "secret /path" in caplog.text
    assert 'mmref_requests_total{route="/search",status="500"} 1.0' in client.get("/metrics").text


def test_too_much_at_once_is_put_off(split_index, monkeypatch):
    client = client_of(split_index, limits=Limits(rate=0, in_flight=1))
    started, go_on, answer = threading.Event(), threading.Event(), Engine.search

    def slow(self, batch):
        started.set()
        go_on.wait(30)
        return answer(self, batch)

    monkeypatch.setattr(Engine, "search", slow)
    with client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.get, "/search?text=x")
        assert started.wait(30)
        second = client.get("/search?text=y")
        go_on.set()
        assert (second.status_code, second.json()["error"]) == (429, "Busy") and second.headers["retry-after"] == "1"
        assert first.result().status_code == 200


def test_no_request_opens_a_file_outside_the_index(split_index, tiny_set):
    client = client_of(split_index)
    item = client.get("/search?text=x").json()["results"][0]["id"]
    client.get("/explain", params={"text": "x", "id": item})  # whatever is loaded on first use
    opened: list[str] = []
    listening = True

    def note(event: str, arguments: tuple) -> None:
        if listening and event in ("open", "os.listdir", "os.scandir", "shutil.copyfile"):
            opened.append(str(arguments[0]))

    sys.addaudithook(note)  # cannot be removed again
    names = (
        "/etc/passwd",
        "..%2F..%2Fetc%2Fpasswd",
        "%2e%2e/manifest.json",
        "file:%2F%2F%2Fetc%2Fpasswd",
        item,
    )
    for name in names:
        for kind in ("items", "image", "thumbnail"):
            client.get(f"/{kind}/{name}")
            client.get(f"/{kind}/{item}", params={"index": name})
        client.get("/explain", params={"text": name, "id": name})
        client.get("/search", params={"text": name, "index": name, "where": f"path={name}"})
        client.post("/search", json={"text": "x", "image": name})
        client.get(f"/{name}")
    listening = False
    assert opened, "the image of an item is read"
    assert all(path.startswith((str(split_index), str(tiny_set))) for path in opened), opened


def test_slow_connections_are_given_up(split_index):
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    said = []
    with listening(split_index, Limits(rate=0, headers_s=0.3, stalled_s=0.3)) as service:
        for sent in (
            b"",
            head,
            head + b"Content-Length: 9\r\n\r\nabc",
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ):
            connection = service.connect(sent)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(4096):
                    answer += part
                    if answer.endswith(b'"ok"}}'):
                        connection.sendall(b"GET /")
            said.append(answer)
    assert said[:2] == [b"", b""], "no whole request: no answer"
    assert said[2].startswith(b"HTTP/1.1 408") and b'"TooSlow"' in said[2]
    assert said[3].startswith(b"HTTP/1.1 200"), "and the next request, begun only, is given up"


# -- batches and changes ---------------------------------------------------------------------------------------------


def test_a_batch_answers_each_as_alone(split_index):
    engine = Engine(str(split_index), LIMITS, watch=False)
    asks = [
        Ask("red circle", top=3), Ask("blue star", top=3), Ask("red circle", top=5, refine=False), Ask(image=png(), top=3),
        Ask("blue star", png(), 0.4, 3), Ask("red", top=3, where=read_where("split=test")),
        Ask("red", where=read_where("split=no")),
    ]  # fmt: skip
    together = engine.search([engine.prepare(a) for a in asks])
    for ask, (answer, problem) in zip(asks, together, strict=True):
        ((alone, _),) = engine.search([engine.prepare(ask)])
        assert problem is None and answer["batch"] == len(asks)
        assert [r["id"] for r in answer["results"]] == [r["id"] for r in alone["results"]]
        assert [r["score"] for r in answer["results"]] == pytest.approx([r["score"] for r in alone["results"]], abs=1e-5)


def test_searches_that_wait_are_answered_together(split_index, monkeypatch):
    client, sizes, answer = client_of(split_index), [], Engine.search
    started, go_on = threading.Event(), threading.Event()

    def slow(self, batch):
        sizes.append(len(batch))
        started.set()
        go_on.wait(30)
        if any(one.ask.text == "bad 3" for one in batch):
            raise RuntimeError
        return answer(self, batch)

    monkeypatch.setattr(Engine, "search", slow)
    waiting, prepare = threading.Semaphore(0), Engine.prepare

    def counted(self, ask):
        waiting.release()
        return prepare(self, ask)

    monkeypatch.setattr(Engine, "prepare", counted)
    with client, ThreadPoolExecutor(8) as pool:
        first = pool.submit(client.get, "/search?text=first")
        assert started.wait(30)
        rest = [pool.submit(client.get, f"/search?text=red {n}") for n in range(7)]
        for _ in range(8):
            assert waiting.acquire(timeout=30)
        client.get("/healthz")  # behind the seven on the loop's way
        go_on.set()
        answers = [one.result() for one in (first, *rest)]
        assert [a.status_code for a in answers] == [200] * 8 and sum(sizes) == 8 and len(sizes) < 5, sizes
        ids = [[r["id"] for r in answer.json()["results"]] for answer in (answers[1], client.get("/search?text=red 0"))]
        assert ids[0] == ids[1]
        with contextlib.suppress(RuntimeError):  # one that fails ends its batch, and the next is answered
            client.get("/search?text=bad 3")
        assert client.get("/search?text=red 1").status_code == 200


def test_an_index_is_followed_without_losing_a_request(own_index):
    engine = Engine(str(own_index), LIMITS, watch=False)
    client = TestClient(build_app({"index": Local(engine)}, None, LIMITS), base_url="http://localhost")
    ids = Searcher(str(own_index)).items["id"].to_pylist()
    stop, seen = threading.Event(), []

    def ask():
        while not stop.is_set():
            answer = client.get("/search", params={"text": "red circle", "top": 12})
            seen.append((answer.status_code, answer.json().get("generation"), len(answer.json().get("results", []))))

    with client, ThreadPoolExecutor(3) as pool:
        running = [pool.submit(ask) for _ in range(3)]
        model = engine._searcher.model
        assert not engine.refresh()
        for gone in ids[:3]:
            index.remove(str(own_index), [gone])
            assert engine.refresh()
        while not any(generation == 4 for _, generation, _ in seen):
            assert not any(r.done() for r in running)
        stop.set()
        for r in running:
            r.result()
    assert {status for status, _, _ in seen} == {200}
    assert {items for _, generation, items in seen if generation == 4} == {9}
    assert all(items == 13 - generation for _, generation, items in seen), "each answer is of one generation"
    assert engine._searcher.model is model, "the model was not loaded again"
    assert client.get(f"/items/{ids[0]}").status_code == 404


def test_a_model_that_was_checked_is_read_again_only_when_its_files_change(own_index, monkeypatch):
    engine = Engine(str(own_index), LIMITS, watch=False)
    ids, read = Searcher(str(own_index)).items["id"].to_pylist(), []
    take = bundle.fingerprint
    monkeypatch.setattr(bundle, "fingerprint", lambda model, **how: read.append(model) or take(model, **how))
    index.remove(str(own_index), ids[:1])
    read.clear()  # of the command
    assert engine.refresh() and not read
    weights = own_index / "model" / "model.safetensors"
    os.utime(weights, ns=(0, 0))  # written again, with the same contents
    index.remove(str(own_index), ids[1:2])
    read.clear()
    assert engine.refresh() and read == [own_index / "model"]
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    manifest = Manifest.read(own_index)
    replace(manifest, generation=manifest.generation + 1).write(own_index)
    with pytest.raises(ModelMismatchError):
        engine.refresh()


def test_an_index_in_the_place_of_another_is_opened_and_a_missing_one_is_not(own_index, folder, run, tmp_path):
    engine = Engine(str(own_index), LIMITS, watch=False)
    index.create(str(folder), str(run), str(tmp_path / "other"), workers=0)
    shutil.rmtree(own_index)
    client = TestClient(build_app({"index": Local(engine)}, None, LIMITS), base_url="http://localhost")
    with pytest.raises(SearchIndexError, match="is no index"):
        engine.refresh()
    assert client.get("/search?text=x").json()["items"] == 12, "what was open answers on"
    (tmp_path / "other").rename(own_index)
    assert engine.refresh() and client.get("/search?text=x").json()["items"] == 11


def test_an_index_that_looks_like_the_one_before_it_is_told_apart(own_index):
    """Its generation is the same, and so is the rest of its manifest where it was made of as many other files."""
    engine = Engine(str(own_index), LIMITS, watch=False)
    client = TestClient(build_app({"index": Local(engine)}, None, LIMITS), base_url="http://localhost")

    def identity() -> str:
        (told,) = client.get("/indexes").json()["indexes"]
        assert client.get("/search?text=x").json()["identity"] == told["identity"]
        return told["identity"]

    before = identity()
    assert Engine(str(own_index), LIMITS, watch=False).info()["identity"] == before, "not of this start of the service"
    manifest = Manifest.read(own_index)
    manifest.write(own_index)
    assert engine.refresh() and Manifest.read(own_index) == manifest
    assert identity() != before


def test_the_watch_follows_by_itself(own_index, monkeypatch):
    monkeypatch.setattr("mmref.retrieval.service.answering.WATCH_S", 0.05)
    engine = Engine(str(own_index), LIMITS)
    name = engine.info()["name"]
    index.remove(str(own_index), [Searcher(str(own_index)).items["id"][0].as_py()])
    for _ in range(600):
        if engine.info()["items"] == 11:
            break
        threading.Event().wait(0.05)
    assert engine.info()["items"] == 11 and engine.info()["name"] == name
    engine.close()


# -- starting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["{index}", "--host", "0.0.0.0"], "MMREF_TOKEN"),
        (["{index}", "{index}"], "two indexes are called 'test'"),
        (["/nowhere"], "is no index"),
        (["{index}", "--token-file", "/nowhere"], "the token cannot be read"),
        (["{index}", "--token-file", "{short}"], "too short"),
        (["{index}", "--port", "99999"], "cannot listen"),
        (["{index}", "--max-image-bytes", "120000000"], "--max-image-bytes 120000000 .* give at most 95566848"),
        (["{index}", "--max-top", "10001"], "--max-top 10001 .* give at most 10000"),
        (["{index}", "--max-text", "60000"], "--max-text 60000 .* give at most 5461"),
        (["{index}", "--min-replicas", "2"], "--min-replicas 2 does not go with --replicas 0"),
        (["{index}", "--host", "203.0.113.1", "--token-file", "{token}"], "cannot listen"),
    ],
)
def test_what_cannot_be_served_is_named(argv, said, split_index, tmp_path, monkeypatch):
    monkeypatch.delenv(command.TOKEN, raising=False)
    (tmp_path / "short").write_text("abc")
    (tmp_path / "token").write_text(TOKEN)
    places = {"index": split_index, "short": tmp_path / "short", "token": tmp_path / "token"}
    from mmref.errors import MMRefError

    with pytest.raises(MMRefError, match=said):
        command.serve_main([*(a.format(**places) for a in argv), "--replicas", "0"])


def test_it_leaves_in_order_where_nobody_reads_what_it_says(split_index, monkeypatch):
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("stopped"):
                raise ReaderLeftError("whatever read standard output has ended.")
            return super().write(text)

    monkeypatch.setattr(server, "_run", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", Left())
    server.serve([str(split_index)], "127.0.0.1", 0, 0, None, LIMITS)
    assert "serving test at http://127.0.0.1:" in sys.stdout.getvalue()


def test_tokens_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(command.TOKEN, raising=False)
    assert command.read_token(None) is None
    monkeypatch.setenv(command.TOKEN, f" {TOKEN}\n")
    assert command.read_token(None) == TOKEN
    assert command.TOKEN not in os.environ, "Ray's processes would inherit it"
    monkeypatch.setenv(command.TOKEN, TOKEN)
    (tmp_path / "token").write_text(TOKEN[::-1] + "\n")
    assert command.read_token(str(tmp_path / "token")) == TOKEN[::-1] and command.TOKEN not in os.environ
    monkeypatch.setenv(command.TOKEN, "short")
    with pytest.raises(ServeError, match="too short"):
        command.read_token(None)


def test_the_page_names_no_other_host():
    folder = Path(server.__file__).parent / "page"
    for file in folder.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text and "//cdn" not in text, file
    files = ["address.js", "common.js", "detail.js", "filters.js", "icon.svg", "index.html", "judge.js", "page.css", "page.js"]
    assert sorted(f.name for f in folder.iterdir()) == files
    assert {f"/{name}" for name in files} - {"/index.html"} | {"/"} == set(guard.STATIC) == set(app.PAGE)


def test_images_come_without_what_cameras_write(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shots"
    folder.mkdir()
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "Canon"
    tags.get_ifd(0x8825)[1] = "GPS-IS-HERE"
    shot = Image.open(io.BytesIO(png(30, 20)))
    for name in ("a.jpg", "b.webp", "c.png", "d.tif"):
        shot.save(folder / name, exif=tags.tobytes(), compression=None)
    (tmp_path / "t.csv").write_text("image\n" + "".join(f"{folder}/{name}\n" for name in ("a.jpg", "b.webp", "c.png", "d.tif")))
    index.create(str(tmp_path / "t.csv"), str(run), str(tmp_path / "out"), workers=0)
    client = client_of(tmp_path / "out")
    found = client.get("/search", params={"text": "x"})
    names = sorted(result["id"] for result in found.json()["results"])
    assert len(names) == 4 and str(tmp_path) not in found.text
    for name, file in zip(names, sorted(folder.iterdir())):
        answer = client.get(f"/image/{name}")
        assert answer.status_code == 200 and b"GPS-IS-HERE" not in answer.content and b"Canon" not in answer.content
        np.testing.assert_array_equal(decode_rgb(answer.content), decode_rgb(file.read_bytes()))
        for what in ("items", "thumbnail"):
            answer = client.get(f"/{what}/{name}")
            assert answer.status_code == 200 and str(tmp_path).encode() not in answer.content
    kept = client_of(tmp_path / "out", limits=replace(LIMITS, keep_metadata=True))
    assert kept.get(f"/image/{names[0]}").content == (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").unlink()
    gone = client.get(f"/image/{names[0]}")
    assert gone.status_code == 404 and str(tmp_path) not in gone.text
