"""Qdrant, a server of vectors with a payload each: a collection behind an alias."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from datetime import date, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmref.errors import StoreError
from mmref.extras import need
from mmref.retrieval.filters import Condition, Value, kind_of
from mmref.retrieval.stores.store import CODES, FEATURE, KEY, UID, About, Conditions, Found, padded

PORT = 6333  # of its HTTP
TIMEOUT_S = 60
POINTS = 512  # in a request
WHOLE = 2**53  # integers up to here are numbers of JSON, and of its ranges, without loss
SCHEMA = {"number": "float", "boolean": "bool", "date": "datetime", "time": "datetime"}
KEY_VARIABLE = "QDRANT_API_KEY"


class Qdrant:
    """A collection at `qdrant://HOST:PORT`, or `qdrants://` over TLS; its key is read from QDRANT_API_KEY.

    Raises:
        StoreError, ExtraMissingError.
    """

    def __init__(self, url: str, table: str) -> None:
        need("qdrant", "a store of qdrant://")
        from qdrant_client import QdrantClient
        from qdrant_client.http.exceptions import ApiException

        self.name, self._failures = table, (ApiException, OSError, ValueError)
        try:
            parts = urlsplit(url)
            self.place = f"{parts.hostname}:{parts.port or PORT}"
            scheme = "https" if parts.scheme == "qdrants" else "http"
            self._client = QdrantClient(
                url=f"{scheme}://{self.place}", api_key=os.environ.get(KEY_VARIABLE), timeout=TIMEOUT_S, check_compatibility=False
            )
            there = self._collection() is not None or self._client.collection_exists(table)
            said = self._client.get_collection(table).config.metadata or {} if there else {}
        except self._failures as error:
            raise self._failed(error) from None
        self.about = About.of(said.get(KEY), f"{self.place}#{table}") if there else None

    def _collection(self) -> str | None:
        """What the alias names."""
        return next((a.collection_name for a in self._client.get_aliases().aliases if a.alias_name == self.name), None)

    def write(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], about: About) -> None:
        """As Store.write: rows go to a new collection, the alias is moved to it, and the old one is deleted."""
        from qdrant_client import models

        new = f"{self.name}.{secrets.token_hex(4)}"
        try:
            old = self._collection()
            self._client.create_collection(
                new,
                models.VectorParams(size=about.dim, distance=models.Distance.DOT, on_disk=True),
                on_disk_payload=True,
                hnsw_config=models.HnswConfigDiff(m=0),  # a graph that an exact search does not use
                metadata={KEY: about.to_json()},
            )
            try:
                for field in schema:
                    if field.name not in (UID, FEATURE, *CODES) and _has_path(field.name):
                        kind = SCHEMA.get(kind_of(field.type), "keyword")
                        self._client.create_payload_index(new, _path(field.name), models.PayloadSchemaType(kind), wait=True)
                for batch in batches:
                    self._upsert(new, batch)
                moved: list[Any] = [
                    models.CreateAliasOperation(create_alias=models.CreateAlias(collection_name=new, alias_name=self.name))
                ]
                if old:
                    moved.insert(0, models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=self.name)))
                self._client.update_collection_aliases(moved)
            except BaseException:
                self._client.delete_collection(new)
                raise
            if old:
                self._client.delete_collection(old)
        except self._failures as error:
            raise self._failed(error) from None
        self.about = about

    def _upsert(self, collection: str, batch: pa.RecordBatch) -> None:
        from qdrant_client import models

        for start in range(0, len(batch), POINTS):
            some = batch.slice(start, POINTS)
            uids = some.column(UID).to_pylist()
            columns = [_payload(some, name) for name in some.schema.names if name not in (UID, FEATURE)]
            payloads = [dict(pair for pair in row if pair is not None) for row in zip(*columns)]
            vectors = some.column(FEATURE).flatten().to_numpy(zero_copy_only=False).reshape(len(some), -1)
            self._client.upsert(collection, models.Batch(ids=uids, vectors=vectors.tolist(), payloads=payloads), wait=True)

    def says(self, condition: Condition) -> bool:
        """As Store.says: Qdrant looks for words, not for parts of texts, knows no order of texts, and numbers of JSON alone."""
        if not _has_path(condition.column) or condition.op == "~":
            return False
        if any(isinstance(value, int) and abs(value) > WHOLE for value in condition.values):
            return False
        return not (condition.op in ("<", "<=", ">", ">=") and isinstance(condition.values[0], str))

    def search(self, queries: NDArray[np.float32], k: int, where: Conditions, arrays: Sequence[str] = ()) -> Found:
        """As Store.search."""
        from qdrant_client import models

        payload = [name for name in arrays if name != FEATURE]
        asked = [
            models.QueryRequest(
                query=query.tolist(),
                filter=translated(where),
                params=models.SearchParams(exact=True),
                limit=k,
                with_payload=payload or False,
                with_vector=FEATURE in arrays,
            )
            for query in queries
        ]
        try:
            answers = self._client.query_batch_points(self.name, asked)
        except self._failures as error:
            raise self._failed(error) from None
        return padded([_arrays(answer.points, arrays) for answer in answers], k, arrays)

    def count(self, where: Conditions) -> int:
        """As Store.count."""
        try:
            return int(self._client.count(self.name, translated(where), exact=True).count)
        except self._failures as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """End connections."""
        self._client.close()

    def _failed(self, error: Exception) -> StoreError:
        said = getattr(error, "content", b"") or str(error) or type(error).__name__
        text = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
        return StoreError(f"Qdrant at {self.place} failed at collection {self.name}: {text.strip().splitlines()[0][:300]}.")


# -- rows ------------------------------------------------------------------------------------------------------------


def _payload(batch: pa.RecordBatch, name: str) -> list[tuple[str, Any] | None]:
    """A column's values, row by row, as JSON has them; None of rows without one."""
    values = batch.column(name).to_pylist()
    return [None if value is None else (name, _said(value) if isinstance(value, date) else value) for value in values]


def _said(moment: date) -> str:
    """A day or a time, as Qdrant reads it."""
    return moment.isoformat() if isinstance(moment, datetime) else f"{moment.isoformat()}T00:00:00"


def _arrays(points: Sequence[Any], arrays: Sequence[str]) -> dict[str, NDArray[Any]]:
    """What was found of a query, as arrays of its points."""
    found: dict[str, NDArray[Any]] = {
        "uid": np.array([point.id for point in points], np.int64),
        "score": np.array([point.score for point in points], np.float32),
    }
    for name in arrays:
        rows = [point.vector if name == FEATURE else point.payload[name] for point in points]
        kind = np.int32 if name == CODES[0] else np.float32
        found[name] = np.array(rows, kind).reshape(len(rows), -1) if rows else np.zeros((0, 0), kind)
    return found


# -- filters ---------------------------------------------------------------------------------------------------------


def translated(where: Conditions) -> Any:
    """A filter of Qdrant that leaves what conditions leave, each of which it `says`; None of no conditions."""
    from qdrant_client import models

    return models.Filter(must=[_clause(one) for one in where]) if where else None


def _clause(one: Condition) -> Any:
    from qdrant_client import models

    if one.column == UID:
        return models.HasIdCondition(has_id=[value for value in one.values if isinstance(value, int)])
    key = _path(one.column)
    empty = models.IsEmptyCondition(is_empty=models.PayloadField(key=key))
    missing = models.Filter(should=[empty, models.FieldCondition(key=key, match=models.MatchValue(value=""))])
    if one.op == "missing":
        return missing
    if one.op == "present":
        return models.Filter(must_not=[missing])
    if one.op in ("<", "<=", ">", ">="):
        return _range(key, one.op, one.values[0])
    if one.op == "!=":
        return models.Filter(must_not=[empty, _equal(key, one.values[0])])
    if texts := [value for value in one.values if isinstance(value, str)]:  # then all are
        return models.FieldCondition(key=key, match=models.MatchAny(any=texts))
    return models.Filter(should=[_equal(key, value) for value in one.values])


def _equal(key: str, value: Value) -> Any:
    from qdrant_client import models

    if isinstance(value, str | bool):
        return models.FieldCondition(key=key, match=models.MatchValue(value=value))
    return models.Filter(must=[_range(key, ">=", value), _range(key, "<=", value)])


def _range(key: str, op: str, value: Value) -> Any:
    """A comparison with a number, a time, or a whole day: before its end, or from its beginning."""
    from qdrant_client import models

    bounds: Callable[..., Any] = models.Range
    bound: Any = value
    if isinstance(value, date):
        bounds, bound = models.DatetimeRange, value
        if not isinstance(value, datetime):
            bound = datetime.combine(value, datetime.min.time())
            if op in ("<=", ">"):  # behind the day's end, which is where the next begins
                op, bound = {"<=": "<", ">": ">="}[op], bound + timedelta(days=1)
    return models.FieldCondition(key=key, range=bounds(**{{"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}[op]: bound}))


def _has_path(name: str) -> bool:
    """Whether a path of JSON can name a column: in Qdrant's no quotation mark or backslash stands for itself."""
    return '"' not in name and "\\" not in name


def _path(name: str) -> str:
    """A column's name as a path of JSON."""
    return name if name.isascii() and name.replace("_", "").replace("-", "").isalnum() else f'"{name}"'
