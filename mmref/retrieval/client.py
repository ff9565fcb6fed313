"""Asking a running service instead of opening an index: nothing of the model is loaded, or imported."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from mmref.errors import QueryError, SampleError, ServiceError, StorageError, UsageError
from mmref.retrieval.results import Answer, ObjectResult, Query, Result
from mmref.storage.locations import is_loopback

TIMEOUT_S = 75.0  # more than the service gives itself for an answer
AT_ONCE = 8  # searches of a batch, which the service encodes and ranks together
PATIENCE_S = 120.0  # while it says that it is busy
NAMED = 40  # characters of a query that an error shows
TOKEN = "MMREF_TOKEN"  # variable that may hold the token, as of `mmref serve`


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A service leads nowhere else, and the token is for no other host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class _Connection(http.client.HTTPConnection):
    """A service that reads no further has said why: its answer is read although not all could be sent."""

    def send(self, data: Any) -> None:
        if self.sock is None:
            self.connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            super().send(data)


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request)


class ServiceClient:
    """A service of `mmref serve`. Thread-safe.

    Args:
        url: where its page is: http://HOST:PORT.
        token: that it asks for; by default that of the environment.
        index: the name of one of its indexes; by default the first.

    Attributes:
        name, items: of the index, once it has answered.

    Raises:
        UsageError: no URL of a service, or no text that a header can hold.
    """

    def __init__(self, url: str, token: str | None = None, index: str | None = None) -> None:
        if not url.isascii():
            fix = "write those of its host as xn--..., and those of its path as %XX."
            raise UsageError(f"--url {url} has letters that no address holds as they are: {fix}")
        if not _is_address(url):
            raise UsageError(f"--url {url} is no address of a service: give it as http://HOST:PORT.")
        self.url, self.index = url.rstrip("/"), index
        self.token = (os.environ.get(TOKEN, "") if token is None else token).strip()
        if not self.token.isascii() or (self.token and not self.token.isprintable()):
            raise UsageError("the token is no plain text: it has letters, digits and signs of ASCII.")
        self.name, self.items = index or "", 0
        proxy = _proxy(self.url)
        self._place = f"{self.url} (by the proxy {proxy.rpartition('@')[2]})" if proxy else self.url
        proxies = urllib.request.ProxyHandler({urlsplit(url).scheme: proxy} if proxy else {})
        self._opener = urllib.request.build_opener(_NoRedirects, _Plain, proxies)

    def search_many(self, queries: Sequence[Query], asked: Mapping[str, Any]) -> list[Answer]:
        """The answer to each query.

        Args:
            asked: further fields of a search as the service takes them (`GET /openapi.json`); those that are None are left out.

        Raises:
            ServiceError: what the service says, or that none answers. QueryError: an image of a query that cannot be read.
        """
        shared = {name: value for name, value in asked.items() if value is not None} | self._named()
        if len(queries) == 1:
            return [self._search(queries[0], shared)]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(lambda at: self._search_one_of(queries, at, shared), range(len(queries))))

    def _search_one_of(self, queries: Sequence[Query], at: int, shared: Mapping[str, Any]) -> Answer:
        """The answer to one of many queries; an error says which."""
        try:
            return self._search(queries[at], shared)
        except ServiceError as error:
            name = (queries[at].text or "")[:NAMED]
            raise ServiceError(f"query {at + 1} of {len(queries)} ({name!r}): {error}") from None

    def _search(self, query: Query, shared: Mapping[str, Any]) -> Answer:
        body = {**shared, "text": query.text}
        if query.image is not None:
            body |= {"image": base64.b64encode(_read_image(str(query.image))).decode(), "image_weight": query.image_weight}
        data = self._ask("/search", json.dumps(body).encode())
        kind: Any = ObjectResult if shared.get("by") == "object" else Result
        try:
            answer = json.loads(data)
            self.name, self.items = answer["index"], answer["items"]
            return Answer([kind.of(one) for one in answer["results"]], answer["close_match"])
        except (ValueError, KeyError, TypeError):
            raise ServiceError(f"{self.url} answers, but not as `mmref serve` of this version does.") from None

    def thumbnail(self, item_id: str) -> bytes:
        """WebP of an item. Raises ServiceError."""
        return self._ask(f"/thumbnail/{quote(item_id, safe='')}?{urlencode({'index': self.name})}")

    def check_judging(self, text: str) -> None:
        """Raise ServiceError where nobody may judge what a sentence finds."""
        self._ask(f"/judgements?{urlencode({'text': text} | self._named())}")

    def judge(self, text: str, item_id: str, relevant: bool | None) -> None:
        """Say whether an item is right for a sentence; None takes it back. Raises ServiceError."""
        said = {"text": text, "id": item_id, "relevant": relevant} | self._named()
        self._ask("/judgements", json.dumps(said).encode())

    def _named(self) -> dict[str, str]:
        """The field that names the index, where the service does not choose it."""
        return {} if self.index is None else {"index": self.index}

    def _ask(self, target: str, body: bytes | None = None) -> bytes:
        """The body of an answer. Raises ServiceError."""
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        if body is not None:
            headers["content-type"] = "application/json"
        until = time.monotonic() + PATIENCE_S
        while True:
            request = urllib.request.Request(self.url + target, body, headers)
            try:
                with self._opener.open(request, timeout=TIMEOUT_S) as answer:
                    return bytes(answer.read())
            except urllib.error.HTTPError as error:
                with error:
                    wait = _wait_s(error)
                    if error.code != 429 or time.monotonic() + wait > until:
                        raise ServiceError(self._said(error)) from None
                time.sleep(wait)
            except (OSError, http.client.HTTPException) as error:
                why = getattr(error, "reason", None) or error
                raise ServiceError(f"{self._place} does not answer ({why}). Is `mmref serve` running there?") from None

    def _said(self, error: urllib.error.HTTPError) -> str:
        """What an answer says that is an error."""
        try:
            told = json.loads(error.read())
            message = f"{told['error']}: {told['message']} {told['fix']}"
        except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
            return f"{self._place} answers {error.code} ({error.reason}), not as `mmref serve` does."
        if error.code == 401:
            message += f" Give it with --token, or in ${TOKEN}."
        return f"{self.url} answers {message}"


def _is_address(url: str) -> bool:
    """Whether a service may have such a URL. What Python cannot split, or look up, is found here and not at the first request."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")
        return parts.scheme in ("http", "https") and bool(host) and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:  # brackets without an IPv6 address between them, empty parts of a host, a port that is none
        return False


def _proxy(url: str) -> str | None:
    """The proxy by which a service is asked. One of this machine is asked directly: the token is no proxy's to see."""
    parts = urlsplit(url)
    if is_loopback(parts.hostname or "") or urllib.request.proxy_bypass(parts.netloc):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _wait_s(error: urllib.error.HTTPError) -> float:
    """Seconds until it may be asked again."""
    given = error.headers.get("retry-after") or "1"
    return float(given) if given.isdigit() else 1.0


def _read_image(place: str) -> bytes:
    """A file, or what a URL leads to. Raises QueryError."""
    from mmref.storage.fetch import read_location

    try:
        return read_location(place)
    except (SampleError, StorageError, OSError) as error:
        raise QueryError(f"the image of the query cannot be used: {place} cannot be read: {error}.") from None
