"""LanceDB, a folder of columns that is searched in this process."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmref.errors import StoreError
from mmref.extras import need
from mmref.retrieval.filters import Condition
from mmref.retrieval.stores.sql import Dialect, literal, where_clause
from mmref.retrieval.stores.store import FEATURE, KEY, About, Conditions, Found, padded
from mmref.storage.locations import absolute

# Of a column's name: Lance takes a point for the way into another column, and no backtick can be quoted in its filters; names
# that it gives to columns of its own.
NOT_TAKEN = re.compile(r"[.`]|^_(?=(rowid|rowaddr|rowoffset|distance)$)")


class Lance:
    """A table of a LanceDB folder, or of what LanceDB opens by a URL. Raises StoreError, ExtraMissingError."""

    def __init__(self, folder: str, table: str) -> None:
        need("lancedb", "a store of lancedb://")
        import lancedb

        self.place, self.name = absolute(folder), table
        self._errors = (OSError, ValueError, RuntimeError)  # all that LanceDB raises
        try:
            self._db: Any = lancedb.connect(self.place)
            self._table: Any = self._db.open_table(table) if table in self._names() else None
        except self._errors as error:
            raise self._failed(error) from None
        said = (self._table.schema.metadata or {}).get(KEY.encode()) if self._table else None
        self.about = About.of(said.decode() if said else None, f"{self.place}#{table}") if self._table else None

    def _names(self) -> list[str]:
        return list(self._db.list_tables().tables)

    def write(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], about: About) -> None:
        """As Store.write: LanceDB commits a new version of the table at the end."""
        told = pa.schema([field.with_name(stored_name(field.name)) for field in schema], {KEY: about.to_json()})
        rows = (pa.RecordBatch.from_arrays(batch.columns, schema=told) for batch in batches)
        try:
            self._table = self._db.create_table(self.name, pa.RecordBatchReader.from_batches(told, rows), mode="overwrite")
        except self._errors as error:
            raise self._failed(error) from None
        self.about = about

    def says(self, condition: Condition) -> bool:
        """As Store.says: it has SQL."""
        return True

    def search(self, queries: NDArray[np.float32], k: int, where: Conditions, arrays: Sequence[str] = ()) -> Found:
        """As Store.search."""
        return padded([self._one(query, k, where, arrays) for query in queries], k, arrays)

    def _one(self, query: NDArray[np.float32], k: int, where: Conditions, arrays: Sequence[str]) -> dict[str, NDArray[Any]]:
        asked = self._table.search(query, vector_column_name=FEATURE).distance_type("dot").bypass_vector_index()
        if where:
            asked = asked.where(where_clause(where, DATA_FUSION), prefilter=True)
        try:
            found = asked.select(["uid", *arrays, "_distance"]).limit(k).to_arrow()
        except self._errors as error:
            raise self._failed(error) from None
        known = {name: _matrix(found[name]) for name in arrays}
        return known | {"uid": found["uid"].to_numpy(), "score": 1 - found["_distance"].to_numpy()}  # its distance is 1 - dot

    def count(self, where: Conditions) -> int:
        """As Store.count."""
        try:
            return int(self._table.count_rows(where_clause(where, DATA_FUSION) if where else None))
        except self._errors as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """Nothing is held open."""

    def _failed(self, error: Exception) -> StoreError:
        return StoreError(f"LanceDB at {self.place} failed: {str(error).splitlines()[0]}.")


def stored_name(name: str) -> str:
    """The name that a column has in LanceDB: as in a URL, %2E for a point."""
    return NOT_TAKEN.sub(lambda found: f"%{ord(found[0]):02X}", name)


DATA_FUSION = Dialect(lambda name: f"`{stored_name(name)}`", literal, "string", "double")
"""The SQL that LanceDB filters by."""


def _matrix(column: pa.ChunkedArray) -> NDArray[Any]:
    """(n, width) of a column of lists of one length."""
    joined = pa.concat_arrays([chunk.flatten() for chunk in column.chunks]) if column.num_chunks else pa.array([], pa.float32())
    return joined.to_numpy(zero_copy_only=False).reshape(len(column), -1) if len(column) else np.zeros((0, 0), np.float32)
