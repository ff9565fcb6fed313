"""Who asks: tokens, cookies, addresses behind proxies, and how much each client has asked for."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TOKEN = "MMREF_TOKEN"  # variable that may hold it
LOOPBACK = ("127.0.0.1", "localhost", "::1")
CLIENTS = 10_000  # whose rate is kept
HOPS = 32  # of X-Forwarded-For that are looked at

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Access:
    """Who may ask. Without a token only this machine may, and only by the names of loopback: a page of another site
    whose name is made to point at 127.0.0.1 is refused."""

    token: str | None = None
    hosts: tuple[str, ...] = LOOPBACK  # accepted in the Host header where there is no token
    proxies: tuple[Network, ...] = ()  # whose word on the address of a client is taken

    @property
    def cookie_name(self) -> str:
        """Browsers keep one jar for all ports of a host: services of other tokens have other names in it."""
        return f"mmref-{self._derived(b'mmref cookie')[:12]}"

    def cookie(self) -> str:
        """What a browser keeps instead of the token."""
        return self._derived(b"mmref page")

    def _derived(self, purpose: bytes) -> str:
        return hmac.new((self.token or "").encode(), purpose, hashlib.sha256).hexdigest()

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
        name, expected = self.cookie_name, self.cookie().encode()
        return any(
            hmac.compare_digest(value.encode(), expected) for found, value in _cookies(headers.get("cookie", "")) if found == name
        )

    def client(self, peer: str, headers: dict[str, str]) -> str:
        """Who asks: the other end of the connection; where that is a proxy of ours, the last address before our proxies
        that the request says it came by. What stands further left is the client's own word and counts for nothing."""
        found = _address(peer)
        if found is None:
            return peer
        for hop in reversed(headers.get("x-forwarded-for", "").split(",")[-HOPS:]):
            before = _address(hop)
            if before is None or not self.trusts(found):
                break
            found = before
        return _one_client(found)

    def trusts(self, address: Address) -> bool:
        """Whether it is the address of a proxy of ours."""
        return any(address in network for network in self.proxies)

    def peer(self, address: str) -> str | None:
        """The client at the other end of a connection, None for a proxy of ours: it brings those of many."""
        found = _address(address)
        if found is None:
            return address
        return None if self.trusts(found) else _one_client(found)


def network(text: str) -> Network:
    """An address, or a range of them as 10.0.0.0/8. Raises ValueError."""
    return ipaddress.ip_network(text.strip(), strict=False)


def _address(text: str) -> Address | None:
    """An address, with a port or without."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def _one_client(address: Address) -> str:
    """A name for whoever has an address: of IPv6, providers give each customer 2^64."""
    return str(address) if address.version == 4 else str(ipaddress.ip_network((address, 64), strict=False))


def _cookies(header: str) -> Iterator[tuple[str, str]]:
    """Pairs of a Cookie header. http.cookies gives up the whole of it for one cookie of another service that it finds odd."""
    for pair in header.split(";"):
        name, _, value = pair.partition("=")
        yield name.strip(), value.strip().strip('"')


class Rates:
    """A bucket of tokens for each client, filled at `rate` a second up to `burst`."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self._buckets: OrderedDict[Any, tuple[float, float]] = OrderedDict()  # client -> left, when

    def take(self, client: Any, cost: float, now: float) -> float:
        """Take from a client's bucket; seconds to wait where there is not enough, else 0."""
        if not self.rate:
            return 0.0
        cost = min(cost, self.burst)  # or it would never be answered
        left, then = self._buckets.pop(client, (self.burst, now))
        left = min(self.burst, left + self.rate * (now - then))
        wait = max(0.0, (cost - left) / self.rate)
        self._buckets[client] = (left if wait else left - cost, now)
        while len(self._buckets) > CLIENTS:
            self._buckets.popitem(last=False)
        return wait
