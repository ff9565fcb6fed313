"""Leaving: in order and in time at the first SIGINT or SIGTERM, at once at the second."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

ANSWER_S = 4  # for requests that are being answered; then they are told to come again
CLOSE_S = 1.5  # for replicas to stop
LEAVE_S = 7.0  # in all: whoever runs containers kills after 10 s
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Leaving:
    """What a signal ends: the server, once there is one, else whatever is being started."""

    def __init__(self) -> None:
        self.server: Any = None  # of uvicorn
        self.begun = False

    def listen(self) -> None:
        """Take the signals; again after others have taken them, as Ray does when it starts."""
        for number in SIGNALS:
            signal.signal(number, self._leave)

    def _leave(self, *_: object) -> None:
        self.begun = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # A search that computes, or a cluster that does not answer, would hold the process.
        late = threading.Timer(LEAVE_S, os._exit, [0 if self.server else 130])
        late.daemon = True
        late.start()
        if self.server is None:
            raise KeyboardInterrupt
        self.server.should_exit = True


@contextlib.contextmanager
def leaving() -> Iterator[Leaving]:
    """Signals are taken inside. Raises SystemExit where one has stopped what was being started."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    found = Leaving()
    found.listen()
    try:
        yield found
    except (KeyboardInterrupt, SystemExit) as stopped:
        if isinstance(stopped, SystemExit) and stopped.code != signal.SIGTERM:  # which Ray raises while it starts
            raise
        print("stopped before it served", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if not found.begun:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's
