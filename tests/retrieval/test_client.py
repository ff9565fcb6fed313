"""`mmref search --url`: what a running service is asked, the same output as of the index itself, and errors by name."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from support.services import LIMITS, TOKEN, listening, png

from mmref.cli import main
from mmref.errors import ServiceError
from mmref.retrieval.client import ServiceClient
from mmref.retrieval.feedback import FILE, Judgements
from mmref.retrieval.results import Query
from mmref.retrieval.service.access import Access
from mmref.retrieval.service.limits import Limits


@pytest.fixture(scope="module")
def url(split_index):
    with listening(split_index) as service:
        yield f"http://127.0.0.1:{service.address[1]}"


def said(capsys, *argv: str) -> str:
    assert main(["search", *argv]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["red circle"],
        ["red circle", "--top", "3", "--offset", "2", "--no-refine"],
        ["red circle", "--candidates", "4", "--where", "split=test", "object_id>=thing.19", "--sort=-id"],
        ["--where", "split=test", "red circle", "--by", "object", "--top", "3", "--images", "2"],
        ["blue star", "--image", "{image}", "--image-weight", "0.2"],
        ["--batch", "{batch}", "--top", "2"],
    ],
)
@pytest.mark.parametrize("form", ["terminal", "json", "html"])
def test_the_output_is_that_of_the_index(url, split_index, tmp_path, capsys, options, form):
    (tmp_path / "q.png").write_bytes(png())
    (tmp_path / "q.txt").write_text("red circle\ngreen square\n")
    options = [one.format(image=tmp_path / "q.png", batch=tmp_path / "q.txt") for one in options]
    found = []
    for place in ([str(split_index)], ["--url", f"{url}/"]):
        more = {"json": ["--json"], "html": ["--html", str(tmp_path / f"{len(found)}.html")], "terminal": []}[form]
        out = said(capsys, *place, *options, *more)
        if form == "json":
            found.append([json.loads(line) for line in out.splitlines()])
        else:
            found.append((tmp_path / f"{len(found)}.html").read_text() if form == "html" else out)
    ours, theirs = found
    if form != "json":
        assert ours == theirs and len(ours) > 50
        return
    for local, remote in zip(ours, theirs, strict=True):
        assert local["query"] == remote["query"] and len(local["results"]) == len(remote["results"]) > 0
        for a, b in zip(local["results"], remote["results"]):
            assert a.keys() == b.keys() and a.get("id") == b.get("id") and a.get("object_id") == b.get("object_id")
            assert a["score"] == pytest.approx(b["score"], abs=1e-5) and b.get("path") is None


def test_nothing_of_the_model_is_imported(url, tmp_path):
    script = (
        "import sys; from mmref.cli import main; status = main(sys.argv[1:]);"
        "print(status, sorted({'torch', 'transformers', 'faiss', 'ray', 'scipy'} & set(sys.modules)))"
    )
    argv = ["search", "--url", url, "red circle", "--html", str(tmp_path / "page.html"), "--where", "split=test"]
    done = subprocess.run([sys.executable, "-c", script, *argv], text=True, capture_output=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout + done.stderr


def test_what_the_service_refuses_is_an_error_by_its_name(url, capsys):
    for argv, words in (
        (["red", "--where", "splat=test"], ("UnknownColumn", "Did you mean 'split'?")),
        (["red", "--where", "width>=wide"], ("BadFilter", "'wide' is not of them")),
        (["red", "--top", "21"], ("TooManyResults", "at most 20")),
        (["red", "--index", "other"], ("UnknownIndex", "Choose one of: test")),
        ([""], ("EmptyQuery",)),
    ):
        assert main(["search", "--url", url, *argv]) == 1
        error = capsys.readouterr().err
        assert error.startswith("mmref: ServiceError: ") and all(word in error for word in words), error
    assert main(["search", "--url", url, "x", "--image", "/nowhere.png"]) == 1
    assert "QueryError: the image of the query cannot be used: /nowhere.png" in capsys.readouterr().err


def test_of_many_queries_the_one_that_is_refused_is_named(url, tmp_path, capsys):
    (tmp_path / "q.txt").write_text("red circle\n\n" + "long " * 30 + "\ngreen square\n")
    assert main(["search", "--url", url, "--batch", str(tmp_path / "q.txt")]) == 1
    printed = capsys.readouterr()
    assert "query 2 of 3 ('long long" in printed.err and "TextTooLong" in printed.err and not printed.out


def test_options_that_do_not_go_together_are_named(split_index, capsys):
    for argv, words in (
        (["--url", "http://h", str(split_index), "x"], "is no index to open"),
        (["--url", "localhost:8000", "x"], "is no address of a service: give it as http://HOST:PORT"),
        (["--url", "http://[::1:8000", "x"], "is no address of a service: give it as http://HOST:PORT"),
        (["--url", "http://[bad]/", "x"], "is no address of a service: give it as http://HOST:PORT"),
        (["--url", "http://..:1", "x"], "is no address of a service: give it as http://HOST:PORT"),
        (["--url", "http://localhost:99999", "x"], "is no address of a service: give it as http://HOST:PORT"),
        (["--url", "http://localhost:1/ü", "x"], "write those of its host as xn--..., and those of its path as %XX"),
        (
            ["--url", "http://h", "x", "--judge", "--judgements", "f"],
            "--judgements, --store and --device are of an index that is opened here",
        ),
        (["--url", "http://h", "--image", "a.png", "--judge"], "an image is none: leave out --image"),
        ([], "name the INDEX to search, or a service with --url"),
        ([str(split_index), "x", "--token", "t"], "--token and --index are of a service"),
    ):
        assert main(["search", *argv]) == 2
        assert words in capsys.readouterr().err


def test_a_service_keeps_what_is_judged_on_the_terminal(own_index, capsys, monkeypatch):
    answers = iter(["y", "", "N", "q"])
    monkeypatch.setattr(builtins, "input", lambda _: next(answers))
    with listening(own_index, judge=True, access=Access(TOKEN)) as service:
        url = f"http://127.0.0.1:{service.address[1]}"
        out = said(capsys, "--url", url, "red circle", "--judge", "--top", "6", "--token", TOKEN, "--index", own_index.name)
        assert f"2 judgements saved in {url}" in out
        ids = [one.id for one in ServiceClient(url, TOKEN).search_many([Query("red circle")], {"top": 6})[0].results]
    found = Judgements(own_index / FILE).read()
    assert [(j.query, j.id, j.relevant) for j in found] == [("red circle", ids[0], True), ("red circle", ids[2], False)]


def test_nobody_is_asked_where_a_service_keeps_nothing(url, capsys, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda _: pytest.fail("asked"))
    assert main(["search", "--url", url, "red circle", "--judge"]) == 1
    printed = capsys.readouterr()
    assert "JudgingOff" in printed.err and "`mmref serve INDEX --judge`" in printed.err and not printed.out


def test_without_top_as_many_results_come_as_the_service_allows(split_index, capsys):
    with listening(split_index, Limits(rate=0, top=3)) as service:
        url = f"http://127.0.0.1:{service.address[1]}"
        assert len(said(capsys, "--url", url, "red circle").splitlines()) == 1 + 3


def test_a_token_is_brought(split_index, capsys, monkeypatch):
    with listening(split_index, access=Access(TOKEN)) as service:
        url = f"http://127.0.0.1:{service.address[1]}"
        assert main(["search", "--url", url, "red"]) == 1
        error = capsys.readouterr().err
        assert "Token" in error and "Give it with --token, or in $MMREF_TOKEN" in error
        assert "rank" in said(capsys, "--url", url, "red", "--token", TOKEN)
        monkeypatch.setenv("MMREF_TOKEN", TOKEN)
        assert "rank" in said(capsys, "--url", url, "red")


def test_a_batch_waits_where_the_service_is_busy(split_index):
    with listening(split_index, Limits(rate=20, burst=2)) as service:
        client = ServiceClient(f"http://127.0.0.1:{service.address[1]}")
        found = client.search_many([Query(f"thing {n}") for n in range(12)], {"top": 1})
        assert [len(one.results) for one in found] == [1] * 12
        assert 'status="429"' in service.ask("/metrics", source="127.0.0.9")[1].decode(), "it was"
    assert LIMITS.rate == 0


class Elsewhere(BaseHTTPRequestHandler):
    """A server of something else, which leads on to another host."""

    asked: list[str | None] = []

    def do_POST(self) -> None:
        self.asked.append(self.headers["authorization"])
        self.send_response(302 if self.path.startswith("/moved") else 200)
        self.send_header("location", f"http://localhost:{self.server.server_address[1]}/search")
        self.end_headers()
        self.wfile.write(b"<html>")

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


def test_what_is_no_service_is_named_and_gets_the_token_nowhere_else():
    server = HTTPServer(("127.0.0.1", 0), Elsewhere)
    thread = Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        with pytest.raises(ServiceError, match="not as `mmref serve`"):
            ServiceClient(url).search_many([Query("x")], {})
        Elsewhere.asked.clear()
        with pytest.raises(ServiceError, match="answers 302"):
            ServiceClient(f"{url}/moved", TOKEN).search_many([Query("x")], {})
        assert Elsewhere.asked == [f"Bearer {TOKEN}"], "once: the other place is not asked"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    with pytest.raises(ServiceError, match="does not answer"):
        ServiceClient(url).search_many([Query("x")], {})


@pytest.fixture
def proxy(monkeypatch):
    """A proxy that the environment names, and what it is asked for."""
    asked = []

    class Proxy(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Proxy)
    thread = Thread(target=server.serve_forever)
    thread.start()
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{server.server_address[1]}")
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_service_of_this_machine_is_asked_by_no_proxy(url, proxy):
    for host in ("127.0.0.1:9", "127.0.0.2:9", "localhost:9", "localhost.:9", "[::1]:9"):
        with pytest.raises(ServiceError, match=r":9 does not answer"):
            ServiceClient(f"http://{host}", TOKEN).search_many([Query("x")], {})
    assert len(ServiceClient(url, TOKEN).search_many([Query("x")], {"top": 1})[0].results) == 1
    assert proxy == []


def test_the_proxy_of_another_host_is_named(proxy):
    with pytest.raises(ServiceError, match=r"http://search.example \(by the proxy 127.0.0.1:\d+\) answers 403") as error:
        ServiceClient("http://search.example").search_many([Query("x")], {})
    assert proxy == ["http://search.example/search"] and "secret" not in str(error.value)
