"""What every request passes before it is answered: host, token, rate, size, pace; and what every answer carries.

The guard alone receives: it takes the body whole, so that what is being sent, being worked on and being taken are limited
each for itself, and then waits for the client to leave, so that nobody works for one that has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from h11 import LocalProtocolError

from mmref.retrieval.service.access import Access, Rates
from mmref.retrieval.service.counters import Counters
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.problems import INTERNAL, LEAVING, Problem, Refused, refuse
from mmref.retrieval.service.transfers import Transfer, Transfers, busy

log = logging.getLogger(__name__)

STATIC = ("/", "/page.css", "/page.js", "/common.js", "/address.js", "/detail.js", "/filters.js", "/judge.js", "/icon.svg")
OPEN = (*STATIC, "/healthz", "/session")  # need no token: they hold no data
FREE = (*OPEN, "/metrics")  # are answered however many others are: whoever looks after the service asks them
WRITES = ("/judgements",)  # keep what is sent there by POST
BODIES = ("/search", "/explain", *WRITES)  # take one, by POST
# These are shares of the rate: an explanation encodes an image 50 times, a page shows a hundred thumbnails at once.
COSTS = {"search": 1.0, "judgements": 1.0, "explain": 5.0, "session": 5.0, "image": 0.5, "thumbnail": 0.1}
MISSED_TOKEN = 5.0
PIECE = 65_536  # bytes of an answer that are handed on at once
SEVERAL = ("where", "within")  # parameters that may come more than once
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}

CROSS_SITE = Problem(403, "CrossSite", "the request comes from another site.", "Open the page of the service.")

Scope = dict[str, Any]


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


@dataclass
class Exchange:
    """One request on its way."""

    client: str
    headers: dict[str, str]
    transfer: Transfer
    send: Any
    abort: Callable[[], None]  # end the connection at once
    linger: Callable[[], None]  # let the connection make room for others
    arrived: bool = False  # nothing of the request is still to come
    status: int = 0  # of the answer, once it has begun
    complete: bool = False  # the answer has been handed on
    refused: Refused | None = None  # instead of the answer, for which there is no room
    flight: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # left when the answer begins


class Guard:
    """ASGI middleware around the application."""

    def __init__(self, app: Any, access: Access, limits: Limits, metrics: Counters) -> None:
        self.app, self.access, self.limits, self.metrics = app, access, limits, metrics
        self.rates = Rates(limits.rate, limits.burst)
        self.transfers = Transfers(limits, metrics)
        self.in_flight: Counter[str] = Counter()  # by client

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = _joined(scope["headers"])
        client = self.access.client((scope.get("client") or ("local",))[0], headers)
        state = scope.get("state", {})
        with self.transfers.of(client) as transfer:
            abort, linger = state.get("abort", lambda: None), state.get("linger", lambda: None)
            exchange = Exchange(client, headers, transfer, send, abort, linger)
            try:
                with contextlib.suppress(ClientLeft):
                    await self._answer(scope, receive, exchange)
            finally:
                exchange.flight.close()
                route = getattr(scope.get("route"), "path", scope["path"] if scope["path"] in BODIES else "other")
                self.metrics.requests.labels(route, str(exchange.status or 499)).inc()  # 499: the client left first
                self.metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Any, exchange: Exchange) -> None:
        head = scope["method"] == "HEAD"

        async def send(message: Any) -> None:
            if head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await self._send(message, exchange)

        async def received() -> Any:
            message = await receive()
            exchange.arrived = exchange.arrived or not message.get("more_body", False)
            return message

        problem: Problem | None = None
        try:
            self._check(scope, exchange)
            if head:  # monitors and balancers ask so: answered as GET, without the body
                scope["method"] = "GET"
            body = b""
            if scope["method"] == "POST" and scope["path"] in BODIES:
                body = await self._body(received, exchange, scope["path"])
            if scope["path"] not in FREE:
                exchange.flight.enter_context(self._flying(exchange.client))
            await self._work(scope, body, received, send, exchange)
        except ClientLeft:
            pass
        except Refused as refused:
            problem = refused.problem
        except asyncio.CancelledError:  # the service has been stopped, and this takes too long
            if not exchange.status:
                await respond(send, LEAVING)
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            problem = INTERNAL
        if problem and not exchange.status:
            self.transfers.drop(exchange.transfer)  # what has come of the body is of no use
            await respond(send, problem, partial(self._read_on, received, exchange))

    # -- what is refused before it is read ---------------------------------------------------------------------------

    def _check(self, scope: Scope, exchange: Exchange) -> None:
        """Raise Refused for a request that is not to be read."""
        headers, path, client = exchange.headers, scope["path"], exchange.client
        # Load balancers ask for the health without a host (HTTP/1.0), or by another name.
        known = self.access.token is not None or path == "/healthz" or _host(headers.get("host", "")) in self.access.hosts
        if not known:
            message = f"the host {headers.get('host', '')[:100]!r} is not this service."
            raise refuse(421, "WrongHost", message, f"Ask for it by {' or '.join(self.access.hosts)}.")
        # The page's own requests say same-origin or none. Another site's are refused before they cost anything.
        if headers.get("sec-fetch-site", "none") == "cross-site" and path != "/":
            raise Refused(CROSS_SITE)
        # What another port of the same host sends is not of another site, and may need no token.
        if scope["method"] == "POST" and path in WRITES and not _same_origin(headers):
            raise Refused(CROSS_SITE)
        admitted = self.access.admits(headers)
        if not admitted and path not in STATIC and path != "/healthz":
            # Guesses have a bucket of their own, so they empty none of a valid user of the same address.
            self._take(("missed", client), MISSED_TOKEN)
            if path != "/session":
                fix = "Send it: `Authorization: Bearer TOKEN`."
                raise refuse(401, "TokenMissing", "the request brings no valid token.", fix)
        elif cost := COSTS.get(path.lstrip("/").partition("/")[0]):
            self._take(client, cost)
        if path not in STATIC:
            self._check_parameters(scope["query_string"])
        if path not in FREE:
            self._check_flight(client)
        length = headers.get("content-length", "0")
        if not length.isdigit() or len(length) > 20 or int(length) > self._largest(path):
            raise self._too_large(path)
        # An endpoint that finds a request to cost more charges the rest; with what has been paid it fits into a full
        # bucket.
        scope["charge"] = lambda more: self._take(client, min(more, self.limits.burst - 1))

    def _take(self, client: Any, cost: float) -> None:
        if wait := self.rates.take(client, cost, time.monotonic()):
            message = f"more than {self.limits.rate:g} requests a second."
            raise refuse(429, "TooManyRequests", message, f"Wait {wait:.1f} s.", max(1, round(wait + 0.5)))

    def _check_parameters(self, query: bytes) -> None:
        most = self.limits.parameters
        if query.count(b"&") >= most:
            raise refuse(400, "TooManyParameters", f"more than {most} parameters.", "Leave out what is none of ours.")
        names = Counter(name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True))
        for name, times in names.items():
            if times > 1 and name not in SEVERAL:
                message = f"{name[:100]!r} comes {times} times."
                raise refuse(400, "RepeatedParameter", message, "Give it once: only `where` and `within` may be repeated.")

    def _check_flight(self, client: str) -> None:
        if self.in_flight.total() >= self.limits.in_flight or self.in_flight[client] >= self.limits.client_in_flight:
            raise busy()

    @contextlib.contextmanager
    def _flying(self, client: str) -> Iterator[None]:
        """While a request is worked on. Raises Refused."""
        self._check_flight(client)
        self.in_flight[client] += 1
        self.metrics.in_flight.set(self.in_flight.total())
        try:
            yield
        finally:
            self.in_flight[client] -= 1
            if not self.in_flight[client]:
                del self.in_flight[client]
            self.metrics.in_flight.set(self.in_flight.total())

    # -- what is sent, worked on, taken ------------------------------------------------------------------------------

    async def _body(self, receive: Any, exchange: Exchange, path: str) -> bytes:
        """The whole body, as long as it keeps coming. Raises Refused, ClientLeft."""
        limits, transfer, now = self.limits, exchange.transfer, asyncio.get_running_loop().time
        parts: list[bytes] = []
        counted = 0  # of what has moved, when the client was last found fast enough

        def give_up() -> None:
            with contextlib.suppress(RuntimeError):  # it has run out of time in this very moment
                pace.reschedule(now())

        try:
            async with asyncio.timeout(limits.stalled_s) as pace:
                with self.transfers.moving(transfer, give_up, uploading=True):
                    while True:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise ClientLeft
                        parts.append(message.get("body", b""))
                        if transfer.moved + len(parts[-1]) > self._largest(path):
                            raise self._too_large(path)
                        self.transfers.hold(transfer, len(parts[-1]))
                        self.transfers.move(transfer, len(parts[-1]))
                        if not message.get("more_body", False):
                            return b"".join(parts)
                        if transfer.moved - counted >= limits.stalled_bytes:
                            counted = transfer.moved
                            pace.reschedule(now() + limits.stalled_s)
        except TimeoutError:
            said = f"the request arrives too slowly: {limits.stalled_bytes:,} bytes are wanted each {limits.stalled_s:g} s."
            raise refuse(408, "TooSlow", said, "Send it at once.") from None

    async def _read_on(self, receive: Any, exchange: Exchange) -> None:
        """Drop what still comes of the body of a request that has been answered. A connection that were closed before would be
        reset, and the answer lost to a client that is sending."""
        left = self.limits.body_bytes
        exchange.linger()
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):  # the latter when the service is stopped
            async with asyncio.timeout(self.limits.stalled_s):
                while left > 0 and not exchange.arrived:
                    left -= len((await receive()).get("body", b""))

    async def _work(self, scope: Scope, body: bytes, receive: Any, send: Any, exchange: Exchange) -> None:
        """Let the application answer, for as long as the client is there. Raises what it raises, and ClientLeft."""
        leaving = asyncio.ensure_future(_left(receive))
        whole: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def received() -> Any:
            if not whole:
                await asyncio.shield(leaving)
            return whole.pop() if whole else {"type": "http.disconnect"}

        answering = asyncio.ensure_future(self.app(scope, received, send))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not exchange.complete and not answering.done():
                answering.cancel()  # drops what waits for a thread; what runs is not waited for
                await asyncio.wait((answering,))
            if answering.cancelled():
                raise ClientLeft
            await answering
            if exchange.refused:
                raise exchange.refused
        finally:
            answering.cancel()
            leaving.cancel()

    async def _send(self, message: Any, exchange: Exchange) -> None:
        """Hand on a part of an answer, in pieces that wait until the client has taken those before."""
        if message["type"] == "http.response.start":
            length = next((int(value) for name, value in message["headers"] if name == b"content-length"), 0)
            try:
                if length > PIECE:
                    self.transfers.hold(exchange.transfer, length)
            except Refused as refused:
                exchange.refused = refused
                return
            exchange.flight.close()
            exchange.status = message["status"]
            try:
                await exchange.send(message | {"headers": _with_headers(message["headers"])})
            except LocalProtocolError as error:  # what followed the headers was no HTTP: uvicorn has answered and closed
                raise ClientLeft from error
            return
        if exchange.refused and not exchange.status:
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        with self.transfers.moving(exchange.transfer, exchange.abort):
            for start in range(0, len(body), PIECE):
                piece, rest = body[start : start + PIECE], start + PIECE < len(body)
                await exchange.send({"type": "http.response.body", "body": piece, "more_body": rest or more})
                self.transfers.move(exchange.transfer, len(piece))
        if not body:
            await exchange.send(message)
        exchange.complete = not more

    def _largest(self, path: str) -> int:
        """Bytes of a body."""
        return self.limits.json_bytes if path in WRITES else self.limits.body_bytes

    def _too_large(self, path: str) -> Refused:
        message = f"the request is larger than {self._largest(path):,} bytes."
        fix = "Send less." if path in WRITES else f"Send an image of at most {self.limits.image_bytes:,} bytes."
        return refuse(413, "TooLarge", message, fix)


async def _left(receive: Any) -> None:
    """Return when the client has left, or the answer is complete; what still arrives is dropped."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(send: Any, problem: Problem, before_the_end: Callable[[], Awaitable[None]] | None = None) -> None:
    """Answer with a problem. The client has all of it before the connection may end."""
    body = json.dumps(problem.body()).encode()
    said = {"content-type": "application/json", "content-length": str(len(body))} | problem.headers()
    headers = [(name.encode(), value.encode()) for name, value in said.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": before_the_end is not None})
    if before_the_end is not None:
        await before_the_end()
        await send({"type": "http.response.body", "body": b""})


def _joined(headers: Any) -> dict[str, str]:
    """Headers by name; one that comes in several lines is one list."""
    found: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        separator = "; " if name == "cookie" else ", "
        found[name] = f"{found[name]}{separator}{value}" if name in found else value
    return found


def _with_headers(headers: Any) -> list[tuple[bytes, bytes]]:
    present = {name.lower() for name, _ in headers}
    added = HEADERS if b"cache-control" in present else HEADERS | {"cache-control": "no-store"}
    return [*headers, *((name.encode(), value.encode()) for name, value in added.items())]


def _same_origin(headers: dict[str, str]) -> bool:
    """Whether a browser says that our own page asks, or that nothing does but its user; other clients say nothing."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site in ("same-origin", "none")
    # A browser says no more than its origin to a service of another machine without TLS.
    return origin is None or origin.partition("://")[2].lower() == headers.get("host", "").lower()


def _host(header: str) -> str:
    """A Host header without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()
