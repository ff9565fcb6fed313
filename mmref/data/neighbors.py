"""Which training objects are easily confused: a file of each object's nearest ones, written by `mmref mine`, read by the plan.

One Parquet file, a row for each training object in the order of the set's index:

    neighbors   list of int32, rows of the nearest objects, nearest first; -1 where there are fewer
    similarity  list of float32, their cosines

Its metadata say what it was made of. Rows mean nothing in another set, so it holds the set's fingerprint, and no ids.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmref.errors import NeighborsError
from mmref.storage.locations import read_bytes
from mmref.storage.parquet import open_parquet, read_parquet

if TYPE_CHECKING:
    from mmref.data.sample_reader import SplitIndex

FILE = "neighbors.parquet"  # in the run directory
KEY = b"mmref"  # of the metadata
FORMAT = 1
NONE = -1
AGAIN = "Write one for this set with `mmref mine`."


@dataclass(frozen=True)
class Neighbors:
    """The nearest training objects of each, of its own shard set where a run mixes several."""

    rows: NDArray[np.int32]  # (m, k), nearest first, NONE where there are fewer
    similarity: NDArray[np.float32]  # (m, k) cosines, 0 where there are fewer
    set_fingerprint: str  # as of `index_fingerprint`
    model: str  # config hash and checkpoint of the model that they were found with
    by: str  # "references" or "features"

    def to_bytes(self) -> bytes:
        """The file."""
        about = {name: value for name, value in asdict(self).items() if isinstance(value, str)}
        count = self.rows.shape[1]
        table = pa.table(
            {
                "neighbors": pa.FixedSizeListArray.from_arrays(pa.array(self.rows.reshape(-1), pa.int32()), count),
                "similarity": pa.FixedSizeListArray.from_arrays(pa.array(self.similarity.reshape(-1), pa.float32()), count),
            }
        )
        out = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({KEY: json.dumps({"format": FORMAT, **about})}), out, compression="zstd")
        return out.getvalue()


def index_fingerprint(index: SplitIndex) -> str:
    """12 hex digits of the contents of the shards of an index, in order, wherever they lie; of a part also of its objects."""
    contents: list[list[Any]] = [list(index.shard_sha256), list(index.first_objects)]
    if index.chosen is not None:
        contents.append(index.chosen.tolist())
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()[:12]


def read_neighbors(place: str, index: SplitIndex) -> Neighbors:
    """The file at a path or URL. Raises NeighborsError where there is none, or it is damaged or of another set than `index`."""
    try:
        file = open_parquet(io.BytesIO(read_bytes(place)))
        about = json.loads((file.schema_arrow.metadata or {})[KEY])
        if about["format"] != FORMAT:
            raise NeighborsError(f"{place} has format {about['format']}, this version of mmref reads {FORMAT}. {AGAIN}")
        if (expected := index_fingerprint(index)) != about["set_fingerprint"]:
            raise NeighborsError(
                f"{place} holds neighbors of another set than the one that is trained on: it was made of shards with the "
                f"fingerprint {about['set_fingerprint']}, and these have {expected}. {AGAIN}"
            )
        if file.metadata.num_rows != index.n_objects:
            raise ValueError(f"it has {file.metadata.num_rows} rows for {index.n_objects} objects")
        table = read_parquet(file, ["neighbors", "similarity"])
        rows, similarity = (_matrix(table[name], index.n_objects) for name in ("neighbors", "similarity"))
        _check_rows(rows, index)
        return Neighbors(
            rows.astype(np.int32), similarity.astype(np.float32), about["set_fingerprint"], about["model"], about["by"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors derive from these
        raise NeighborsError(f"{place} is no file of neighbors that can be read ({error}). {AGAIN}") from None


def _matrix(column: pa.ChunkedArray, count: int) -> NDArray[Any]:
    values = pa.concat_arrays([chunk.flatten() for chunk in column.chunks]).to_numpy(zero_copy_only=False)
    if not count or len(values) % count:
        raise ValueError("its rows are not of one length")
    return values.reshape(count, -1)


def _check_rows(rows: NDArray[Any], index: SplitIndex) -> None:
    """Raise ValueError for a neighbor that is no other object of the same shard set."""
    bounds = np.array([*index.first_objects, index.n_objects])
    part = np.searchsorted(bounds, np.arange(len(rows)), side="right") - 1
    low, high = bounds[part][:, None], bounds[part + 1][:, None]
    wrong = (rows != NONE) & ((rows < low) | (rows >= high) | (rows == np.arange(len(rows))[:, None]))
    if wrong.any():
        row = int(np.flatnonzero(wrong.any(1))[0])
        raise ValueError(f"object {row} has {rows[row].tolist()} for neighbors, which are not all other objects of its set")
