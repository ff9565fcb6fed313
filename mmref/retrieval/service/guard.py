"""What every request passes before it is answered: host, token, rate, size, time; and what every answer carries."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any

from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.metrics import Metrics
from mmref.retrieval.service.problems import INTERNAL, Problem, Refused, refuse

log = logging.getLogger(__name__)

COOKIE = "mmref"
OPEN = ("/", "/page.css", "/page.js", "/icon.svg", "/healthz", "/session")  # need no token: they hold no data
COSTS = {"/search": 1.0, "/explain": 5.0, "/session": 5.0}  # of the rate; an explanation encodes an image 50 times
MISSED_TOKEN = 5.0
CLIENTS = 10_000  # addresses whose rate is kept
LOOPBACK = ("127.0.0.1", "localhost", "::1")
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

Scope = dict[str, Any]


@dataclass(frozen=True)
class Access:
    """Who may ask. Without a token only this machine may, and only by the names of loopback: a page of another site
    whose name is made to point at 127.0.0.1 is refused."""

    token: str | None = None
    hosts: tuple[str, ...] = LOOPBACK  # accepted in the Host header where there is no token

    def cookie(self) -> str:
        """What a browser keeps instead of the token."""
        return hmac.new((self.token or "").encode(), b"mmref page", hashlib.sha256).hexdigest()

    def accepts(self, token: str) -> bool:
        """Whether it is the token."""
        return self.token is not None and hmac.compare_digest(token.encode(), self.token.encode())

    def admits(self, headers: dict[str, str]) -> bool:
        """Whether a request brings the token, or the cookie given for it."""
        if self.token is None:
            return True
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.accepts(value.strip()):
            return True
        try:
            cookies = SimpleCookie(headers.get("cookie", ""))
        except CookieError:
            return False
        return COOKIE in cookies and hmac.compare_digest(cookies[COOKIE].value.encode(), self.cookie().encode())


class Rates:
    """A bucket of tokens for each client, filled at `rate` a second up to `burst`."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> left, when

    def take(self, client: str, cost: float, now: float) -> float:
        """Take from a client's bucket; seconds to wait where there is not enough, else 0."""
        if not self.rate:
            return 0.0
        left, then = self._buckets.pop(client, (self.burst, now))
        left = min(self.burst, left + self.rate * (now - then))
        wait = max(0.0, (cost - left) / self.rate)
        self._buckets[client] = (left if wait else left - cost, now)
        while len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return wait


@dataclass
class Exchange:
    """One request on its way: what has come in, and whether an answer has begun."""

    began: float
    received: int = 0
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)


class Guard:
    """ASGI middleware around the application."""

    def __init__(self, app: Any, access: Access, limits: Limits, metrics: Metrics) -> None:
        self.app, self.access, self.limits, self.metrics = app, access, limits, metrics
        self.rates = Rates(limits.rate, limits.burst)
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        exchange = Exchange(time.perf_counter(), headers=headers)
        self.in_flight += 1
        self.metrics.in_flight.set(self.in_flight)
        try:
            await self._answer(scope, receive, send, exchange)
        finally:
            self.in_flight -= 1
            self.metrics.in_flight.set(self.in_flight)
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(exchange.status or 499)).inc()  # 499: the client left first
            self.metrics.seconds.labels(route).observe(time.perf_counter() - exchange.began)

    async def _answer(self, scope: Scope, receive: Any, send: Any, exchange: Exchange) -> None:
        async def guarded_send(message: Any) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = _with_headers(message["headers"])
            await send(message)

        async def guarded_receive() -> Any:
            return await self._receive(receive, exchange)

        try:
            self._check(scope, exchange)
            await self.app(scope, guarded_receive, guarded_send)
        except Refused as refused:
            if not exchange.status:
                await respond(guarded_send, refused.problem)
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            if not exchange.status:
                await respond(guarded_send, INTERNAL)

    def _check(self, scope: Scope, exchange: Exchange) -> None:
        """Raise Refused for a request that is not to be read."""
        headers, path = exchange.headers, scope["path"]
        client = (scope.get("client") or ("local",))[0]
        if self.access.token is None and _host(headers.get("host", "")) not in self.access.hosts:
            message = f"the host {headers.get('host', '')[:100]!r} is not this service."
            raise refuse(421, "WrongHost", message, f"Ask for it by {' or '.join(self.access.hosts)}.")
        # the page's own requests say same-origin or none; another site's are refused before they cost anything
        if headers.get("sec-fetch-site", "none") == "cross-site" and path != "/":
            raise refuse(403, "CrossSite", "the request comes from another site.", "Open the page of the service.")
        if path not in OPEN and not self.access.admits(headers):
            self._take(client, MISSED_TOKEN)
            raise refuse(
                401, "TokenMissing", "the request brings no valid token.", "Send it: `Authorization: Bearer TOKEN`."
            )
        if self.in_flight > self.limits.in_flight:
            raise refuse(429, "Busy", "too many requests are being answered.", "Ask again in a moment.", 1)
        if cost := COSTS.get(path):
            self._take(client, cost)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.limits.body_bytes:
            raise self._too_large()

    def _take(self, client: str, cost: float) -> None:
        if wait := self.rates.take(client, cost, time.monotonic()):
            message = f"more than {self.limits.rate:g} requests a second."
            raise refuse(429, "TooManyRequests", message, f"Wait {wait:.1f} s.", max(1, round(wait + 0.5)))

    async def _receive(self, receive: Any, exchange: Exchange) -> Any:
        """The next part of a body, up to the limits of size and time."""
        left = self.limits.timeout_s - (time.perf_counter() - exchange.began)
        try:
            message = await asyncio.wait_for(receive(), max(left, 0.001))
        except TimeoutError:
            message = f"the request has not arrived within {self.limits.timeout_s:g} s."
            raise refuse(408, "TooSlow", message, "Send it at once.") from None
        exchange.received += len(message.get("body", b""))
        if exchange.received > self.limits.body_bytes:
            raise self._too_large()
        return message

    def _too_large(self) -> Refused:
        message = f"the request is larger than {self.limits.body_bytes:,} bytes."
        return refuse(413, "TooLarge", message, f"Send an image of at most {self.limits.image_bytes:,} bytes.")


async def respond(send: Any, problem: Problem) -> None:
    """Answer with a problem."""
    body = json.dumps(problem.body()).encode()
    said = {"content-type": "application/json", "content-length": str(len(body))} | problem.headers()
    headers = [(name.encode(), value.encode()) for name, value in said.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _with_headers(headers: Any) -> list[tuple[bytes, bytes]]:
    present = {name.lower() for name, _ in headers}
    added = HEADERS if b"cache-control" in present else HEADERS | {"cache-control": "no-store"}
    return [*headers, *((name.encode(), value.encode()) for name, value in added.items())]


def _host(header: str) -> str:
    """A Host header without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()
