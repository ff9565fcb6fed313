"""Open the indexes, listen, and leave in order."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mmref.errors import OutputError, ServeError
from mmref.retrieval.feedback import Judgements
from mmref.retrieval.service.access import LOOPBACK, TOKEN, Access, Network
from mmref.retrieval.service.answering import Engine
from mmref.retrieval.service.backend import Backend, Local, Replicated, deploy, remove_left_behind
from mmref.retrieval.service.guard import Guard
from mmref.retrieval.service.leaving import ANSWER_S, CLOSE_S, Leaving, leaving
from mmref.retrieval.service.limits import Limits, room_for_connections
from mmref.terminal.output import PrintableFormatter

WAITING = 2048  # connections the system holds for us
LARGEST_HEADERS = 32_768  # bytes, the request line with its query among them


def serve(
    indexes: Sequence[str],
    host: str,
    port: int,
    replicas: int,
    token: str | None,
    limits: Limits,
    proxies: Sequence[Network] = (),
    kept: int = 1,
    store: str | None = None,
    judge: bool = False,
    judgements: str | None = None,
) -> None:
    """Answer until SIGINT or SIGTERM; requests that have begun are answered first, for as long as `leaving.py` gives them.

    Args:
        indexes: directories; they are called by the names of their folders.
        replicas: most Ray Serve replicas of each index; 0: in this process.
        token: that requests must bring; needed where `host` is not loopback.
        proxies: whose word on the address of a client is taken.
        kept: replicas of each index that run whatever the load.
        store: URL of what finds the candidates of the one index.
        judge: whether clients may judge results.
        judgements: file for that of the one index; by default each index holds its own.

    Raises:
        ServeError: no token, a port in use, two indexes of one name. SearchIndexError: no complete index. StoreError.
        StorageError: judgements cannot be written. QueryError: those that are there cannot be read.
    """
    from mmref.retrieval.manifest import Manifest

    access = _access(host, token, proxies)
    limits = replace(limits, connections=min(limits.connections, room_for_connections()))
    named = _named(indexes)
    for path in named.values():
        Manifest.read(Path(path))  # before anything is started
    judged = _judged(named, judgements) if judge else {}
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("mmref: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    with (
        _listening(host, port) as listener,
        leaving() as end,
        _backends(named, limits, replicas, kept, end, store) as backends,
    ):
        from mmref.retrieval.service.app import build_app

        app = build_app(backends, access, limits, judged)
        listener.listen(WAITING)  # who reads the address may ask at once: the system holds the connection
        address = _url(host, listener.getsockname()[1])
        print(f"serving {', '.join(named)} at {address} (Ctrl-C stops it)", flush=True)
        if token:
            print(f"the page asks for the token, or takes it from {address}#TOKEN", flush=True)
        for kept_in in judged.values():
            print(f"what is judged is written to {kept_in.path}", flush=True)
        _run(app, listener, end)
    with contextlib.suppress(OutputError):  # nobody reads any more, and what was asked for is done
        print("stopped", flush=True)


def _access(host: str, token: str | None, proxies: Sequence[Network]) -> Access:
    if token is None and host not in LOOPBACK:
        raise ServeError(
            f"--host {host} is reached from other machines: set a token that requests must bring, "
            f"`export {TOKEN}=$(openssl rand -hex 16)`, or listen on 127.0.0.1."
        )
    return Access(token, proxies=tuple(proxies))


def _named(indexes: Sequence[str]) -> dict[str, str]:
    """Directory of each index by the name of its folder."""
    named: dict[str, str] = {}
    for path in indexes:
        name = Path(path).expanduser().absolute().name
        if name in named:
            raise ServeError(f"two indexes are called {name!r}: rename the folder of one, or serve it on another port.")
        named[name] = path
    return named


def _judged(named: dict[str, str], file: str | None) -> dict[str, Judgements]:
    """Judgements of each index, found to be readable and writable. Raises StorageError, QueryError."""
    found = {name: Judgements.of(path, file) for name, path in named.items()}
    for judgements in found.values():
        judgements.check_writable()
        if judgements.path.exists():
            judgements.read()
    return found


@contextlib.contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket, bound before anything slow is started. Raises ServeError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise ServeError(f"cannot listen on {host}:{port} ({error}): choose another --port or --host.") from None
    with contextlib.closing(listener):
        yield listener


@contextlib.contextmanager
def _backends(
    named: dict[str, str], limits: Limits, replicas: int, kept: int, end: Leaving, store: str | None
) -> Iterator[dict[str, Backend]]:
    """Engines of all indexes, here or on Ray."""
    if replicas == 0:
        engines = {name: Engine(path, limits, store=store) for name, path in named.items()}
        try:
            yield {name: Local(engine) for name, engine in engines.items()}
        finally:
            for engine in engines.values():
                engine.close()
        return
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # or a late call of Serve's threads starts another cluster
    from mmref.cluster.connection import connect

    with connect(need_cpus=len(named) * kept):
        end.listen()  # Ray has taken SIGTERM
        remove_left_behind()
        deployed: dict[str, Replicated] = {}
        try:
            for number, (name, path) in enumerate(named.items()):
                # A number stands for the index's own name, which may hold what Ray Serve takes for a separator.
                deployed[name] = deploy(path, str(number), limits, replicas, kept, store)
            yield dict(deployed)
        finally:
            _stop(deployed.values())


def _stop(deployed: Iterable[Replicated]) -> None:
    """Stop all at once. Who is not done in time is left to Ray Serve, which has been told, or ends with our own cluster."""
    threads = [threading.Thread(target=backend.close, daemon=True) for backend in deployed]
    for thread in threads:
        thread.start()
    until = time.monotonic() + CLOSE_S
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))


def _run(app: Guard, listener: socket.socket, end: Leaving) -> None:
    import uvicorn

    from mmref.retrieval.service.patience import PatientProtocol

    config = uvicorn.Config(
        app,
        http=PatientProtocol.of(app.limits, app.access),  # type: ignore[arg-type]
        h11_max_incomplete_event_size=LARGEST_HEADERS,
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,  # the guard knows whose word on a client's address to take
        server_header=False,
        backlog=WAITING,
        timeout_graceful_shutdown=ANSWER_S,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]  # `end` takes them
    end.server = server
    server.run(sockets=[listener])


def _url(host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else name}:{port}/"
