"""The memory that searches of an index need to be quick, and the kind of index that keeps within it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from mmref.retrieval.manifest import Manifest
from mmref.retrieval.segment import Segment, stored_as
from mmref.retrieval.vectors import HNSW_LINKS, Kind, code_bytes

FLAT_UP_TO = 1_000_000  # items that `auto` searches exactly
SHARE = 0.5  # of this machine's memory that `auto` takes for an index
UID_BYTES = 8


def machine_memory(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory of this machine, or of the container."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for version in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # no limit, or none that is told there
            found = min(found, int((groups / version).read_text("utf-8")))
    return found


def memory_for(kind: str, items: int, dim: int) -> int:
    """Bytes that a search of `items` features (n, dim) reads again and again: with less memory than that it waits for the
    disk. Flat reads the features; the others their index, and few features."""
    numbers = {
        "flat": dim * np.dtype(stored_as(items)).itemsize,
        "ivf": dim + UID_BYTES,
        "hnsw": dim + UID_BYTES + 2 * HNSW_LINKS * np.dtype(np.int32).itemsize,
        "ivfpq": code_bytes(dim) + UID_BYTES,
    }
    return items * numbers[kind]


def chosen_kind(kind: Kind, items: int, dim: int, memory: int | None) -> tuple[str, str]:
    """The kind of an index, and why, in words.

    Args:
        kind: what was asked for; auto: exact search up to a million items, then IVF, and IVF-PQ where these need more memory.
        memory: bytes that searches may need; None: half of this machine's.
    """
    budget = int(SHARE * machine_memory()) if memory is None else memory
    said = f"{_gigabytes(budget)}{', half of the memory of this machine' if memory is None else ''}"
    found: str = kind
    if kind == "auto":
        exact_fits = items <= FLAT_UP_TO and memory_for("flat", items, dim) <= budget
        found = "flat" if exact_fits else "ivf" if memory_for("ivf", items, dim) <= budget else "ivfpq"
    needed = memory_for(found, items, dim)
    over = " That is more." if needed > budget else ""
    by = "chosen" if kind == "auto" else "asked for"
    return found, f"{found} was {by}: searches keep {_gigabytes(needed)} in memory, of {said}.{over}"


def described(index: Path, manifest: Manifest, segments: list[Segment]) -> str:
    """The memory of an open index, in words: what it loads, what it maps, and how much of both searches keep using."""
    mapped = sum(_mapped(segment) for segment in segments)
    vectors = (index / manifest.vectors["file"]).stat().st_size if manifest.kind != "flat" else 0
    loaded = 0 if manifest.kind == "ivfpq" else vectors
    needed = memory_for(manifest.kind, manifest.items, manifest.dim)
    return (
        f"memory when open: {_gigabytes(loaded)} loaded, {_gigabytes(mapped + vectors - loaded)} mapped from disk, of both "
        f"{_gigabytes(needed)} read again and again"
    )


def _mapped(segment: Segment) -> int:
    arrays: list[Any] = [segment.features, segment.uids, segment.spans, segment.items, *segment.codes.values()]
    return sum(array.nbytes for array in arrays)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
