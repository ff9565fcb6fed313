"""Connections that are given up: clients that send a request, or take an answer, too slowly."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_S = 15.0  # from the first byte of a request, or the connection, to the end of its headers
ANSWER_S = 60.0  # to take an answer that is complete


class PatientProtocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, which alone would wait for ever. Bodies are timed by the guard."""

    def connection_made(self, transport: Any) -> None:
        self._waiting: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()  # headers are whole: the request is being answered
        elif self._waiting is None and not self.transport.is_closing():
            self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(ANSWER_S, self._give_up_unread, self.cycle)

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up_unread(self, cycle: object) -> None:
        if self.cycle is cycle and self.transport.get_write_buffer_size():
            self.transport.abort()
