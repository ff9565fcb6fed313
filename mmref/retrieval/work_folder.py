"""The folder in which an index, or a change of one, is made: what a killed call had embedded there is kept for the next."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmref.retrieval.chunks import PLACE, Chunks, embed
from mmref.retrieval.journal import KILLED
from mmref.retrieval.segment import write_segment
from mmref.storage.fetch import unsigned
from mmref.storage.whole_folder import write_whole
from mmref.terminal.progress import say


@contextlib.contextmanager
def kept_if_begun(work: Path) -> Iterator[None]:
    """An error leaves the work folder for the next start where something is embedded; else nothing of it stays."""
    try:
        yield
    except Exception:
        if not _has_embedded(work):
            discard(work)
        raise


def _has_embedded(work: Path) -> bool:
    return any(work.glob("chunks/*.npz"))


def start_work(work: Path, plan: dict[str, Any]) -> None:
    """Keep what an interrupted call with the same plan has done, remove what another one left."""
    path = work / "plan.json"
    if not path.exists() or json.loads(path.read_text("utf-8")) != plan:
        if _has_embedded(work):
            say("what was begun here was of another model, source or index, or had other options: starting over")
        for entry in work.iterdir():
            if entry.name != ".lock":
                discard(entry)
        write_whole(path, json.dumps(plan))


def embed_listing(
    work: Path,
    items: pa.Table,
    target: Path,
    workers: int,
    first_uid: int,
    model: Path,
    killers: Collection[str] = (),
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Embed the items of a listing and write its readable images as a segment; returns those that could not be read."""
    chunks = Chunks(work, items)
    embed(chunks, model, workers, killers, device)
    count, dim = 0, 0
    skipped: list[dict[str, Any]] = []
    for rows, arrays in chunks.read():
        count += len(arrays["position"])
        dim = arrays["features"].shape[1]
        for position, problem in json.loads(arrays["problems"].tobytes()).items():
            (row,) = rows.slice(int(position), 1).to_pylist()
            # For an image that is never decoded again, its place tells whether it is still the same.
            kept = ("id", *PLACE) if problem == KILLED else ("id", "path")
            skipped.append({**{name: row[name] for name in kept}, "path": unsigned(row["path"]), "problem": problem})
    discard(target)
    if count:
        write_segment(target, chunks.read(), first_uid, count, dim)
    return skipped


def discard(path: Path) -> None:
    """Delete a file, link or folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
