"""The service for a test: asked in this process, or through a port of this machine."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import uvicorn
from PIL import Image
from starlette.testclient import TestClient

from mmref.retrieval.feedback import FILE, Judgements
from mmref.retrieval.service.access import Access
from mmref.retrieval.service.answering import Engine
from mmref.retrieval.service.app import build_app
from mmref.retrieval.service.backend import Local
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.patience import PatientProtocol

TOKEN = "0123456789abcdef"
LIMITS = Limits(text=100, image_bytes=50_000, pixels=20_000, top=20, rate=0)
PATIENCE_S = 60


def client_of(
    *indexes: Path,
    access: Access | None = None,
    limits: Limits = LIMITS,
    host: str = "127.0.0.1",
    peer: str = "testclient",
    judge: bool = False,
) -> TestClient:
    backends = {path.name: Local(Engine(str(path), limits, watch=False)) for path in indexes}
    judgements = {path.name: Judgements(path / FILE) for path in indexes if judge}
    app = build_app(backends, access, limits, judgements)
    return TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False, client=(peer, 50_000))


def png(width: int = 30, height: int = 20, seed: int = 0) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Listening:
    """A service that listens, and connections to it that are closed with it."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.address = address
        self._connections = contextlib.ExitStack()

    def connect(self, sent: bytes = b"", source: str = "127.0.0.1", receive_buffer: int = 0) -> socket.socket:
        """A connection from an address of this machine, on which something has been sent."""
        connection = self._connections.enter_context(socket.socket())
        if receive_buffer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(PATIENCE_S)
        connection.bind((source, 0))
        connection.connect(self.address)
        with contextlib.suppress(OSError):  # given up already
            connection.sendall(sent)
        return connection

    def ask(self, target: str, body: bytes = b"", source: str = "127.0.0.1") -> tuple[int, bytes]:
        """Status and body of an answer, on a connection of its own."""
        kind = "POST" if body else "GET"
        head = f"{kind} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: image/png\r\n"
        answer = everything(self.connect(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, source))
        head_of, _, found = answer.partition(b"\r\n\r\n")
        return int(head_of.split()[1]), found

    def wait_for(self, line: str) -> str:
        """The counters, once they have a line."""
        for _ in range(20 * PATIENCE_S):
            if line in (text := self.ask("/metrics", source="127.0.0.9")[1].decode()):
                return text
            threading.Event().wait(0.05)
        raise AssertionError(f"{line} does not come: {text}")

    def close(self) -> None:
        self._connections.close()


def begun(size: int = 9000, sent: bytes = b"abc") -> bytes:
    """A search by an image that is sent as far as this."""
    head = f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: {size}\r\n\r\n"
    return head.encode() + sent


def everything(connection: socket.socket) -> bytes:
    """What comes until the connection ends."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            found += part
    return found


@contextlib.contextmanager
def listening(index: Path, limits: Limits = LIMITS, access: Access | None = None, judge: bool = False) -> Iterator[Listening]:
    """The service on a port of this machine."""
    access = access or Access()
    backends = {index.name: Local(Engine(str(index), limits, watch=False))}
    app = build_app(backends, access, limits, {index.name: Judgements(index / FILE)} if judge else {})
    protocol = PatientProtocol.of(limits, access)
    config = uvicorn.Config(app, http=protocol, lifespan="off", ws="none", log_level="warning", proxy_headers=False)
    running = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        service = Listening(listener.getsockname())
        try:
            yield service
        finally:
            service.close()
            running.should_exit = True
            thread.join(PATIENCE_S)
