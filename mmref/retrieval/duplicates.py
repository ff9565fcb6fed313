"""Images of an index that are the same by their bytes, or nearly the same by their features.

Two images are alike when their bytes have one hash, or when the cosine of their features is at least a threshold. A group is
all that is alike directly or through others (a connected component). So a group may be a chain whose ends are less alike than
the threshold: `Member.cosine` tells how much each is like the one that is kept. Features are compared in blocks, half of the
pairs, and no matrix of all pairs is ever held.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from mmref.errors import QueryError, SampleError
from mmref.retrieval.exact import Features, Floats, Rows, gather_features
from mmref.retrieval.images import read_image_bytes
from mmref.retrieval.manifest import Manifest
from mmref.retrieval.segment import Segment, join_items, joined_uids, open_segments
from mmref.retrieval.set_aside import read_ids
from mmref.retrieval.vector_file import open_vectors
from mmref.retrieval.vectors import Approximate
from mmref.storage.tables import TABLE_ENDINGS, read_table
from mmref.terminal.progress import Counter

Keep: TypeAlias = Literal["first", "largest"]
KEEP = get_args(Keep)
ABOVE = 0.97
BLOCK_ROWS = 2048
ROUNDED = 2e-3  # how much less a product of features in fp16 may be than their cosine
MOST_PAIRS = 1 << 20  # in memory
NEIGHBORS = 64  # of each image, that an approximate index is asked for
READ_THREADS = 4


@dataclass(frozen=True)
class Member:
    """An image of a group."""

    leave_out: bool  # all but the one that is kept
    id: str
    object_id: str | None
    split: str | None
    path: str
    width: int  # pixels
    height: int
    cosine: float  # with the one that is kept
    same_bytes: bool  # as the one that is kept


@dataclass(frozen=True)
class Group:
    """Images that are alike, the one that is kept first, then the most alike."""

    members: list[Member]

    @property
    def lowest(self) -> float:
        """The cosine of the one least like the one that is kept."""
        return min(member.cosine for member in self.members)

    @property
    def same_bytes(self) -> bool:
        return all(member.same_bytes for member in self.members)

    def several(self, name: Literal["object_id", "split"]) -> bool:
        """Whether its images are of more than one object, or split."""
        return len({getattr(member, name) for member in self.members}) > 1


@dataclass(frozen=True)
class Found:
    """The groups of an index, surest first."""

    items: int  # of the index
    above: float
    keep: Keep
    exact: bool  # False: through an approximate index, which may miss some
    groups: list[Group]
    rows: list[list[int]]  # of each group's members
    segments: Sequence[Segment]

    def members(self) -> list[Member]:
        return [member for group in self.groups for member in group.members]

    def left_out(self) -> list[str]:
        """Ids of all but the one that is kept of each group."""
        return [member.id for member in self.members() if member.leave_out]

    def thumbnail(self, group: int, member: int) -> bytes:
        """WebP of a member, by their places from 0."""
        row = self.rows[group][member]
        for segment in self.segments:
            if row < len(segment):
                break
            row -= len(segment)
        return segment.thumbnail(row)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        groups = [{"lowest": group.lowest, "members": [asdict(member) for member in group.members]} for group in self.groups]
        return {"items": self.items, "above": self.above, "keep": self.keep, "exact": self.exact, "groups": groups}


def find_duplicates(index: str, above: float = ABOVE, keep: Keep = "first") -> Found:
    """Groups of images that are alike.

    Args:
        above: cosine from which on two images are alike, up to 1. 1: the same bytes alone, and features are not looked at.
        keep: which of a group is kept: the first in the index, or the one of most pixels, of these the first.

    Raises:
        QueryError: a threshold of 0 or below, or above 1. SearchIndexError: no index, or a damaged one.
    """
    if not 0 < above <= 1:
        raise QueryError(f"--above {above:g}: a cosine above 0 and up to 1 is needed. 0.97 is a start.")
    folder = Path(index).expanduser().absolute()
    manifest = Manifest.read(folder)
    segments = open_segments(folder, manifest)
    columns = join_items([_columns(s.items) for s in segments])
    matrices = [s.features for s in segments]
    groups, hashes = Components(manifest.items), columns["file_sha256"].to_pylist()
    approximate = None
    if above < 1:
        approximate = open_vectors(folder, manifest)
        uids = joined_uids(segments)
        join_near(groups, matrices, above, approximate, uids)
    else:
        hashes = _hashed(columns, hashes, range(manifest.items))
    groups.join(*_same(hashes))
    members = groups.rows()
    hashes = _hashed(columns, hashes, [row for rows in members for row in rows.tolist()])
    described = sorted((_group(columns, matrices, hashes, rows, keep) for rows in members), key=lambda g: -g[0].lowest)
    shown = [group for group, _ in described]
    return Found(manifest.items, above, keep, approximate is None, shown, [rows for _, rows in described], segments)


class Components:
    """Rows joined into groups, as pairs arrive. Pairs are kept until they are many: a look at all rows is dear."""

    def __init__(self, count: int) -> None:
        self._label = np.arange(count)
        self._pairs: list[tuple[Rows, Rows]] = []

    def join(self, one: Rows, other: Rows) -> None:
        """Pairs of rows that are of one group."""
        if len(one):
            self._pairs.append((one, other))
        if sum(len(rows) for rows, _ in self._pairs) > MOST_PAIRS:
            self._merge()

    def _merge(self) -> None:
        if self._pairs:
            one, other = (np.concatenate(rows) for rows in zip(*self._pairs))
            self._pairs, count = [], len(self._label)
            edges = (np.ones(len(one), bool), (self._label[one], self._label[other]))
            _, merged = connected_components(sparse.coo_matrix(edges, (count, count)), directed=False)
            self._label = merged[self._label]

    def rows(self) -> list[Rows]:
        """Rows of each group of more than one, rising."""
        self._merge()
        order = np.argsort(self._label, kind="stable")
        _, starts = np.unique(self._label[order], return_index=True)
        return [rows for rows in np.split(order, starts[1:]) if len(rows) > 1]


def join_near(
    groups: Components, matrices: Sequence[Features], above: float, approximate: Approximate | None, uids: NDArray[np.int64]
) -> None:
    """Join the rows of features (n, d), end to end, whose cosine is at least `above`: of all pairs, or of those that an
    approximate index proposes, which knows items by `uids`."""
    count = sum(map(len, matrices))
    with Counter("comparing", count, "image") as progress:
        for start in range(0, count, BLOCK_ROWS):
            rows = np.arange(start, min(start + BLOCK_ROWS, count))
            features = _unit(matrices, rows)
            if approximate is not None:
                scores, found = approximate.search(features, matrices, uids, min(NEIGHBORS, count))
                one, place = np.nonzero((scores >= above - ROUNDED) & (found >= 0))
                two = found[one, place]
                near = np.einsum("nd,nd->n", features[one], _unit(matrices, two)) >= above
                groups.join(rows[one[near]], two[near])
            else:
                for other in range(start, count, BLOCK_ROWS):
                    columns = np.arange(other, min(other + BLOCK_ROWS, count))
                    against = features if other == start else _unit(matrices, columns)
                    one, two = np.nonzero(features @ against.T >= above)
                    apart = rows[one] < columns[two]
                    groups.join(rows[one[apart]], columns[two[apart]])
            progress.add(len(rows))


def _unit(matrices: Sequence[Features], rows: Rows) -> Floats:
    """Features of a length of 1: in fp16 they are a little longer or shorter, and copies would be less alike than 1."""
    features = gather_features(matrices, rows)
    return features / np.linalg.norm(features, axis=-1, keepdims=True)


def _columns(items: pa.Table) -> pa.Table:
    """What is used of a segment's items, null where an index has none of it."""
    kinds = {"id": pa.string(), "object_id": pa.string(), "split": pa.string(), "path": pa.string(), "offset": pa.int64(),
             "length": pa.int64(), "width": pa.int32(), "height": pa.int32(), "file_sha256": pa.binary(32)}  # fmt: skip
    return pa.table({
        name: items[name].cast(kind) if name in items.column_names else pa.nulls(len(items), kind) for name, kind in kinds.items()
    })  # fmt: skip


def _hashed(columns: pa.Table, hashes: Sequence[bytes | None], rows: Sequence[int]) -> list[bytes | None]:
    """Hashes with those of these rows that an index of an older version does not have; None for what cannot be read any more."""
    found = list(hashes)
    unknown = [row for row in rows if found[row] is None]
    taken = columns.take(pa.array(unknown, pa.int64()))
    places = list(zip(taken["path"].to_pylist(), taken["offset"].to_pylist(), taken["length"].to_pylist()))

    def digest(place: tuple[str, int, int]) -> bytes | None:
        try:
            return hashlib.sha256(read_image_bytes(*place)).digest()
        except SampleError:
            return None

    with ThreadPoolExecutor(READ_THREADS) as pool:
        for row, value in zip(unknown, pool.map(digest, places)):
            found[row] = value
    return found


def _same(hashes: Sequence[bytes | None]) -> tuple[Rows, Rows]:
    """Pairs of rows with the same hash: each with the first of its kind."""
    first: dict[bytes, int] = {}
    pairs = [(first.setdefault(value, row), row) for row, value in enumerate(hashes) if value is not None]
    joined = np.array([pair for pair in pairs if pair[0] != pair[1]], np.int64).reshape(-1, 2)
    return joined[:, 0], joined[:, 1]


def _group(
    columns: pa.Table, matrices: Sequence[Features], hashes: Sequence[bytes | None], rows: Rows, keep: Keep
) -> tuple[Group, list[int]]:
    """A group, and the rows of its members."""
    items = columns.take(pa.array(rows)).to_pylist()
    kept = 0
    if keep == "largest":
        kept = int(np.argmax([item["width"] * item["height"] for item in items]))
    features = _unit(matrices, rows)
    # Rounded, so that of equal images the first comes first: a product may differ in its last bits by where a row lies in it.
    cosines = [round(float(cosine), 4) for cosine in np.clip(features @ features[kept], -1, 1)]
    order = sorted(range(len(rows)), key=lambda i: (i != kept, -cosines[i], i))
    told = ("id", "object_id", "split", "path", "width", "height")
    members = []
    for i in order:
        same = i == kept or (hashes[rows[i]] is not None and hashes[rows[i]] == hashes[rows[kept]])
        members.append(Member(i != kept, **{n: items[i][n] for n in told}, cosine=cosines[i], same_bytes=same))
    return Group(members), [int(rows[i]) for i in order]


# -- the table -------------------------------------------------------------------------------------------------------


def as_table(found: Found, ending: str) -> bytes:
    """A row for each member, with the number of its group: CSV, or JSON lines for `.jsonl`. `leave_out` is yes or no, to be
    changed by hand."""
    rows = [
        {"group": number, **asdict(m), **{name: ("no", "yes")[getattr(m, name)] for name in ("leave_out", "same_bytes")}}
        for number, group in enumerate(found.groups, 1)
        for m in group.members
    ]
    if ending == ".jsonl":
        return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["group", *(f.name for f in fields(Member))])
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def read_choice(path: str) -> list[str]:
    """Ids to leave out: of a table as of `as_table`, those whose `leave_out` is yes; of another file, one a line.

    Raises:
        QueryError: it is empty, or a cell is neither yes nor no. SourceError: a damaged table.
    """
    if not path.lower().endswith(TABLE_ENDINGS):
        chosen = read_ids(path)
    else:
        table = read_table(path)
        table.require({"id": "id", "leave_out": "leave_out"}, QueryError)
        chosen = []
        for row in table.rows(["id", "leave_out"]):
            answer = row.text("leave_out").strip().lower()
            if answer not in ("yes", "no", ""):
                raise QueryError(f"{path}, row {row.number}: leave_out is {answer!r}; write yes or no.")
            if answer == "yes":
                name, cell = row.needed("id"), row.cell("id")
                chosen.append(cell if isinstance(cell, str) else name)  # a name may begin or end with a space
    if not chosen:
        raise QueryError(f"{path} names no image to leave out.")
    return list(dict.fromkeys(chosen))
