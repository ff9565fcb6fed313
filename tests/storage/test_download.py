"""Hosts that lead into a network, send without end, or send a byte at a time: what a table of a stranger can have fetched."""

from __future__ import annotations

import base64
import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import unquote

import pytest

from mmref.errors import SampleError
from mmref.storage import download as module
from mmref.storage.download import _next, download, is_public

OUTER, INNER = "127.0.0.2", "127.0.0.1"  # the first stands for a host of the internet


class Host(http.server.BaseHTTPRequestHandler):
    """/to/URL leads there, /drip-body and /drip-headers send a byte at a time for a few seconds, /length, /chunks and /endless
    are large, anything else is its own path."""

    asked: list[str] = []
    logins: list[tuple[str | None, str | None]] = []

    def do_GET(self) -> None:
        host = self.connection.getsockname()[0]
        self.asked.append(f"{host}{self.path}")
        self.logins.append((self.headers["Host"], self.headers["Authorization"]))
        what = self.path.removeprefix("/")
        with contextlib.suppress(OSError):
            if what.startswith("to/"):
                self.send_response(302)
                self.send_header("Location", unquote(what[3:]))
                self.end_headers()
            elif hasattr(self, what.replace("-", "_")):
                getattr(self, what.replace("-", "_"))()
            else:
                self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + self.path.encode())

    def drip_body(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        self.drip()

    def drip_headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        self.drip()
        self.wfile.write(b"\r\n\r\n")

    def drip(self) -> None:
        for _ in range(100):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def length(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
        self.wfile.write(b"x" * 5000)

    def chunks(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        self.wfile.write(b"400\r\n" + b"x" * 1024 + b"\r\n")
        self.wfile.write(b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n")

    def endless(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(2000):
            self.wfile.write(b"x" * 65536)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    monkeypatch.setattr(module, "is_public", lambda address: address == OUTER or is_public(address))
    monkeypatch.setattr(Host, "asked", [])
    monkeypatch.setattr(Host, "logins", [])
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Host)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "inner",
    [
        "127.0.0.1",
        "localhost",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "127.0.0.3",
    ],
)
def test_a_host_of_the_internet_does_not_lead_inside(port: int, inner: str) -> None:
    with pytest.raises(SampleError, match="a host of the internet may not lead there"):
        download(f"http://{OUTER}:{port}/to/http://{inner}:{port}/secret")
    assert Host.asked == [f"{OUTER}/to/http://{inner}:{port}/secret"], "nothing was asked inside"


def test_each_step_counts(port: int) -> None:
    outer, inner = f"http://{OUTER}:{port}", f"http://{INNER}:{port}"
    assert download(f"{inner}/a.png") == b"/a.png", "a cell may name a host of one's own"
    assert download(f"{inner}/to/{inner}/to/{outer}/a.png") == b"/a.png"
    assert download(f"{outer}/to//b%20c.png") == b"/b%20c.png"
    for way in (f"{outer}/to/{outer}/to/{inner}/x", f"{inner}/to/{outer}/to/{inner}/x"):
        with pytest.raises(SampleError, match="may not lead there"):
            download(way)
    assert not any(f"{INNER}/x" == asked for asked in Host.asked)
    with pytest.raises(SampleError, match="5 redirects, and leads on"):
        download(f"{inner}/to/" * 7)


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:image/png,x", "gopher://a.b/"])
def test_only_the_web_is_led_to(port: int, target: str) -> None:
    with pytest.raises(SampleError, match="which is not followed"):
        download(f"http://{INNER}:{port}/to/{target}")


def test_encryption_is_not_given_up() -> None:
    assert _next("http://a.b/c", "https://a.b/d") == "https://a.b/d"
    assert _next("https://a.b/c/d", "../e f#g") == "https://a.b/e%20f"
    with pytest.raises(SampleError, match="leads to http://, which is not followed"):
        _next("https://a.b/c?key=1", "http://a.b/c")


def test_what_was_looked_at_is_what_is_asked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, looked = socket.getaddrinfo, list[str]()

    def turning(host: str, *args: object, **more: object) -> object:
        if host == "turns.example":
            looked.append(host)
            host = OUTER if len(looked) == 1 else INNER
        return real(host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", turning)
    assert download(f"http://{OUTER}:{port}/to/http://turns.example:{port}/a.png") == b"/a.png"
    assert Host.asked[1:] == [f"{OUTER}/a.png"] and len(looked) == 1
    with pytest.raises(SampleError, match="may not lead there"):
        download(f"http://{OUTER}:{port}/to/http://turns.example:{port}/a.png")


def test_addresses_of_a_link_are_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    for host in ("169.254.169.254", "2852039166", "[fe80::1]", "[::ffff:169.254.169.254]"):
        with pytest.raises(SampleError, match="inside a network"):
            download(f"http://{host}/latest/meta-data")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1::1", True), ("10.1.2.3", False), ("172.16.0.1", False), ("::1", False),
        ("192.168.1.1", False), ("100.64.0.1", False), ("224.0.0.1", False), ("240.0.0.1", False), ("0.0.0.0", False),
        ("fd00::1", False), ("fe80::1", False), ("ff02::1", False), ("::ffff:10.0.0.1", False), ("::7f00:1", False),
        ("64:ff9b::a00:1", False), ("64:ff9b::5db8:d822", True), ("2002:a00:1::", False), ("255.255.255.255", False),
    ],
)  # fmt: skip
def test_addresses_of_the_internet(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize("what", ["drip-body", "drip-headers"])
def test_a_byte_at_a_time_comes_to_an_end(port: int, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(module, "DEADLINE_S", 0.4)
    with pytest.raises(OSError, match=r"has not come within 0\.4 s"):
        download(f"http://{INNER}:{port}/{what}")


@pytest.mark.parametrize("what", ["length", "chunks", "endless"])
def test_no_more_is_read_than_an_image_may_have(port: int, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 2000)
    with pytest.raises(SampleError, match="larger than the 2,000 bytes that are fetched"):
        download(f"http://{INNER}:{port}/{what}")
    monkeypatch.setattr(module, "MAX_BYTES", 5000)
    if what != "endless":
        assert set(download(f"http://{INNER}:{port}/{what}")) == set(b"x")


def test_a_proxy_is_asked_and_led_to_nothing_inside(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy")
    monkeypatch.setenv("http_proxy", f"http://{INNER}:{port}")
    # the proxy alone knows the name
    assert download("http://pictures.invalid/a.png") == b"http://pictures.invalid/a.png"
    monkeypatch.setattr(Host, "asked", [])
    monkeypatch.setattr(Host, "do_GET", leading_inside)
    with pytest.raises(SampleError, match="may not lead there"):
        download(f"http://{OUTER}/a.png")
    assert Host.asked == [f"http://{OUTER}/a.png"]


def leading_inside(self: Host) -> None:
    self.asked.append(self.path)
    self.send_response(302)
    self.send_header("Location", "http://192.168.0.1/admin")
    self.end_headers()


@pytest.mark.parametrize(
    ("user", "login"),
    [("bob:s3cr3t", "bob:s3cr3t"), ("bob", "bob:"), ("b%40b:a%2Fb:%25", "b@b:a/b:%"), ("bob:größe", "bob:größe")],
)
def test_a_user_and_password_are_sent_as_a_browser_does(port: int, user: str, login: str) -> None:
    assert download(f"http://{user}@{INNER}:{port}/a.png") == b"/a.png"
    assert Host.logins == [(f"{INNER}:{port}", "Basic " + base64.b64encode(login.encode()).decode())]


def test_a_password_goes_to_its_own_host_alone(port: int) -> None:
    inner, outer = f"{INNER}:{port}", f"{OUTER}:{port}"
    assert download(f"http://bob:s3cr3t@{inner}/to/http://{inner}/to//to/http://{outer}/a.png") == b"/a.png"
    own = "Basic " + base64.b64encode(b"bob:s3cr3t").decode()
    assert Host.logins == [(inner, own)] * 3 + [(outer, None)]
    Host.logins.clear()
    assert download(f"http://bob:s3cr3t@{inner}/to/http://ann:pw@{outer}/a.png") == b"/a.png"
    assert Host.logins == [(inner, own), (outer, "Basic " + base64.b64encode(b"ann:pw").decode())]


def test_a_proxy_is_passed_by_whatever_the_user(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://{OUTER}:{port}")
    monkeypatch.setenv("no_proxy", INNER)
    assert download(f"http://bob:s3cr3t@{INNER}:{port}/a.png") == b"/a.png"


def test_messages_keep_a_key_for_themselves(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, outer = f"http://bob:secret@{INNER}:{port}", f"http://bob:secret@{OUTER}:{port}"
    monkeypatch.setattr(module, "MAX_BYTES", 2000)
    for url in (
        f"http://{INNER}:1/a.png?sig=secret",
        f"http://{OUTER}:{port}/to/http://{INNER}/x%3Fsig=secret",
        f"http://bob:secret@{INNER}:1/a.png",
        f"http://bob:secret@{INNER}:x/a.png",
        "http://bob:secret@/a.png",
        "http://bob:secret@[::1/a.png",
        f"{outer}/to/{inner}/a.png",
        f"{inner}/to/ftp://a.b/c",
        f"{inner}/to/" * 7,
        f"{inner}/length",
    ):
        with pytest.raises((OSError, SampleError)) as error:
            download(url)
        assert "secret" not in str(error.value)
