"""Judgements over HTTP: who may give them, what is refused, what is kept, and that training and exports read it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from support.services import LIMITS, TOKEN, client_of, listening

from mmref.errors import QueryError, StorageError, UsageError
from mmref.retrieval import feedback
from mmref.retrieval.feedback import FILE, Judgements, export_table
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.service import command, server
from mmref.retrieval.service.access import Access
from mmref.retrieval.service.judging import Followed

SENTENCE = "red circle"


@pytest.fixture
def client(own_index: Path) -> TestClient:
    return client_of(own_index, judge=True)


@pytest.fixture
def ids(own_index: Path) -> list[str]:
    return Searcher(str(own_index)).items["id"].to_pylist()


def judge(client: TestClient, item: str, relevant: bool | None, text: str = SENTENCE, **more: object) -> dict:
    answer = client.post("/judgements", json={"text": text, "id": item, "relevant": relevant, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def judged(client: TestClient, text: str = SENTENCE) -> dict[str, bool]:
    return client.get("/judgements", params={"text": text}).json()["judgements"]


def refused(answer, status: int, error: str) -> dict:
    assert (answer.status_code, answer.json()["error"]) == (status, error), answer.text
    assert set(answer.json()) == {"error", "message", "fix"} and all(answer.json().values())
    return answer.json()


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_what_is_judged_is_kept_told_again_and_read_by_everything_else(client, own_index, ids, tmp_path):
    assert client.get("/indexes").json()["judging"] is True
    assert judged(client) == {} and not (own_index / FILE).exists()
    assert judge(client, ids[0], True) == {
        "index": "index", "text": SENTENCE, "id": ids[0], "relevant": True, "judged": 1, "sentences": 1,
    }  # fmt: skip
    judge(client, ids[1], False, text=f"  {SENTENCE}\n")
    judge(client, ids[0], True, text="another")
    found = client.get("/judgements", params={"text": f" {SENTENCE} "}).json()
    assert found == {"index": "index", "text": SENTENCE, "judgements": {ids[0]: True, ids[1]: False}, "sentences": 2}
    assert judge(client, ids[0], False)["judged"] == 2, "another opinion takes the place of the first"
    searcher = Searcher(str(own_index))
    read = Judgements.of(searcher.index).read()
    assert [(j.query, j.id, j.relevant) for j in read] == [
        (SENTENCE, ids[0], False), (SENTENCE, ids[1], False), ("another", ids[0], True),
    ]  # fmt: skip
    assert all(j.object_id == searcher.item(j.id)["object_id"] for j in read)
    rows, left_out = export_table(searcher, read, str(tmp_path / "table"))
    assert (rows, left_out) == (2, [])


def test_what_was_judged_is_taken_back(client, own_index, ids):
    judge(client, ids[0], True)
    judge(client, ids[1], False)
    assert judge(client, ids[0], None) == {
        "index": "index", "text": SENTENCE, "id": ids[0], "relevant": None, "judged": 1, "sentences": 1,
    }  # fmt: skip
    assert judged(client) == {ids[1]: False}
    assert judge(client, ids[1], None)["sentences"] == 0
    assert Judgements(own_index / FILE).read() == [] and judged(client) == {}


def test_the_same_again_is_not_written_again(client, own_index, ids):
    judge(client, ids[2], None)
    assert not (own_index / FILE).exists(), "there was nothing to take back"
    for _ in range(3):
        judge(client, ids[0], True)
    assert len((own_index / FILE).read_text().splitlines()) == 1


def test_what_others_write_is_seen(client, own_index, ids):
    """The terminal writes to the same file, and a file may be moved away."""
    judge(client, ids[0], True)
    Judgements(own_index / FILE).save(Searcher(str(own_index)), SENTENCE, ids[1], False)
    assert judged(client) == {ids[0]: True, ids[1]: False}
    (own_index / FILE).rename(own_index / "before.jsonl")
    assert judged(client) == {}
    judge(client, ids[2], True)
    assert judged(client) == {ids[2]: True} and len(Judgements(own_index / "before.jsonl").read()) == 2


def test_a_file_that_is_edited_where_it_lies_is_read_anew(client, own_index, ids):
    """Editors that write in place, and a copy over the file, leave its inode."""
    judge(client, ids[0], True)
    judge(client, ids[1], True)
    path = own_index / FILE
    before = path.read_text()
    path.write_text(before.replace("true", "null", 1))  # as long as it was
    os.utime(path, ns=(1, 1))
    assert judged(client) == {ids[1]: True}
    judge(client, ids[0], True)
    assert judged(client) == {ids[0]: True, ids[1]: True} == {j.id: j.relevant for j in Judgements(path).read()}
    path.write_text(before.splitlines(keepends=True)[1] + 3 * before.replace("true", "false"))  # longer, with other lines
    assert judged(client) == {ids[0]: False, ids[1]: False}


def test_a_line_that_is_no_judgement_or_half_of_one_spoils_no_other(own_index, ids, caplog):
    judgements, searcher = Judgements(own_index / FILE), Searcher(str(own_index))
    judgements.save(searcher, SENTENCE, ids[0], True)
    followed = Followed(judgements)
    with open(own_index / FILE, "a") as file:
        file.write('{"query": 7}\n[]\n{"query": "red cir')
        file.flush()
        assert followed.sentences() == {SENTENCE: {ids[0]: True}}
        file.write(f'cle", "id": {json.dumps(ids[1])}, "object_id": null, "relevant": false, "at": ""}}\n')
    assert followed.sentences() == {SENTENCE: {ids[0]: True, ids[1]: False}}
    assert caplog.text.count("is no judgement") == 2
    with pytest.raises(QueryError, match="line 2 is no judgement"):
        judgements.read()


def test_a_last_line_without_an_end_counts_and_can_be_taken_back(own_index, ids, client):
    judge(client, ids[0], True)
    judge(client, ids[1], True)
    path = own_index / FILE
    path.write_text(path.read_text().rstrip("\n"))  # as an editor may leave it
    assert judged(client) == {ids[0]: True, ids[1]: True}
    judge(client, ids[1], None)
    assert judged(client) == {ids[0]: True} == {j.id: j.relevant for j in Judgements(path).read()}
    path.write_text(path.read_text().rstrip("\n"))
    assert judged(client) == {ids[0]: True}, "a last line that takes one back counts as well"


def test_a_line_that_nests_without_end_is_no_judgement(own_index, ids, client, caplog):
    with open(own_index / FILE, "w") as file:
        file.write("[" * 200_000 + "\n" + "[" * 200_000)
    assert judged(client) == {}
    judge(client, ids[0], True)
    assert judged(client) == {ids[0]: True}
    assert caplog.text.count("is no judgement: it is nested too deeply") == 2


def test_many_at_once_are_all_kept(own_index, ids):
    expected = {(f"sentence {n // 12}", ids[n % 12]): n % 2 == 0 for n in range(96)}
    with listening(own_index, judge=True) as service, ThreadPoolExecutor(8) as pool:
        url = "http://localhost:{1}/judgements".format(*service.address)

        def post(text: str, item: str, relevant: bool) -> int:
            body = json.dumps({"text": text, "id": item, "relevant": relevant}).encode()
            with urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"})) as answer:
                return answer.status

        assert list(pool.map(lambda pair: post(*pair[0], pair[1]), expected.items())) == [200] * 96
    found = Judgements(own_index / FILE).read()
    assert len(found) == 96 and {(j.query, j.id): j.relevant for j in found} == expected


def test_each_index_has_a_file_of_its_own(own_index, ids, tmp_path):
    other = Path(shutil.copytree(own_index, tmp_path / "other"))
    client = client_of(own_index, other, judge=True)
    judge(client, ids[0], True)
    judge(client, ids[1], False, index="other")
    assert [j.id for j in Judgements(own_index / FILE).read()] == [ids[0]]
    assert [j.id for j in Judgements(other / FILE).read()] == [ids[1]]
    refused(
        client.post("/judgements", json={"text": "x", "id": ids[0], "relevant": True, "index": "../other"}), 404, "UnknownIndex"
    )


# -- what is refused -------------------------------------------------------------------------------------------------


def test_without_the_flag_nothing_is_written(own_index, ids):
    client = client_of(own_index)
    assert client.get("/indexes").json()["judging"] is False
    body = {"text": SENTENCE, "id": ids[0], "relevant": True}
    for answer in (client.post("/judgements", json=body), client.get("/judgements", params={"text": "x"})):
        assert "mmref serve INDEX --judge" in refused(answer, 403, "JudgingOff")["fix"]
    assert not (own_index / FILE).exists()


def text_of(body: object) -> bytes:
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (text_of({"text": "x", "id": "nobody", "relevant": True}), 404, "UnknownItem"),
        (text_of({"text": "x", "id": "../judgements.jsonl", "relevant": True}), 404, "UnknownItem"),
        (text_of({"text": "", "id": "{id}", "relevant": True}), 400, "EmptyQuery"),
        (text_of({"text": " \n", "id": "{id}", "relevant": True}), 400, "EmptyQuery"),
        (text_of({"text": "x" * 101, "id": "{id}", "relevant": True}), 400, "TextTooLong"),
        (text_of({"text": "x" * 70_000, "id": "{id}", "relevant": True}), 413, "TooLarge"),
        (text_of({"id": "{id}", "relevant": True}), 422, "InvalidRequest"),
        (text_of({"text": "x", "relevant": True}), 422, "InvalidRequest"),
        (text_of({"text": "x", "id": "{id}"}), 422, "InvalidRequest"),
        (text_of({"text": 7, "id": "{id}", "relevant": True}), 422, "InvalidRequest"),
        (text_of({"text": ["x"], "id": "{id}", "relevant": True}), 422, "InvalidRequest"),
        (text_of({"text": None, "id": "{id}", "relevant": True}), 422, "InvalidRequest"),
        (text_of({"text": "x", "id": 7, "relevant": True}), 422, "InvalidRequest"),
        (text_of({"text": "x", "id": "{id}", "relevant": 1}), 422, "InvalidRequest"),
        (text_of({"text": "x", "id": "{id}", "relevant": "true"}), 422, "InvalidRequest"),
        (text_of({"text": "x", "id": "{id}", "relevant": True, "path": "/tmp/x"}), 422, "InvalidRequest"),
        (text_of({"text": "x", "id": "{id}", "relevant": True, "object_id": "other"}), 422, "InvalidRequest"),
        (b'{"text": "x", "text": "y", "id": "{id}", "relevant": true}', 422, "InvalidRequest"),
        (b'{"text": "\\ud800", "id": "{id}", "relevant": true}', 422, "InvalidRequest"),
        (b"[" * 5000, 422, "InvalidRequest"),
        (b"", 422, "InvalidRequest"),
        (b"\xff", 422, "InvalidRequest"),
    ],
)
def test_what_is_no_judgement_is_refused(client, own_index, ids, body, status, error):
    body = body.replace(b"{id}", ids[0].encode())
    refused(client.post("/judgements", content=body, headers={"content-type": "application/json"}), status, error)
    assert not (own_index / FILE).exists()


def test_only_json_is_taken_and_only_by_post(client, own_index, ids):
    body = text_of({"text": "x", "id": ids[0], "relevant": True})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "image/png"):
        refused(client.post("/judgements", content=body, headers={"content-type": kind}), 415, "UnknownBody")
    for method in ("PUT", "DELETE", "OPTIONS"):
        refused(client.request(method, "/judgements", content=body), 405, "MethodNotAllowed")
    for parameters in ({}, {"text": ""}, {"text": "x" * 101}, {"text": "x", "id": "y"}):
        assert 400 <= client.get("/judgements", params=parameters).status_code < 500
    assert not (own_index / FILE).exists()


def test_odd_sentences_are_kept_as_they_are(client, own_index, ids):
    odd = ["a\u2028b", 'say "no"', "\x00\x1b[31m", "\u202egnp.exe", "{}\n{}", "\U0001f600" * 50]
    for text in odd:
        judge(client, ids[0], True, text=text)
        assert judged(client, text) == {ids[0]: True}
    assert [j.query for j in Judgements(own_index / FILE).read()] == odd


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, 403),
        ({"sec-fetch-site": "same-site", "origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1.evil.example"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 421),
        ({"sec-fetch-site": "same-origin", "origin": "http://127.0.0.1"}, 200),
        ({"origin": "http://127.0.0.1"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({}, 200),
    ],
)
def test_no_page_but_our_own_may_judge(client, own_index, ids, headers, status):
    """Another port of this host is another page, although the browser calls it the same site."""
    answer = client.post("/judgements", json={"text": "x", "id": ids[0], "relevant": True}, headers=headers)
    assert answer.status_code == status and "access-control-allow-origin" not in answer.headers
    assert (own_index / FILE).exists() == (status == 200)


def test_a_token_is_asked_for(own_index, ids):
    client, body = client_of(own_index, access=Access(TOKEN), judge=True), {"text": "x", "id": ids[0], "relevant": True}
    refused(client.post("/judgements", json=body), 401, "TokenMissing")
    refused(client.get("/judgements", params={"text": "x"}), 401, "TokenMissing")
    refused(client.post("/judgements", json=body, headers={"authorization": "Bearer no"}), 401, "TokenMissing")
    assert not (own_index / FILE).exists()
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert client.post("/judgements", json=body, headers=bearer).status_code == 200
    assert client.post("/session", headers=bearer).status_code == 204  # and now by its cookie
    assert client.post("/judgements", json=body | {"relevant": False}).status_code == 200
    refused(client.post("/judgements", json=body, headers={"origin": "http://127.0.0.1:3000"}), 403, "CrossSite")


def test_a_body_without_end_and_too_many_are_cut_off(own_index, ids):
    client = client_of(own_index, judge=True, limits=replace(LIMITS, rate=1.0, burst=3))
    headers = {"content-type": "application/json"}
    refused(client.post("/judgements", content=(b"x" * 1000 for _ in range(100)), headers=headers), 413, "TooLarge")
    answers = [client.post("/judgements", json={"text": "x", "id": ids[0], "relevant": True}) for _ in range(4)]
    assert [a.status_code for a in answers][:2] == [200, 200] and answers[-1].status_code == 429
    assert "Retry-After" in answers[-1].headers


def test_a_file_that_is_full_takes_no_more(own_index, ids):
    client = client_of(own_index, judge=True, limits=replace(LIMITS, judgements_bytes=300))
    statuses = [
        client.post("/judgements", json={"text": f"sentence {n}", "id": ids[0], "relevant": True}).status_code for n in range(6)
    ]
    assert statuses[0] == 200 and statuses[-1] == 507 and sorted(statuses) == statuses
    assert len(Judgements(own_index / FILE).read()) == statuses.count(200)
    assert len(judged(client, "sentence 0")) == 1, "what is there is still told"


def test_what_cannot_be_written_is_said_and_the_file_stays_whole(client, own_index, ids, monkeypatch, caplog):
    judge(client, ids[0], True)
    body = {"text": SENTENCE, "id": ids[1], "relevant": True}
    opened = os.open

    def read_only(path, flags, *more):
        if str(path).endswith(FILE) and flags & os.O_RDWR:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *more)

    with monkeypatch.context() as patch:
        patch.setattr(feedback.os, "open", read_only)
        said = refused(client.post("/judgements", json=body), 503, "NotWritten")
    assert "--judgements FILE" in said["fix"] and str(own_index) not in str(said), "where it lies is not told"
    assert "Read-only file system" in caplog.text and str(own_index / FILE) in caplog.text

    def full(handle, *how, **more):
        file = fdopen(handle, *how, **more)
        half = type("Half", (), {"__enter__": lambda s: s, "__exit__": lambda s, *_: file.close(), "truncate": file.truncate})()
        half.write = lambda line: file.write(line[:20])
        return half

    fdopen = os.fdopen
    with monkeypatch.context() as patch:
        patch.setattr(feedback.os, "fdopen", full)
        refused(client.post("/judgements", json=body), 503, "NotWritten")
    assert "No space left" in caplog.text
    judge(client, ids[2], False)
    assert [(j.id, j.relevant) for j in Judgements(own_index / FILE).read()] == [(ids[0], True), (ids[2], False)]


# -- starting --------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_said_at_the_start(own_index, monkeypatch):
    monkeypatch.setattr(feedback.os, "access", lambda path, mode: False)
    for argv in (["--judge"], ["--judge", "--judgements", str(own_index / "there.jsonl")]):
        with pytest.raises(StorageError, match=r"its folder takes no files.*--judgements FILE"):
            command.serve_main([str(own_index), "--replicas", "0", *argv])
    monkeypatch.undo()
    with pytest.raises(StorageError, match="its folder is not there"):
        command.serve_main([str(own_index), "--replicas", "0", "--judge", "--judgements", "/nowhere/j.jsonl"])
    (own_index / FILE).write_text("no judgement\n")
    with pytest.raises(QueryError, match="line 1 is no judgement"):
        command.serve_main([str(own_index), "--replicas", "0", "--judge"])


def test_options_that_do_not_go_together(own_index):
    with pytest.raises(UsageError, match="give both"):
        command.serve_main([str(own_index), "--judgements", "j.jsonl"])
    with pytest.raises(UsageError, match="of one index"):
        command.serve_main([str(own_index), str(own_index), "--judge", "--judgements", "j.jsonl"])


@pytest.mark.parametrize("flag", ["--max-top", "--max-text", "--max-candidates"])
def test_a_limit_of_nothing_is_refused(own_index, flag, capsys):
    with pytest.raises(SystemExit):
        command.serve_main([str(own_index), flag, "0"])
    assert f"argument {flag}: must be at least 1, found 0" in capsys.readouterr().err


def test_another_file(own_index, tmp_path):
    judgements = server._judged({"index": str(own_index)}, str(tmp_path / "mine.jsonl"))["index"]
    assert judgements.path == tmp_path / "mine.jsonl" and not judgements.path.exists()
    assert server._judged({"index": str(own_index)}, None)["index"].path == own_index / FILE
