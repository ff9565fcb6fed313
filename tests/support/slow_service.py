"""`mmref serve`, whose searches take a minute."""

from __future__ import annotations

import sys
import time

from mmref.retrieval.service.answering import Engine
from mmref.retrieval.service.command import serve_main
from mmref.terminal.run_command import run_command


def slow(*_: object) -> list[object]:
    print("searching", flush=True)
    time.sleep(60)
    return []


if __name__ == "__main__":
    Engine.search = slow  # type: ignore[assignment]
    sys.exit(run_command(lambda: serve_main(sys.argv[1:])))
