"""Threads that work beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class Pool:
    """Threads, and the work that waits for one: it is dropped, with what it holds, when nobody waits for it any more.

    Args:
        threads: that work at once.
        prepare: what each thread does first.
    """

    def __init__(self, threads: int, name: str, prepare: Callable[[], None] | None = None) -> None:
        self._threads = ThreadPoolExecutor(threads, name, prepare)
        self._free = asyncio.Semaphore(threads)

    async def run(self, work: Callable[..., Any], *args: Any) -> Any:
        """What `work` returns."""
        loop = asyncio.get_running_loop()
        await self._free.acquire()
        try:
            running = self._threads.submit(work, *args)
        except BaseException:
            self._free.release()
            raise
        # The place is not free when the wait for it ends: a thread whose client has left is busy all the same.

        def done(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed meanwhile
                loop.call_soon_threadsafe(self._free.release)

        running.add_done_callback(done)
        return await asyncio.wrap_future(running)
