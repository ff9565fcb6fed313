"""`mmref serve INDEX [INDEX ...]` and jobs/serve.py: open the indexes, listen, and leave in order."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mmref.errors import ServeError
from mmref.retrieval.service.access import LOOPBACK, Access, Network, network
from mmref.retrieval.service.answering import Engine
from mmref.retrieval.service.backend import Backend, Local, Replicated, deploy, remove_left_behind
from mmref.retrieval.service.guard import Guard
from mmref.retrieval.service.leaving import ANSWER_S, CLOSE_S, Leaving, leaving
from mmref.retrieval.service.limits import Limits, room_for_connections
from mmref.storage.texts import read_text
from mmref.terminal.arguments import count, local_path
from mmref.terminal.output import PrintableFormatter

TOKEN = "MMREF_TOKEN"
SHORTEST_TOKEN = 16
WAITING = 2048  # connections the system holds for us
LARGEST_HEADERS = 32_768  # bytes, the request line with its query among them


def serve_main(argv: Sequence[str]) -> int:
    """`mmref serve INDEX [INDEX ...]`."""
    parser = argparse.ArgumentParser(
        prog="mmref serve",
        description="Search indexes through a page and over HTTP. An index that changes on disk is opened again while it "
        "serves. Beyond this machine a token is needed.",
    )
    parser.add_argument(
        "indexes",
        nargs="+",
        type=local_path,
        metavar="INDEX",
        help="directory of `mmref index`; the first is the default",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=count, default=8000, help="0: a free one (default: %(default)s)")
    parser.add_argument(
        "--replicas", type=count, default=1,
        help="Ray Serve replicas of each index, started by load; 0: in this process, without Ray (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--min-replicas", type=count, metavar="N",
        help="replicas of each index that are kept whatever the load: with two, one that dies is not missed (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--token-file",
        type=local_path,
        metavar="FILE",
        help=f"file with the token that requests must bring (default: ${TOKEN})",
    )
    parser.add_argument(
        "--trusted-proxy", metavar="ADDRESS", type=network, action="append", default=[],
        help="address or range (10.0.0.0/8) of a proxy whose X-Forwarded-For names the client that limits count; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--keep-metadata",
        action="store_true",
        help="give images out with what cameras and programs wrote into them (GPS, ...)",
    )
    defaults = Limits()
    for name, text in (
        ("text", "longest query, characters"),
        ("image_bytes", "largest image of a query"),
        ("pixels", "most pixels of an image of a query"),
        ("top", "most results of a query"),
        ("candidates", "most candidates of a query that are refined"),
        ("rate", "searches a second of one client; 0: any number"),
    ):
        default = getattr(defaults, name)
        flag = f"--max-{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, help=f"{text} (default: %(default)s)")
    args = parser.parse_args(argv)
    kept = min(1, args.replicas) if args.min_replicas is None else args.min_replicas
    if not min(1, args.replicas) <= kept <= args.replicas:
        fix = "keep at least 1, and at most as many as --replicas says."
        raise ServeError(f"--min-replicas {kept} does not go with --replicas {args.replicas}: {fix}")
    chosen = {f.name: getattr(args, f"max_{f.name}") for f in fields(Limits) if hasattr(args, f"max_{f.name}")}
    limits, token = Limits(**chosen, keep_metadata=args.keep_metadata), read_token(args.token_file)
    status: Any = 0
    try:
        serve(args.indexes, args.host, args.port, args.replicas, token, limits, args.trusted_proxy, kept)
    except SystemExit as stopped:
        status = stopped.code
    sys.stdout.flush()
    os._exit(status)  # a search that still computes, and Python's own tidying, would hold the process for seconds


def read_token(path: str | None) -> str | None:
    """The token of a file or of the environment, None where there is none. Raises ServeError.

    The variable is taken out of the environment: whatever is started from here on would inherit it.
    """
    given = os.environ.pop(TOKEN, "").strip()
    if path:
        try:
            token = read_text(path, ServeError).strip()
        except ServeError as error:
            raise ServeError(f"the token cannot be read: {error}") from None
        source = path
    else:
        token, source = given, f"${TOKEN}"
    if (token or path) and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ServeError(
            f"the token of {source} is too short, or no plain text: give at least {SHORTEST_TOKEN} letters and digits, "
            "such as `openssl rand -hex 16` prints."
        )
    return token or None


def serve(
    indexes: Sequence[str],
    host: str,
    port: int,
    replicas: int,
    token: str | None,
    limits: Limits,
    proxies: Sequence[Network] = (),
    kept: int = 1,
) -> None:
    """Answer until SIGINT or SIGTERM; requests that have begun are answered first, for as long as `leaving.py` gives them.

    Args:
        indexes: directories; they are called by the names of their folders.
        replicas: most Ray Serve replicas of each index; 0: in this process.
        token: that requests must bring; needed where `host` is not loopback.
        proxies: whose word on the address of a client is taken.
        kept: replicas of each index that run whatever the load.

    Raises:
        ServeError: no token, a port in use, two indexes of one name. SearchIndexError: no complete index.
    """
    from mmref.retrieval.index import Manifest

    access = _access(host, token, proxies)
    limits = replace(limits, connections=min(limits.connections, room_for_connections()))
    named = _named(indexes)
    for path in named.values():
        Manifest.read(Path(path))  # before anything is started
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("mmref: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    with (
        _listening(host, port) as listener,
        leaving() as end,
        _backends(named, limits, replicas, kept, end) as backends,
    ):
        from mmref.retrieval.service.app import build_app

        app = build_app(backends, access, limits)
        listener.listen(WAITING)  # who reads the address may ask at once: the system holds the connection
        address = _url(host, listener.getsockname()[1])
        print(f"serving {', '.join(named)} at {address} (Ctrl-C stops it)", flush=True)
        if token:
            print(f"the page asks for the token, or takes it from {address}#TOKEN", flush=True)
        _run(app, listener, end)
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
def _backends(named: dict[str, str], limits: Limits, replicas: int, kept: int, end: Leaving) -> Iterator[dict[str, Backend]]:
    """Engines of all indexes, here or on Ray."""
    if replicas == 0:
        engines = {name: Engine(path, limits) for name, path in named.items()}
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
                deployed[name] = deploy(path, str(number), limits, replicas, kept)
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
