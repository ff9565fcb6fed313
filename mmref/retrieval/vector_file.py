"""The file of an approximate index: built, tuned, written, opened, and changed with the items."""

from __future__ import annotations

import functools
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from mmref.errors import SearchIndexError
from mmref.retrieval.exact import Floats, widened
from mmref.retrieval.manifest import Manifest
from mmref.retrieval.parts import fill_in_parts, parts_of
from mmref.retrieval.segment import Segment, joined_uids, open_segments
from mmref.retrieval.vectors import Approximate
from mmref.storage.locations import sha256_of

PARTS = "encoding"  # folder, of an index that is being built
REBUILD_SHARE = 0.1  # of an approximate index that may be items removed since


def open_vectors(index: Path, manifest: Manifest, writable: bool = False) -> Approximate | None:
    """The approximate index, None for an exact search; `writable`: to be added to. Raises SearchIndexError."""
    if manifest.kind == "flat":
        return None
    path, told = index / manifest.vectors["file"], manifest.vectors
    # A file that is not whole may make faiss end the process, so it is looked at first. The earliest indexes tell
    # neither number.
    try:
        size = path.stat().st_size
        if size != (wanted := int(told.get("bytes", size))):
            raise SearchIndexError(f"{path} has {size:,} bytes of {wanted:,}: the index is damaged; make it again.")
        if "sha256" in told and sha256_of(str(path)) != told["sha256"]:
            raise SearchIndexError(f"{path} is not what was written: the index is damaged; make it again.")
    except OSError as error:
        raise SearchIndexError(f"{path} cannot be read ({error}): the index is damaged; make it again.") from None
    setting, candidates = int(told["setting"]), int(told.get("candidates", 0))
    found = Approximate.open(path, manifest.kind, setting, manifest.dim, candidates, writable)
    if not manifest.items <= len(found) <= manifest.next_uid:
        raise SearchIndexError(f"{path} holds {len(found):,} items of {manifest.items:,}: make the index again.")
    return found


def changed_vectors(folder: Path, before: Manifest, after: Manifest, added: Segment | None) -> dict[str, Any]:
    """The approximate index with a segment added, built again when much of it has gone; {} for flat."""
    approximate = open_vectors(folder, before, writable=added is not None)
    if approximate is None:
        return {}
    if after.items < (1 - REBUILD_SHARE) * (len(approximate) + (0 if added is None else len(added))):
        kept, recall = open_segments(folder, after), float(before.vectors["wanted"])
        return build_vectors(folder, before.kind, after.generation, kept, None, recall)
    if added is None:
        return before.vectors
    approximate.add(added.features, added.uids)
    return before.vectors | _write_vectors(approximate, folder, after.generation)


def build_vectors(
    index: Path, kind: str, generation: int, segments: list[Segment], queries: Floats | None, recall: float, workers: int = 0
) -> dict[str, Any]:
    """Build, tune and write an approximate index; {} for flat.

    Recall is measured with captions of the source where it has any, else with the features of items. `workers` Ray tasks at a
    time encode the parts of a large IVF-PQ index; 0: this process does.
    """
    if kind == "flat":
        return {}
    matrices, uids = [s.features for s in segments], joined_uids(segments)
    began = time.perf_counter()
    fill = None
    if kind == "ivfpq" and workers and len(parts_of(segments)) > 1:
        fill = functools.partial(fill_in_parts, work=index / PARTS, segments=segments, workers=workers)
    approximate = Approximate.build(kind, matrices, uids, fill)
    shutil.rmtree(index / PARTS, ignore_errors=True)
    measured_on = "captions"
    if queries is None:
        measured_on = "items"
        queries = np.ascontiguousarray(widened(matrices[0][:: max(1, len(matrices[0]) // 256)][:256]))
    reached = approximate.tune(queries, matrices, uids, recall)
    return {
        **_write_vectors(approximate, index, generation),
        "setting": approximate.setting,
        "candidates": approximate.candidates,
        "recall@10": round(reached, 4),
        "wanted": recall,
        "measured_on": measured_on,
        "queries": len(queries),
        "build_seconds": round(time.perf_counter() - began, 1),
    }


def _write_vectors(approximate: Approximate, index: Path, generation: int) -> dict[str, Any]:
    """Its name below the index, and what tells later whether it is whole."""
    path = index / f"vectors-{generation:06d}"
    approximate.write(path)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(str(path))}
