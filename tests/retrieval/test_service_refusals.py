"""Requests that are refused before they have been read: the answer arrives, and what still comes is dropped within limits."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from support.services import LIMITS, TOKEN, Listening, everything, listening

from mmref.errors import ServiceError
from mmref.retrieval.client import ServiceClient
from mmref.retrieval.results import Query
from mmref.retrieval.service.access import Access
from mmref.retrieval.service.limits import Limits

LARGE = 12_000_000  # bytes of a body: more than the system holds for a connection


def posted(*headers: str, size: int = LARGE) -> bytes:
    """The head of a request whose client reads no answer before it has sent all."""
    lines = ("POST /search HTTP/1.1", "Content-Type: image/png", f"Content-Length: {size}", "Connection: close", *headers)
    return "\r\n".join((*lines, "\r\n")).encode()


def sent_whole(service: Listening, request: bytes) -> bytes:
    """The answer to a client that takes a connection that breaks for no answer."""
    connection, found = service.connect(), b""
    connection.sendall(request)
    while part := connection.recv(65_536):
        found += part
    return found


@pytest.mark.parametrize(
    ("access", "headers", "status", "error"),
    [
        (Access(TOKEN), ("Host: localhost", "Authorization: Bearer wrong"), 401, b"TokenMissing"),
        (Access(), ("Host: elsewhere",), 421, b"WrongHost"),
        (Access(), ("Host: localhost", "Sec-Fetch-Site: cross-site"), 403, b"CrossSite"),
    ],
)
def test_a_refusal_arrives_although_the_client_is_still_sending(split_index, access, headers, status, error):
    with listening(split_index, Limits(), access) as service:
        answer = sent_whole(service, posted(*headers) + bytes(LARGE))
    assert answer.startswith(f"HTTP/1.1 {status}".encode()) and error in answer


def test_a_client_that_must_wait_is_told_so_while_it_sends(split_index):
    with listening(split_index, Limits(rate=0.001, burst=1)) as service:
        assert service.ask("/search?text=x")[0] == 200
        answer = sent_whole(service, posted("Host: localhost") + bytes(LARGE))
    assert answer.startswith(b"HTTP/1.1 429") and b"retry-after" in answer


def test_the_terminal_says_that_an_image_is_too_large(split_index, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(bytes(3 * LARGE))  # beyond what is read on, too
    with listening(split_index) as service:
        client = ServiceClient(f"http://127.0.0.1:{service.address[1]}")
        with pytest.raises(ServiceError, match=r"TooLarge: .* Send an image of at most 50,000 bytes"):
            client.search_many([Query("x", str(tmp_path / "photo.jpg"))], {})


def test_what_a_refused_client_sends_without_end_is_cut_off(split_index):
    with listening(split_index, access=Access(TOKEN)) as service:
        connection = service.connect(posted("Host: localhost", size=10**9))
        with pytest.raises(OSError):
            for _ in range(1000):
                connection.sendall(bytes(65_536))


def test_a_refused_client_that_sends_no_more_is_left(split_index):
    with listening(split_index, replace(LIMITS, stalled_s=0.5), Access(TOKEN)) as service:
        answer = everything(service.connect(posted("Host: localhost") + b"abc"))
    assert answer.startswith(b"HTTP/1.1 401")


def test_refused_clients_that_still_send_make_room(split_index):
    with listening(split_index, replace(LIMITS, stalled_s=60, client_connections=6), Access(TOKEN)) as service:
        refused = [service.connect(posted("Host: localhost") + b"abc") for _ in range(12)]
        assert [connection.recv(12) for connection in refused[-3:]] == [b"HTTP/1.1 401"] * 3
        assert service.ask("/healthz")[0] == 200
        assert everything(refused[0]).startswith(b"HTTP/1.1 401"), "the connection of the first has ended"


def test_a_refused_body_is_held_no_longer(split_index):
    limits = Limits(rate=0, image_bytes=50_000, json_bytes=1000, within_bytes=0, stalled_s=60)
    chunked = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    with listening(split_index, limits) as service:
        connection = service.connect(chunked + b"%x\r\n" % 70_000 + bytes(30_000))
        service.wait_for("mmref_bytes_held 30000.0")
        connection.sendall(bytes(40_000))
        assert connection.recv(12) == b"HTTP/1.1 413"
        assert "mmref_bytes_held 0.0" in service.ask("/metrics")[1].decode()


def test_what_is_no_http_in_a_body_that_is_dropped_is_no_error(split_index, caplog):
    head = b"POST /search HTTP/1.1\r\nHost: elsewhere\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
    with caplog.at_level(logging.WARNING), listening(split_index) as service:
        connection = service.connect(head)
        assert connection.recv(12) == b"HTTP/1.1 421"
        connection.sendall(b"zz\r\n")
        everything(connection)
        assert service.ask("/healthz")[0] == 200
    assert not any(record.exc_info for record in caplog.records), caplog.text
