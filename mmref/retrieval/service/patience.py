"""Connections: how many of one client and of all, and those that are given up because nothing moves on them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmref.retrieval.service.access import Access
from mmref.retrieval.service.limits import Limits

PART = 8192  # bytes that are looked at together
CHUNK = 64  # bytes of a body that a line's end is worth
FRAMING = 65_536  # bytes that may be missing from that


class Connections:
    """Those of one service. Where there are too many, the one that has waited longest for a request (to begin, or to be
    sent as far as the end of its headers) makes room; where none waits, the newcomer does."""

    def __init__(self, limits: Limits, access: Access) -> None:
        self.limits, self.access = limits, access
        # Connections are kept in the order in which they came, since clocks of loops are coarse.
        self._open: dict[str | None, dict[PatientProtocol, None]] = defaultdict(dict)
        self._count = 0

    def add(self, connection: PatientProtocol) -> None:
        """Count one, and make room."""
        mine = self._open[connection.peer]
        mine[connection] = None
        self._count += 1
        if connection.peer is not None and len(mine) > self.limits.client_connections:
            self._give_up(mine, connection)
        elif self._count > self.limits.connections:
            self._give_up(max(self._open.values(), key=len), connection)

    def remove(self, connection: PatientProtocol) -> None:
        """Count one no longer."""
        mine = self._open[connection.peer]
        if connection in mine:
            del mine[connection]
            self._count -= 1
        if not mine:
            del self._open[connection.peer]

    def _give_up(self, among: dict[PatientProtocol, None], newcomer: PatientProtocol) -> None:
        waiting = [c for c in among if c.waiting_since is not None and c is not newcomer]
        # A connection that has begun to send goes before one that is kept for the next request of a client.
        chosen = min(waiting, key=lambda c: (c.kept, c.waiting_since), default=newcomer)
        self.remove(chosen)
        chosen.transport.abort()


class PatientProtocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, which alone would wait for ever. Bodies are timed by the guard.

    Args:
        open_connections: of the service.
    """

    def __init__(self, open_connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.open_connections = open_connections
        self.peer: str | None = None
        self.waiting_since: float | None = None  # for headers; None while a request is answered
        self._given_up: asyncio.TimerHandle | None = None  # unless headers are whole by then
        self._unread: asyncio.TimerHandle | None = None  # unless more of an answer has been taken by then

    @classmethod
    def of(cls, limits: Limits, access: Access) -> partial[PatientProtocol]:
        """What uvicorn makes a connection with."""
        return partial(cls, Connections(limits, access))

    @property
    def kept(self) -> bool:
        """Whether it has brought a request, and none has begun since."""
        return self.cycle is not None and not self._has_begun

    def connection_made(self, transport: Any) -> None:
        # The guard may have to end the connection of an answer that is not taken, and knows of requests that are refused.
        self.app_state = self.app_state | {"abort": transport.abort, "linger": self.linger}
        super().connection_made(transport)
        self.peer = self.open_connections.access.peer(self.client[0] if self.client else "local")
        self._has_begun, self._framing = False, 0
        self._wait()
        self.open_connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open_connections.remove(self)
        self._stop_waiting()
        self._stop_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PART):
            if self.transport.is_closing():
                return
            self._received(data[start : start + PART])

    def _received(self, data: bytes) -> None:
        if self._given_up is None and not self._answering():
            self._wait()
        self._has_begun = True
        if self._answering() and self._is_framing(data):
            self.transport.abort()
            return
        super().data_received(data)
        if self._given_up is not None and self._answering():
            self._stop_waiting()  # headers are whole: the request is being answered

    def linger(self) -> None:
        """The request is refused. What still comes of it is read, but the connection makes room as one that waits does."""
        self.waiting_since = self.loop.time()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # the request is being answered, or was
            self.transport.abort()

    def on_response_complete(self) -> None:
        self._has_begun, self._framing = False, 0
        super().on_response_complete()
        waits = not self._answering() and not self.transport.is_closing()
        self.waiting_since = self.loop.time() if waits else None
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.open_connections.limits.stalled_s, self._give_up_last, self.cycle)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.open_connections.limits.stalled_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_unread()

    def _is_framing(self, data: bytes) -> bool:
        """Whether a body comes in chunks of a few bytes, each of which costs as much as a large one."""
        if (b"transfer-encoding", b"chunked") not in self.headers:
            return False
        self._framing += CHUNK * data.count(b"\r\n") - len(data)
        return self._framing > FRAMING

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self.waiting_since = self.loop.time()
        self._given_up = self.loop.call_later(self.open_connections.limits.headers_s, self.transport.abort)

    def _stop_waiting(self) -> None:
        self.waiting_since = None
        if self._given_up is not None:
            self._given_up.cancel()
            self._given_up = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _give_up_last(self, cycle: object) -> None:
        """End a connection whose last answer is complete and has not been taken."""
        if self.cycle is cycle and self.transport.get_write_buffer_size():
            self.transport.abort()
