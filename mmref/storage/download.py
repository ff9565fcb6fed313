"""Images behind http(s) URLs, within a size, a time, and the addresses that a table may lead to.

Whoever wrote a table may not be a friend, nor may the hosts that it names. A cell may name a host of one's own network; where
a host of the internet leads on into it, nothing is asked. What is connected to is the address that was looked at, whatever the
name resolves to a moment later.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import ipaddress
import os
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, cast
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from mmref.errors import SampleError
from mmref.storage.secrets import told, without_user
from mmref.version import __version__

MAX_BYTES = 64_000_000  # of one image; a photograph of 100 megapixels has about 50 million
DEADLINE_S = 60.0  # of one image with all attempts, however slowly it comes
TIMEOUT_S = 30.0  # without a byte
REDIRECTS = 5
ATTEMPTS, PAUSE_S = 3, 0.5  # the pause doubles
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # answers that may be another one in a moment
MOVED = {301, 302, 303, 307, 308}
KEPT = "%/:?[]@!$&'()*+,;=~|"  # in a URL; a browser leaves them too
PIECE = 1 << 18
NOT_FOR_TRAINING = {"noai", "noimageai", "noindex", "noimageindex"}  # of X-Robots-Tag, as img2dataset takes them
IPV4_IN_IPV6 = ipaddress.IPv6Network("64:ff9b::/96")  # how networks of IPv6 alone reach IPv4


@dataclass(frozen=True)
class Terms:
    """On what terms images are fetched."""

    user_agent: str = f"mmref/{__version__}"
    max_bytes: int | None = None  # of one image; None: MAX_BYTES
    for_training: bool = False  # leave out what its host does not give for that, by X-Robots-Tag


def quoted(url: str) -> str:
    """An http(s) URL as a browser sends it: spaces and letters beyond ASCII quoted, the rest as it is. Raises ValueError."""
    parts = urlsplit(url.strip())
    user, at, host = parts.netloc.rpartition("@")
    host = host if host.isascii() else host.encode("idna").decode()
    path, query = quote(parts.path.replace("\\", "/"), safe=KEPT), quote(parts.query, safe=KEPT)
    return urlunsplit((parts.scheme, quote(user, safe=KEPT) + at + host, path, query, ""))


def download(url: str, terms: Terms = Terms()) -> bytes:
    """Body of an http(s) URL; what may pass is tried again, when its host says so. Messages leave out user, password and query,
    which may be keys.

    Raises:
        SampleError: a page instead of an image, one that is too large or not given for this, or a way that is not taken.
        OSError: it does not come.
    """
    name = told(url)
    try:
        sent = quoted(url)
        host = urlsplit(without_user(sent)).netloc
    except ValueError as error:
        raise SampleError(f"{name} is no URL: {error}") from None
    with _Deadline() as deadline:
        for attempt in range(ATTEMPTS):
            try:
                PAUSES.wait(host, deadline)
                data = _follow(sent, deadline, terms)
                deadline.left()  # a connection that was ended may look like the end of the image
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                if deadline.passed:
                    raise OSError(f"{name} cannot be fetched: it has not come within {DEADLINE_S:g} s") from None
                lasting = isinstance(error, ValueError | http.client.InvalidURL) or (
                    isinstance(error, urllib.error.HTTPError) and error.code not in TRY_AGAIN
                )
                if lasting or attempt == ATTEMPTS - 1:
                    raise OSError(f"{name} cannot be fetched: {error}") from error
                if isinstance(error, urllib.error.HTTPError) and (pause_s := _retry_after(error.headers)):
                    PAUSES.ask(host, pause_s)
                time.sleep(PAUSE_S * 2**attempt)
    if re.match(rb"\s*(<!doctype html|<html)", data[:200], re.IGNORECASE):
        raise SampleError(f"{name} is a web page, not an image: it may ask for a login, or show the image")
    return data


class _Pauses:
    """Until when hosts ask not to be asked: a host that is asked too often says so once, and all threads wait."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def ask(self, host: str, seconds: float) -> None:
        """Leave a host alone for so long."""
        self._until[host] = max(self._until.get(host, 0.0), time.monotonic() + seconds)

    def wait(self, host: str, deadline: _Deadline) -> None:
        """Wait until a host may be asked. Raises TimeoutError where that is behind the deadline."""
        left = self._until.get(host, 0.0) - time.monotonic()
        if left > deadline.left():
            deadline.passed = True
            raise TimeoutError("its host asks to wait")
        if left > 0:
            time.sleep(left)


PAUSES = _Pauses()


def _retry_after(headers: Message) -> float:
    """Seconds for which a host asks to be left alone, as a number or a date; 0 where it does not."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _not_for_training(headers: Message, user_agent: str) -> str:
    """The directive of an X-Robots-Tag that keeps an image from being trained on, "" where there is none. It holds for all, or
    for those whom it names: `botname: noai, noindex`."""
    own = user_agent.partition("/")[0].strip().lower()
    for value in headers.get_all("X-Robots-Tag", []):
        named, colon, directives = value.lower().rpartition(":")
        if colon and named.strip() != own:
            continue
        if found := next((d.strip() for d in directives.split(",") if d.strip() in NOT_FOR_TRAINING), ""):
            return found
    return ""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet: not of this machine, a private network, a link, a group, or reserved."""
    ip = _plain(address)
    return ip.is_global and not (ip.is_multicast or ip.is_reserved)


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address, or the IPv4 address that one of IPv6 stands for."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv4Address):
        return ip
    translated = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in IPV4_IN_IPV6 else None
    return ip.ipv4_mapped or ip.sixtofour or (ip.teredo or (None, None))[1] or translated or ip


def _follow(url: str, deadline: _Deadline, terms: Terms) -> bytes:
    """Body of a URL, or of what it leads to."""
    gate = _Gate(deadline, terms.user_agent)
    for _ in range(1 + REDIRECTS):
        try:
            with gate.open(url) as answer:
                if terms.for_training and (said := _not_for_training(answer.headers, terms.user_agent)):
                    raise SampleError(f"{told(url)} is not given for training (X-Robots-Tag: {said})")
                return _body(url, answer, MAX_BYTES if terms.max_bytes is None else terms.max_bytes)
        except urllib.error.HTTPError as error:
            error.close()
            location = error.headers.get("Location")
            if error.code not in MOVED or not location:
                raise
            url = _next(url, location)
    raise SampleError(f"{told(url)} is the end of {REDIRECTS} redirects, and leads on")


def _next(url: str, location: str) -> str:
    """Where a redirect leads. Raises SampleError for what is no http(s) URL, and for one that gives up encryption."""
    # Headers are bytes in Latin-1, whatever was meant.
    target = quoted(urljoin(url, quote(location.strip(), safe=f"{KEPT}#", encoding="latin-1", errors="replace")))
    scheme = urlsplit(target).scheme
    if scheme not in ("http", "https") or (scheme == "http" and url.startswith("https:")):
        raise SampleError(f"{told(url)} leads to {scheme}://, which is not followed")
    return target


def _body(url: str, answer: Any, most: int) -> bytes:
    """What comes, in pieces. Raises SampleError where it is too much."""
    data = bytearray()
    while (answer.length or 0) + len(data) <= most and (piece := answer.read(PIECE)):
        data += piece
    if (answer.length or 0) + len(data) > most:
        fix = "Save it and name the file instead"
        raise SampleError(f"{told(url)} is larger than the {most:,} bytes that are fetched. {fix}")
    if answer.length:
        raise http.client.IncompleteRead(bytes(data[:0]), answer.length)
    return bytes(data)


class _Deadline:
    """The time that a download has: when it has passed, connections end, whatever waits for them."""

    def __init__(self) -> None:
        self.passed = False
        self.until = time.monotonic() + DEADLINE_S
        self._held: list[socket.socket] = []

    def __enter__(self) -> _Deadline:
        WATCH.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        WATCH.drop(self)
        for held in self._held:
            held.close()

    def left(self) -> float:
        """Seconds that are left. Raises TimeoutError where there are none."""
        left = self.until - time.monotonic()
        self.passed = self.passed or left <= 0
        if self.passed:
            raise TimeoutError("timed out")
        return left

    def hold(self, connection: socket.socket) -> None:
        """End a connection when the time has passed."""
        self._held.append(connection.dup())  # TLS takes the socket over
        self.left()

    def end(self) -> None:
        """End all connections."""
        self.passed = True
        for held in list(self._held):
            with contextlib.suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)


class _Watch:
    """One thread that ends what has passed its deadline. A thread for each download would cost as much as the download."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._running: set[_Deadline] = set()
        self._thread: threading.Thread | None = None
        self._wakes = 0.0  # when the thread looks again

    def add(self, deadline: _Deadline) -> None:
        """Watch a deadline."""
        with self._change:
            self._running.add(deadline)
            if self._thread is None or not self._thread.is_alive():  # as in a process that was forked off
                self._thread = threading.Thread(target=self._watch, name="download deadlines", daemon=True)
                self._thread.start()
            elif deadline.until < self._wakes:
                self._change.notify()

    def drop(self, deadline: _Deadline) -> None:
        """Watch it no more."""
        with self._change:
            self._running.discard(deadline)

    def _watch(self) -> None:
        with self._change:
            while True:
                now = time.monotonic()
                for deadline in [each for each in self._running if each.until <= now]:
                    self._running.discard(deadline)
                    deadline.end()
                self._wakes = min((each.until for each in self._running), default=now + DEADLINE_S)
                self._change.wait(self._wakes - now)


WATCH = _Watch()


class _Gate:
    """Opens the URLs of one way, from the cell's own to the last that it leads to."""

    def __init__(self, deadline: _Deadline, user_agent: str) -> None:
        self._deadline, self._user_agent = deadline, user_agent
        self._logins: dict[tuple[str, str], str] = {}  # of schemes and hosts of the way: each is for that host alone
        self._private = True  # whether the way may go where the internet does not: it begins anywhere
        self._addresses: list[Any] | None = None  # of the host, as of getaddrinfo; None where a proxy asks it

    def open(self, url: str) -> Any:
        """The answer of a URL. Raises SampleError where it leads to an address that is not asked, OSError, ValueError."""
        user, _, host = urlsplit(url).netloc.rpartition("@")
        parts = urlsplit(url)._replace(netloc=host)
        if not parts.hostname:
            raise SampleError(f"{told(url)} is no URL: it names no host")
        proxy = _proxy(parts.scheme)
        proxied = bool(proxy) and not urllib.request.proxy_bypass(host)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except OSError:
            if not proxied:
                raise
            found = []  # often only the proxy knows names beyond its network; it also decides where they lead
        allowed = [each for each in found if self._is_open(str(each[4][0]))]
        if found and not allowed:
            raise SampleError(f"{told(url)} lies at {found[0][4][0]}, inside a network: {self._why()}")
        self._addresses = None if proxied else allowed
        if proxied:
            self._private = self._private and any(not is_public(str(each[4][0])) for each in allowed)
        headers = {"User-Agent": self._user_agent, "Accept": "*/*"}
        if user:
            self._logins[parts.scheme, host] = _login(user)
        if (parts.scheme, host) in self._logins:
            headers["Authorization"] = self._logins[parts.scheme, host]
        request = _Request(urlunsplit(parts), headers=headers)
        request.gate = self
        return _opener(parts.scheme, proxy if proxied else None).open(request, timeout=TIMEOUT_S)

    def connect(self, address: tuple[str, int], *_: Any) -> socket.socket:
        """A connection to an address that has been looked at, or to the proxy. Raises OSError."""
        if self._addresses is None:
            connection = socket.create_connection(address, min(TIMEOUT_S, self._deadline.left()))
            self._deadline.hold(connection)
            return connection
        failure: OSError | None = None
        for family, kind, protocol, _name, target in self._addresses:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(min(TIMEOUT_S, self._deadline.left()))
                connection.connect(target)
                connection.settimeout(TIMEOUT_S)
                self._deadline.hold(connection)
            except OSError as error:
                connection.close()
                failure = error
                continue
            self._private = self._private and not is_public(str(target[0]))
            return connection
        raise failure or OSError(f"{address[0]} has no address")

    def _is_open(self, address: str) -> bool:
        """Whether an address may be asked; one of a link never is: clouds tell a machine's own secrets there."""
        return (self._private or is_public(address)) and not _plain(address).is_link_local

    def _why(self) -> str:
        return "no image does" if self._private else "a host of the internet may not lead there"


def _login(user: str) -> str:
    """The header for `user:password`, as a URL has it."""
    name, _, password = user.partition(":")
    return "Basic " + base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()


class _Request(urllib.request.Request):
    gate: _Gate  # which makes its connection


class _Plain(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(functools.partial(_connection, http.client.HTTPConnection, cast(_Request, request)), request)


class _Secure(urllib.request.HTTPSHandler):
    def __init__(self) -> None:
        super().__init__()
        # Reading the certificates that are trusted takes longer than a download.
        self._trusted = ssl.create_default_context()
        self._trusted.set_alpn_protocols(["http/1.1"])

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(
            functools.partial(_connection, http.client.HTTPSConnection, cast(_Request, request), context=self._trusted),
            request,
        )


@functools.lru_cache(8)
def _opener(scheme: str, proxy: str | None) -> urllib.request.OpenerDirector:
    """What opens the URLs of a scheme, by a proxy or straight; it follows no redirects."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler({scheme: proxy} if proxy else {}),
        _Plain(),
        _Secure(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener


def _proxy(scheme: str) -> str | None:
    """The proxy of a scheme, if there is one; most often one look says that there is none."""
    name = f"{scheme}_proxy"
    return urllib.request.getproxies().get(scheme) if os.environ.get(name) or os.environ.get(name.upper()) else None


def _connection(kind: type[http.client.HTTPConnection], request: _Request, host: str, **options: Any) -> Any:
    """A connection of the standard library that the request's gate makes; names of certificates are checked as ever."""
    connection = kind(host, **options)
    connection._create_connection = request.gate.connect  # type: ignore[attr-defined]
    return connection
