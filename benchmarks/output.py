"""Where a benchmark's figures go: standard output, and a file where one is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_figures(figures: dict[str, Any], out: str | Path | None) -> None:
    """Print figures as JSON, and write them to `out`."""
    text = json.dumps(figures, indent=1)
    print(text)
    if out:
        Path(out).write_text(text + "\n")
