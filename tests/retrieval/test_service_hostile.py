"""Clients that hold what others need: connections, begun uploads, answers not taken, threads, a slow host behind the index."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.utils import floatToGoString
from starlette.testclient import TestClient
from support.services import LIMITS, PATIENCE_S, begun, client_of, everything, listening, png

from mmref.data import budget
from mmref.data.decode import decode_rgb
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.service.answering import Ask, Engine
from mmref.retrieval.service.app import build_app
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.problems import refuse

ROOT = Path(__file__).parents[2]
LARGE = 6_000_000  # bytes of an answer: more than the system holds for a connection


@pytest.fixture(scope="module")
def item(split_index: Path) -> str:
    return Searcher(str(split_index)).items["id"][0].as_py()


class Held:
    """A method of the engine that waits until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.begun, self.go_on, original = [], threading.Event(), getattr(owner, name)

        def held(of, *args):
            self.begun.append(args)
            self.go_on.wait(PATIENCE_S)
            return original(of, *args)

        monkeypatch.setattr(owner, name, held)

    def wait_for(self, count: int) -> None:
        for _ in range(20 * PATIENCE_S):
            if len(self.begun) >= count:
                return
            threading.Event().wait(0.05)
        raise AssertionError(f"{len(self.begun)} of {count} have begun")


# -- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["image", "explain", "thumbnail", "item"])
def test_what_is_slow_keeps_nothing_else_waiting(split_index, item, held, monkeypatch):
    paths = {"image": f"/image/{item}", "explain": f"/explain?text=x&id={item}", "thumbnail": f"/thumbnail/{item}"}
    paths |= {"item": f"/items/{item}", "search": "/search?text=y", "health": "/healthz", "counters": "/metrics"}
    client, slow = client_of(split_index), Held(monkeypatch, Engine, held)
    with client, ThreadPoolExecutor(20) as pool:
        waiting = [pool.submit(client.get, paths[held]) for _ in range(20)]
        slow.wait_for(2)
        try:
            for name, path in paths.items():
                if name != held:
                    assert client.get(path).status_code == 200, name
            found = client.post("/search", content=png(), headers={"content-type": "image/png"})
            assert found.status_code == 200
            assert not any(one.done() for one in waiting)
        finally:
            slow.go_on.set()
        assert {one.result().status_code for one in waiting} == {200}


def test_images_to_decode_keep_no_sentence_waiting(split_index, monkeypatch):
    client, slow = client_of(split_index), threading.Event()
    monkeypatch.setattr("mmref.retrieval.service.answering.decode_query", lambda *_: slow.wait(PATIENCE_S))
    with client, ThreadPoolExecutor(20) as pool:
        for _ in range(20):
            pool.submit(client.post, "/search", content=png(), headers={"content-type": "image/png"})
        try:
            assert client.get("/search?text=x").status_code == 200
        finally:
            slow.set()


def test_a_slow_host_is_given_up_and_keeps_nothing_else_waiting(split_index, item, monkeypatch):
    client = client_of(split_index, limits=Limits(rate=0, remote_s=0.3))
    columns = Searcher.item
    monkeypatch.setattr(Searcher, "item", lambda of, i: columns(of, i) | {"path": "https://slow.example/a.png"})
    monkeypatch.setattr(Searcher, "image_bytes", lambda *_: png())
    slow = Held(monkeypatch, Searcher, "image_bytes")
    try:
        with client, ThreadPoolExecutor(12) as pool:
            waiting = [pool.submit(client.get, f"/image/{item}") for _ in range(12)]
            assert client.get("/search?text=x").status_code == 200 and client.get(f"/thumbnail/{item}").status_code == 200
            said = {(one.result().status_code, one.result().json()["error"]) for one in waiting}
            assert said == {(404, "ImageUnreachable"), (429, "Busy")}
            assert len(slow.begun) == 8, "no more threads than these wait for hosts"
            found = client.get("/explain", params={"text": "x", "id": item})
            assert (found.status_code, found.json()["error"]) == (429, "Busy")
    finally:
        slow.go_on.set()


def test_who_waits_while_others_are_answered_is_told_that_the_service_is_busy():
    class Slow:
        """Answers every image but one, for which it has only promises. Searches it does not answer at all."""

        waiting = threading.Event()

        async def search(self, ask):
            await asyncio.Event().wait()

        async def call(self, method, item_id):
            if item_id == "slow":
                self.waiting.set()
                await asyncio.Event().wait()
            if item_id == "gone":
                raise refuse(404, "ImageGone", "it is gone.", "Put it back.")
            return png(), "image/png"

    app = build_app({"one": Slow(), "other": Slow()}, limits=Limits(rate=0, timeout_s=2))
    with TestClient(app, base_url="http://127.0.0.1") as client, ThreadPoolExecutor(4) as pool:
        for answered, status in (("quick", 200), ("gone", 404)):
            Slow.waiting.clear()
            slow = pool.submit(client.get, "/image/slow")
            assert Slow.waiting.wait(PATIENCE_S)
            targets = ("/image/slow?index=other", "/search?text=x")
            others = [pool.submit(client.get, target) for target in targets]
            assert client.get(f"/image/{answered}").status_code == status
            found = slow.result()
            assert (found.status_code, found.json()["error"]) == (429, "Busy") and found.headers["retry-after"]
            said = {(one.result().status_code, one.result().json()["error"]) for one in others}
            assert said == {(503, "Overloaded")}, "of that index, or of that kind, nothing has been answered"


def test_health_tells_of_a_search_that_does_not_end(split_index, monkeypatch):
    client, slow = client_of(split_index, limits=Limits(rate=0, timeout_s=0.2)), Held(monkeypatch, Engine, "search")
    monkeypatch.setattr("mmref.retrieval.service.app.HEALTH_KEPT_S", 0)

    def once(status):
        for _ in range(20 * PATIENCE_S):
            if (found := client.get("/healthz")).status_code == status:
                return found.json()
            threading.Event().wait(0.05)
        raise AssertionError(f"it is still {found.json()}")

    with client:
        assert client.get("/healthz").status_code == 200
        assert client.get("/search?text=x").json()["error"] == "Overloaded"
        # The search began a moment after its request came, and so it is late a moment after that.
        assert once(503) == {"status": "failing", "indexes": {"test": "Refused"}}
        slow.go_on.set()
        assert once(200) == {"status": "ok", "indexes": {"test": "ok"}}


# -- clients that leave ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["explain", "search"])
def test_nobody_works_for_a_client_that_has_left(split_index, item, method, monkeypatch):
    slow = Held(monkeypatch, Engine, method)
    with listening(split_index) as service:
        target = "/search?text={}" if method == "search" else f"/explain?id={item}&text={{}}"

        def ask(text: str) -> bytes:
            return f"GET {target.format(text)} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()

        try:
            running = 1 if method == "search" else 2
            first = [service.connect(ask("first")) for _ in range(running)]
            slow.wait_for(running)
            gone = [service.connect(ask(f"gone{n}")) for n in range(5)]
            if method == "search":  # prepared, and waiting for the batch that runs
                threading.Event().wait(0.3)
            for connection in gone:
                connection.close()
            service.wait_for(f'mmref_requests_total{{route="/{method}",status="499"}} 5.0')
        finally:
            slow.go_on.set()
        assert all(everything(connection).startswith(b"HTTP/1.1 200") for connection in first)
        assert service.ask(target.format("last"))[0] == 200
    assert "gone" not in str(slow.begun)


def test_who_leaves_in_the_middle_of_an_upload_is_no_error(split_index, caplog):
    with caplog.at_level(logging.WARNING), listening(split_index) as service:
        for _ in range(5):
            service.connect(begun()).close()
        text = service.wait_for('mmref_requests_total{route="/search",status="499"} 5.0')
        assert 'status="5' not in text
    assert not any("/search" in record.getMessage() or record.exc_info for record in caplog.records), caplog.text


def test_what_is_no_http_behind_a_refused_request_is_no_error(split_index, caplog):
    with listening(split_index) as service:
        logging.getLogger("uvicorn.error").addHandler(caplog.handler)  # whose records go no further
        for host in ("elsewhere", "localhost"):
            head = f"POST /search HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
            assert everything(service.connect(head.encode())).startswith(b"HTTP/1.1 400")
        logging.getLogger("uvicorn.error").removeHandler(caplog.handler)
    assert "Invalid HTTP request" in caplog.text and not any(record.exc_info for record in caplog.records), caplog.text


# -- uploads, connections, answers -----------------------------------------------------------------------------------


def test_begun_uploads_refuse_nobody(split_index):
    limits = Limits(rate=0, in_flight=8, client_in_flight=8, client_uploads=4, uploads=10, stalled_s=5)
    with listening(split_index, limits) as service:
        hanging = [service.connect(begun(), f"127.0.0.{1 + n % 4}") for n in range(40)]
        service.wait_for('mmref_requests_total{route="/search",status="429"}')
        for source in ("127.0.0.1", "127.0.0.7"):
            for target in ("/search?text=x", "/", "/healthz", "/metrics"):
                assert service.ask(target, source=source)[0] == 200, target
        threading.Event().wait(1.2)  # now those that hang are slow, and make room
        for source in ("127.0.0.1", "127.0.0.7"):
            assert service.ask("/search?top=3", png(), source)[0] == 200
        said = [everything(connection)[:12] for connection in hanging]
        assert set(said) == {b"HTTP/1.1 429", b"HTTP/1.1 408"}, said
        assert "mmref_bytes_held 0.0" in service.ask("/metrics")[1].decode()


def test_an_upload_may_take_its_time_as_long_as_it_moves(split_index):
    data = png(60, 60)
    head = f"POST /search?top=1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
    limits = Limits(rate=0, stalled_s=0.5, stalled_bytes=1000)
    with listening(split_index, limits) as service:
        connection = service.connect(f"{head}Content-Type: image/png\r\n\r\n".encode())
        for start in range(0, len(data), 2000):  # 0.2 s each, 1.1 s in all
            connection.sendall(data[start : start + 2000])
            threading.Event().wait(0.2)
        assert everything(connection).startswith(b"HTTP/1.1 200")
        crawling = service.connect(begun())
        for _ in range(20):
            threading.Event().wait(0.1)
            try:
                crawling.sendall(b"a")
            except OSError:
                break
        assert everything(crawling)[:12] in (b"HTTP/1.1 408", b""), "a byte now and then is not enough"
        assert 'route="/search",status="408"} 1.0' in service.wait_for('status="408"')


def test_a_body_in_chunks_of_a_byte_is_cut_off(split_index):
    head = b"POST /search?top=1 HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n"
    with listening(split_index) as service:
        data = png()
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:9], data[9:1000], data[1000:]))
        sound = service.connect(head + b"Connection: close\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert everything(sound).startswith(b"HTTP/1.1 200")
        hostile = service.connect(head + b"\r\n")
        with pytest.raises(OSError):
            for _ in range(100):
                hostile.sendall(b"1\r\na\r\n" * 200)  # 20,000 bytes of a body, which holds 50,000
                threading.Event().wait(0.01)
        assert service.ask("/search?text=x")[0] == 200


def test_bodies_are_limited_in_bytes(split_index):
    limits = Limits(rate=0, bytes=400_000, client_bytes=300_000, pressed_bytes_s=10**9, stalled_s=30)
    with listening(split_index, limits) as service:
        for n in range(8):
            service.connect(begun(200_000, b"x" * 100_000), f"127.0.0.{1 + n % 4}")
        threading.Event().wait(1.2)
        assert service.ask("/search?top=1", png(150, 150), "127.0.0.1")[0] == 200
        text = service.ask("/metrics")[1].decode()
        held = next(float(line.split()[1]) for line in text.splitlines() if line.startswith("mmref_bytes_held "))
        assert 100_000 <= held <= 400_000


def test_half_sent_requests_make_room(split_index):
    with listening(split_index, Limits(rate=0, client_connections=10, connections=25)) as service:
        half = b"GET /search?text=x HTTP/1.1\r\nHost: loc"
        hanging = [service.connect(half, f"127.0.0.{1 + n // 40}") for n in range(160)]
        for source in ("127.0.0.1", "127.0.0.2", "127.0.0.9"):
            assert service.ask("/search?text=x", source=source)[0] == 200
        left = 0
        for connection in hanging:
            connection.settimeout(0.01)
            try:
                left += connection.recv(1) != b""
            except TimeoutError:
                left += 1
            except ConnectionResetError:
                pass
        assert left <= 25


def test_connections_that_are_kept_outlive_half_sent_ones(split_index):
    def well(connection: socket.socket) -> bool:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b'"ok"}}') and (part := connection.recv(4096)):
            answer += part
        return answer.startswith(b"HTTP/1.1 200")

    with listening(split_index, Limits(rate=0, client_connections=6)) as service:
        kept = service.connect()
        assert well(kept)
        half = [service.connect(b"GET /") for _ in range(20)]
        assert [everything(connection) for connection in half[:10]] == [b""] * 10, "they have made room"
        assert well(kept)


def test_answers_that_are_not_taken_are_limited_and_given_up(split_index, item, monkeypatch):
    monkeypatch.setattr(Engine, "image", lambda *_: (bytes(LARGE), "image/png"))
    get = f"GET /image/{item} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    limits = Limits(rate=0, in_flight=2, client_bytes=2 * LARGE, bytes=3 * LARGE, stalled_s=4)
    with listening(split_index, limits) as service:
        unread = []
        for n in range(12):
            unread.append(service.connect(get, f"127.0.0.{1 + n % 4}", 4096))
            if n < 3:
                service.wait_for(f"mmref_bytes_held {floatToGoString((n + 1) * LARGE)}\n")
        threading.Event().wait(1.2)
        assert service.ask("/search?text=x")[0] == 200, "who takes an answer is not in flight"
        for source in ("127.0.0.1", "127.0.0.9"):
            status, body = service.ask(f"/image/{item}", source=source)
            assert (status, len(body)) == (200, LARGE), "the slow make room"
        text = service.wait_for("mmref_bytes_held 0.0")
        assert "mmref_given_up_total 0.0" not in text
        lengths = [len(everything(connection)) for connection in unread]
        assert max(lengths) < LARGE, "none of them got all of it"


def test_a_slow_reader_is_answered_as_long_as_it_reads(split_index, item, monkeypatch):
    monkeypatch.setattr(Engine, "image", lambda *_: (bytes(LARGE), "image/png"))
    with listening(split_index, Limits(rate=0, stalled_s=0.5)) as service:
        get = f"GET /image/{item} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        connection, found = service.connect(get, receive_buffer=65_536), 0
        while part := connection.recv(400_000):
            found += len(part)
            threading.Event().wait(0.02)
        assert found > LARGE


def test_files_run_out_and_the_service_goes_on():
    program = """
import resource, socket, sys, threading
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 80))
from mmref.retrieval.service.limits import room_for_connections
assert room_for_connections() == 40 and resource.getrlimit(resource.RLIMIT_NOFILE) == (80, 80)
import uvicorn
from mmref.retrieval.service.access import Access
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.patience import PatientProtocol
async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
http = PatientProtocol.of(Limits(connections=room_for_connections()), Access())
uvicorn.Server(uvicorn.Config(app, http=http, lifespan="off", ws="none", log_level="critical")).run(sockets=[listener])
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            from support.services import Listening

            assert process.stdout is not None
            service = Listening(("127.0.0.1", int(process.stdout.readline())))
            for _ in range(200):
                service.connect(b"GET /")
            assert service.ask("/")[0] == 200
            service.close()
        finally:
            process.kill()


# -- images that weigh more than they look ------------------------------------------------------------------------------


def test_an_image_waits_in_the_size_that_the_model_sees(split_index):
    engine, sent = Engine(str(split_index), Limits(), watch=False), png(900, 700)
    prepared = engine.prepare(Ask(image=sent))
    data = engine._searcher.model.config.data
    assert prepared.query.image.pixels.shape == (data.image_height, data.image_width, 3) != (700, 900, 3)
    whole = engine._searcher.encode_pixels([decode_rgb(sent)])
    assert np.array_equal(engine._searcher.encode_pixels([prepared.query.image]), whole), "as if it had been kept whole"


def test_heavy_images_wait_for_each_other_and_then_are_refused_by_name(split_index, monkeypatch):
    room = budget.PixelBudget(2000)
    monkeypatch.setattr(budget, "BUDGET", room)
    client, headers = client_of(split_index, limits=replace(LIMITS, decode_s=0.01)), {"content-type": "image/png"}
    with client:
        share = room.acquire(1500, None)
        refused = client.post("/search", content=png(40, 30), headers=headers)
        assert (refused.status_code, refused.json()["error"]) == (429, "Busy") and refused.headers["retry-after"]
        assert client.post("/search", content=png(20, 20), headers=headers).status_code == 200, "a small one fits"
        assert client.get("/search?text=x").status_code == 200
        room.release(share)
        assert client.post("/search", content=png(40, 30), headers=headers).status_code == 200
    assert room.used == 0


def test_a_photograph_of_a_phone_is_within_the_limit():
    assert 4096 * 3072 <= Limits().pixels < 13_000_000
