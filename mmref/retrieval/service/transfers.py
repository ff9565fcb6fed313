"""Bodies that arrive and answers that are taken: how many, how many bytes of memory, and who is given up for others."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mmref.retrieval.service.counters import Counters
from mmref.retrieval.service.limits import Limits
from mmref.retrieval.service.problems import Refused, refuse

GRACE_S = 1.0  # a client that has been fast may rest for so long


@dataclass(eq=False)
class Transfer:
    """What one request holds. `give_up` ends it while the client is sending or taking, None while we work for it."""

    client: str
    held: int = 0  # bytes in memory
    uploading: bool = False
    give_up: Callable[[], None] | None = None
    moved: int = 0  # bytes since the client began to send, or to take
    fast_until: float = 0.0  # if nothing more moves


class Transfers:
    """All of them. Where room is short, the slowest of the client that holds the most is given up for the newcomer; where
    nobody is slow, the newcomer is refused."""

    def __init__(self, limits: Limits, metrics: Counters) -> None:
        self.limits, self.metrics = limits, metrics
        self._all: set[Transfer] = set()
        self._held: Counter[str] = Counter()  # bytes by client

    @contextlib.contextmanager
    def of(self, client: str) -> Iterator[Transfer]:
        """What a request holds until it is done with."""
        transfer = Transfer(client)
        self._all.add(transfer)
        try:
            yield transfer
        finally:
            self.drop(transfer)

    @contextlib.contextmanager
    def moving(self, transfer: Transfer, give_up: Callable[[], None], uploading: bool = False) -> Iterator[None]:
        """While the client sends, or takes. Raises Refused where too many send."""
        if uploading:
            self._admit(transfer.client)
        transfer.give_up, transfer.uploading = give_up, uploading
        transfer.moved, transfer.fast_until = 0, time.monotonic() + GRACE_S
        try:
            yield
        finally:
            transfer.give_up, transfer.uploading = None, False

    def move(self, transfer: Transfer, size: int) -> None:
        """Note that so many bytes have been sent or taken."""
        now = time.monotonic()
        transfer.moved += size
        # However much a system's buffers took at once, the last second counts.
        earned = max(transfer.fast_until, now) + size / self.limits.pressed_bytes_s
        transfer.fast_until = min(earned, now + GRACE_S)

    def hold(self, transfer: Transfer, size: int) -> None:
        """Count so many bytes more. Raises Refused."""
        if transfer not in self._all:  # given up a moment ago
            raise busy()
        client = transfer.client
        while self._held[client] + size > self.limits.client_bytes:
            self._make_room([t for t in self._all if t.client == client and t is not transfer])
        while self._held.total() + size > self.limits.bytes:
            self._make_room([t for t in self._all if t is not transfer])
        transfer.held += size
        self._count(client, size)

    def drop(self, transfer: Transfer) -> None:
        """Count it no longer."""
        self._all.discard(transfer)
        self._count(transfer.client, -transfer.held)
        transfer.held = 0

    def _admit(self, client: str) -> None:
        """Room for one more body. Raises Refused."""
        uploads = [t for t in self._all if t.uploading]
        theirs = [t for t in uploads if t.client == client]
        if len(theirs) >= self.limits.client_uploads:
            self._make_room(theirs)
        elif len(uploads) >= self.limits.uploads:
            self._make_room(uploads)

    def _make_room(self, among: list[Transfer]) -> None:
        """Give one up. Raises Refused."""
        now = time.monotonic()
        slow = [t for t in among if t.give_up and t.fast_until < now]
        if not slow:
            raise busy()
        theirs: Counter[str] = Counter()
        for t in slow:
            theirs[t.client] += t.held + 1
        heaviest = max(theirs, key=lambda client: theirs[client])
        slowest = min((t for t in slow if t.client == heaviest), key=lambda t: t.fast_until)
        assert slowest.give_up is not None
        slowest.give_up()
        self.drop(slowest)
        self.metrics.given_up.inc()

    def _count(self, client: str, size: int) -> None:
        self._held[client] += size
        if not self._held[client]:
            del self._held[client]
        self.metrics.held.set(self._held.total())


def busy() -> Refused:
    """More than this service holds at once."""
    return refuse(429, "Busy", "too many requests are being answered.", "Ask again in a moment.", 1)
