"""Images that are not in an index: `skipped.jsonl`, what could not be read or taken, and `left_out.jsonl`, what was removed for
good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmref.data.folder import describe
from mmref.retrieval.chunks import PLACE
from mmref.retrieval.images import Listing
from mmref.retrieval.manifest import encoded
from mmref.retrieval.segment import Segment
from mmref.storage.locations import to_text
from mmref.storage.whole_folder import write_whole
from mmref.terminal.output import printable

LEFT_OUT = "left_out.jsonl"


def read_skipped(index: Path) -> list[dict[str, Any]]:
    """Images that could not be read or taken: id, path (of what could not be taken: its source), problem; of one that ended
    processes, all of its place (see `embed.identity`)."""
    # `splitlines` would also break where a name has one of Unicode's own line ends.
    return [json.loads(line) for line in (index / "skipped.jsonl").read_text(encoding="utf-8").split("\n") if line]


def read_left_out(index: Path) -> list[dict[str, Any]]:
    """Items that were removed for good: id, path, offset, length, file_stamp and file_sha256 (in hex) of each."""
    path = index / LEFT_OUT
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []


def add_left_out(index: Path, segments: list[Segment], ids: set[str]) -> None:
    """Note items that are removed for good. Written before the removal is in force: what is in the index is never looked up."""
    lines = read_left_out(index)
    for segment in segments:
        items = segment.items.filter(pc.is_in(segment.items["id"], value_set=pa.array(sorted(ids), pa.string())))
        for row in items.select([name for name in ("id", *PLACE, "file_sha256") if name in items.column_names]).to_pylist():
            content = row.get("file_sha256")
            lines.append({**dict.fromkeys(PLACE), **row, "file_sha256": content.hex() if content else None})
    write_whole(index / LEFT_OUT, encoded("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)))


def write_skipped(index: Path, skipped: list[dict[str, Any]]) -> None:
    lines = (json.dumps(s, ensure_ascii=False) + "\n" for s in skipped)
    write_whole(index / "skipped.jsonl", encoded("".join(lines)))


def not_taken(source: str, listing: Listing) -> list[dict[str, Any]]:
    return [{"id": what, "path": to_text(source), "problem": why} for what, why in listing.skipped]


def passed_over(listing: Listing) -> list[str]:
    """What lies beside the images of a listing, in words."""
    count = sum(listing.passed_over.values())
    lines = list(listing.notes)
    lines += [f"{count:,} files passed over: {describe(listing.passed_over)}"] if count else []
    if left := [f"{printable(name)} ({why})" for name, why in listing.columns_left.items()]:
        lines.append(f"columns of the table that were not taken: {', '.join(left)}")
    if infinite := [f"{printable(name)} ({count:,})" for name, count in listing.cells_left.items()]:
        lines.append(f"infinite numbers of the table that are kept as missing: {', '.join(infinite)}")
    return lines
