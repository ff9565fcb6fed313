"""Images that are not in an index: `skipped.jsonl`, what could not be read or taken, and `left_out.jsonl`, what was removed for
good."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmref.data.folder import describe
from mmref.errors import QueryError, SearchIndexError
from mmref.retrieval.chunks import PLACE
from mmref.retrieval.images import Listing
from mmref.retrieval.manifest import encoded
from mmref.retrieval.segment import Segment
from mmref.storage.fetch import unsigned
from mmref.storage.locations import to_text
from mmref.storage.texts import read_lines, read_text
from mmref.storage.whole_folder import write_whole
from mmref.terminal.output import printable

SKIPPED, LEFT_OUT = "skipped.jsonl", "left_out.jsonl"
FIX = "mend the line, or delete it."


def read_skipped(index: Path) -> list[dict[str, Any]]:
    """Images that could not be read or taken: id, path (of what could not be taken: its source), problem; of one that ended
    processes, all of its place (see `embed.identity`). None without the file. Raises SearchIndexError for a line that is none."""
    return _read_lines(index / SKIPPED, ("id", "problem", "path"))


def read_left_out(index: Path) -> list[dict[str, Any]]:
    """Items that were removed for good: id, path, offset, length, file_stamp and file_sha256 (in hex) of each. None without the
    file. Raises SearchIndexError for a line that is none."""
    return _read_lines(index / LEFT_OUT, ("id", *PLACE, "file_sha256"))


def _read_lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of JSON that have these keys, as a user may have edited them: lines are deleted to have images back."""
    found: list[dict[str, Any]] = []
    for number, line in enumerate(read_lines(str(path), SearchIndexError) if path.exists() else (), 1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SearchIndexError(f"{path}, line {number} is not JSON ({error}): {FIX}") from None
        if not isinstance(row, dict):
            raise SearchIndexError(f"{path}, line {number}: expected an object {{...}}, found {type(row).__name__}: {FIX}")
        if missing := [key for key in keys if key not in row]:
            raise SearchIndexError(f"{path}, line {number} has no {missing[0]!r}: {FIX}")
        found.append(row)
    return found


def read_ids(path: str) -> list[str]:
    """Ids of a file, one a line, as they are: a name may begin or end with a space. Raises QueryError, also for none."""
    if not (ids := [line for line in read_text(path, QueryError).split("\n") if line.strip()]):
        raise QueryError(f"{path} names no image: write one id a line.")
    return ids


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
    write_whole(index / SKIPPED, encoded("".join(lines)))


def not_taken(source: str, listing: Listing) -> list[dict[str, Any]]:
    return [{"id": what, "path": unsigned(to_text(source)), "problem": why} for what, why in listing.skipped]


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
