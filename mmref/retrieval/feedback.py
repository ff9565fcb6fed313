"""What people thought of results: judgements in a file of JSON lines, and a table of them to fine-tune and evaluate with.

A judgement is {"query", "id", "object_id", "relevant", "at"}; the last one of a query and an item counts. One whose `relevant`
is null takes those before it back.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from mmref.data.container import image_ext
from mmref.errors import QueryError, SampleError, StorageError
from mmref.retrieval.searcher import Searcher
from mmref.storage.texts import read_lines
from mmref.storage.whole_folder import strangers, whole_folder

TABLE = "table.jsonl"  # of an export
FILE = "judgements.jsonl"  # in the index, where no other is named


@dataclass(frozen=True)
class Judgement:
    """Whether an item is what a query asks for."""

    query: str
    id: str
    object_id: str | None
    relevant: bool
    at: str  # UTC, ISO 8601


class Judgements:
    """A file of judgements, appended to a line at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def of(cls, index: str | os.PathLike[str], path: str | None = None) -> Judgements:
        """An index's own, or another file."""
        return cls(Path(path) if path else Path(index) / FILE)

    def save(self, searcher: Searcher, query: str, item_id: str, relevant: bool | None) -> None:
        """Append a judgement of an item of an index; None takes an earlier one back. Raises QueryError for an empty query or an
        unknown item, and StorageError."""
        self.append(query, item_id, searcher.item(item_id)["object_id"], relevant)

    def append(self, query: str, item_id: str, object_id: str | None, relevant: bool | None) -> None:
        """The same for an item that is known to be there. Raises QueryError for an empty query, StorageError."""
        if not query.strip():
            raise QueryError("a judgement needs the sentence that was searched.")
        now = datetime.now(UTC).isoformat(timespec="seconds")
        found = {"query": query.strip(), "id": item_id, "object_id": object_id, "relevant": relevant, "at": now}
        line = (json.dumps(found, ensure_ascii=False) + "\n").encode()
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            with os.fdopen(handle, "r+b", buffering=0) as file:
                size = os.fstat(handle).st_size
                if size and os.pread(handle, 1, size - 1) != b"\n":  # as an editor may leave it: two in one line are none
                    line = b"\n" + line
                try:
                    if file.write(line) < len(line):  # one write: lines of two writers do not mix
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(size)  # half a line would keep all others from being read
                    raise
        except OSError as error:
            raise self._not_written(error) from None

    def check_writable(self) -> None:
        """Raise StorageError where nothing can be appended, without making the file."""
        try:
            if self.path.exists():
                os.close(os.open(self.path, os.O_RDWR | os.O_APPEND))
            elif not os.access(self.path.parent, os.W_OK | os.X_OK):
                raise OSError(errno.EACCES, f"its folder {'takes no files' if self.path.parent.is_dir() else 'is not there'}")
        except OSError as error:
            raise self._not_written(error) from None

    def _not_written(self, error: OSError) -> StorageError:
        fix = "name a file that can be written with --judgements FILE."
        return StorageError(f"no judgement can be written to {self.path} ({error.strerror}): {fix}")

    def read(self) -> list[Judgement]:
        """The last judgement of each query and item, in the order they were first given. Raises QueryError."""
        if not self.path.exists():
            raise QueryError(f"{self.path} does not exist: judge results first (`mmref serve INDEX --judge`).")
        found: dict[tuple[str, str], Judgement] = {}
        for number, line in enumerate(read_lines(str(self.path), QueryError), 1):
            if not line.strip():
                continue
            try:
                of, judgement = read_judgement(line)
            except ValueError as error:
                raise QueryError(f"{self.path}, line {number} is no judgement: {error}.") from None
            if judgement:
                found[of] = judgement
            else:
                found.pop(of, None)
        return list(found.values())


def read_judgement(line: str | bytes) -> tuple[tuple[str, str], Judgement | None]:
    """Query and item of a line, and its judgement; None where it takes one back. Raises ValueError."""
    try:
        given = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    try:
        found = Judgement(**given)
    except TypeError as error:  # another key, or no object
        raise ValueError(str(error)) from None
    if not (isinstance(found.query, str) and isinstance(found.id, str) and isinstance(given["relevant"], bool | None)):
        raise ValueError("`query` and `id` are texts, `relevant` is true, false or null")
    return (found.query, found.id), None if given["relevant"] is None else found


def export_table(
    searcher: Searcher, judgements: Iterable[Judgement], out: str, split: str | None = None
) -> tuple[int, list[str]]:
    """Write `table.jsonl` and the images it names, ready for `mmref shards build table OUT/table.jsonl`.

    A row is an image with its object and a sentence. A relevant item gets the sentence it was found by; an item that
    was judged and is relevant to nothing gets the caption it was indexed with, and is left out where it has none.
    Items without an object id that are relevant to the same sentence become one object.

    Args:
        out: folder, made where it is missing; an earlier table in it is replaced, other files of yours stay.
        split: split of every row, such as `test` for an evaluation split; by default the builder deals objects to splits.

    Returns:
        Rows written, and what was left out.

    Raises:
        QueryError: nothing could be written, or the folder holds something else. StorageError when the disk is full.
    """
    with whole_folder(out, QueryError, TABLE, _files_of_table) as folder:
        return _write_table(searcher, list(judgements), folder, split)


def _files_of_table(root: Path) -> set[str]:
    """What an earlier export wrote into a folder. Raises QueryError where it holds something else."""
    try:
        # `splitlines` would also break where a sentence has one of Unicode's own line ends.
        lines = (root / TABLE).read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        return {TABLE, *(row["image"] for row in rows if row["item"])} if rows else set()
    except (OSError, ValueError, TypeError, KeyError):
        if found := strangers(root):
            raise QueryError(
                f"{root} holds files that are no table of judgements ({', '.join(found[:3])}): give an empty or a new folder "
                "with --out."
            ) from None
        return set()


def caption_of(searcher: Searcher, item_id: str) -> str:
    """The caption that an item was indexed with, "" where it has none. Raises QueryError for an unknown item."""
    found = searcher.item(item_id).get("caption")
    return "" if found is None else str(found)  # older versions took a column of numbers for numbers


def _write_table(searcher: Searcher, judged: list[Judgement], folder: Path, split: str | None) -> tuple[int, list[str]]:
    objects = _objects(judged)
    (folder / "images").mkdir()
    relevant = {j.id for j in judged if j.relevant}
    captions: dict[str, list[str]] = {}
    for judgement in judged:
        of_item = captions.setdefault(judgement.id, [])
        if judgement.relevant:
            of_item.append(judgement.query)
    rows, left_out = [], []
    for number, (item_id, texts) in enumerate(captions.items()):
        try:
            if item_id not in relevant:
                texts = [caption_of(searcher, item_id)]
                if not texts[0]:
                    left_out.append(f"{item_id}: relevant to nothing, and no caption of its own")
                    continue
            data = searcher.image_bytes(item_id)
        except (QueryError, SampleError) as error:  # removed from the index since, or its file is gone
            left_out.append(f"{item_id}: {error}")
            continue
        name = f"images/{number:06d}.{image_ext(data) or 'img'}"
        (folder / name).write_bytes(data)
        row = {"image": name, "object_id": objects[item_id], "captions": texts, "item": item_id}
        rows.append(row | ({"split": split} if split else {}))
    if not rows:
        raise QueryError(f"no judged item can be exported: {left_out[:3] or 'there are no judgements'}.")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / TABLE).write_text(text, encoding="utf-8")
    return len(rows), left_out


def _objects(judged: list[Judgement]) -> dict[str, str]:
    """Object of each judged item: its own, else one for all items that sentences join."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    of_query: dict[str, str] = {}
    for judgement in judged:
        if judgement.object_id is None and judgement.relevant:
            first = of_query.setdefault(judgement.query, judgement.id)
            parent[root(judgement.id)] = root(first)
    return {j.id: j.object_id if j.object_id is not None else f"item:{root(j.id)}" for j in judged}
