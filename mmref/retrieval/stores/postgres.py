"""PostgreSQL with the extension pgvector: a table of a database."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmref.errors import StoreError
from mmref.extras import need
from mmref.retrieval.filters import Condition
from mmref.retrieval.stores.sql import Dialect, where_clause
from mmref.retrieval.stores.store import CODES, FEATURE, About, Conditions, Found, padded

CODE_TYPES = {
    "near": np.dtype("<i4"),
    "weights": np.dtype("<f4"),
}  # in columns of bytes: arrays of PostgreSQL come value by value
MOST_NUMBERS = 16_000  # of a vector of pgvector
CONNECT_S = 10


class Postgres:
    """A table at a URL of libpq. Raises StoreError, ExtraMissingError."""

    def __init__(self, url: str, table: str) -> None:
        need("pgvector", "a store of postgresql://")
        import psycopg
        from pgvector.psycopg import register_vector
        from psycopg.types import TypeInfo

        self.table, self._failures = table, (psycopg.Error, OSError)

        def connected() -> Any:
            connection = psycopg.connect(url, autocommit=True, connect_timeout=CONNECT_S)
            connection.execute("SET TIME ZONE 'UTC'")  # in which a time is of a day
            if TypeInfo.fetch(connection, "vector") is not None:  # else nothing was exported yet
                register_vector(connection)
            return connection

        self._connected, self._register = connected, register_vector
        try:
            self._connection = connected()
            there = self._run("SELECT obj_description(to_regclass(%s)), to_regclass(%s)", [f'"{table}"', f'"{table}"'])[0]
        except self._failures as error:
            raise self._failed(error) from None
        self.about = About.of(there[0], f"table {table}") if there[1] else None

    def _run(self, query: Any, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        if self._connection.closed:  # the server was away
            self._connection = self._connected()
        with self._connection.cursor(binary=True) as cursor:
            cursor.execute(query, values)
            return cursor.fetchall() if cursor.description else []

    def write(self, schema: pa.Schema, batches: Iterable[pa.RecordBatch], about: About) -> None:
        """As Store.write: one transaction makes a new table and drops the old one."""
        from psycopg import sql

        if about.dim > MOST_NUMBERS:
            raise StoreError(
                f"pgvector takes vectors of at most {MOST_NUMBERS:,} numbers, and these features have {about.dim:,}."
            )
        kinds = {field.name: _kind(field, about.dim) for field in schema}
        new, old = sql.Identifier(f"{self.table}.new"), sql.Identifier(self.table)
        columns = sql.SQL(", ").join(sql.SQL("{} {}").format(sql.Identifier(n), sql.SQL(kind)) for n, kind in kinds.items())
        names = sql.SQL(", ").join(map(sql.Identifier, kinds))
        try:
            self._run("CREATE EXTENSION IF NOT EXISTS vector")  # here alone: who searches may have no right to, or be a standby
            self._register(self._connection)
            with self._connection.transaction(), self._connection.cursor() as cursor:
                cursor.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(new))
                cursor.execute(sql.SQL("CREATE TABLE {} ({}, PRIMARY KEY (uid))").format(new, columns))
                with cursor.copy(sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(new, names)) as copy:
                    copy.set_types([kind.split("(")[0].split(" ")[0] for kind in kinds.values()])
                    for batch in batches:
                        for row in zip(*(_values(batch, name) for name in kinds)):
                            copy.write_row(row)
                cursor.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(new, sql.Literal(about.to_json())))
                cursor.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(old))
                cursor.execute(sql.SQL("ALTER TABLE {} RENAME TO {}").format(new, old))
            self._run(sql.SQL("ANALYZE {}").format(old))
        except self._failures as error:
            raise self._failed(error) from None
        self.about = about

    def says(self, condition: Condition) -> bool:
        """As Store.says: it has SQL."""
        return True

    def search(self, queries: NDArray[np.float32], k: int, where: Conditions, arrays: Sequence[str] = ()) -> Found:
        """As Store.search."""
        from psycopg import sql

        condition, values = translated(where)
        more = sql.SQL("").join(sql.SQL(", {}").format(sql.Identifier(name)) for name in arrays)
        asked = sql.SQL(
            "SELECT uid, -({f} <#> %s) AS score{more} FROM {table} WHERE {where} ORDER BY {f} <#> %s, uid LIMIT %s"
        ).format(f=sql.Identifier(FEATURE), more=more, table=sql.Identifier(self.table), where=condition)
        found = []
        try:
            for query in queries:
                rows = self._run(asked, [query, *values, query, k])
                columns: list[Any] = list(zip(*rows)) or [() for _ in range(2 + len(arrays))]
                one: dict[str, NDArray[Any]] = {"uid": np.array(columns[0], np.int64), "score": np.array(columns[1], np.float32)}
                found.append(one | {name: _matrix(name, columns[2 + i]) for i, name in enumerate(arrays)})
        except self._failures as error:
            raise self._failed(error) from None
        return padded(found, k, arrays)

    def count(self, where: Conditions) -> int:
        """As Store.count."""
        from psycopg import sql

        condition, values = translated(where)
        try:
            asked = sql.SQL("SELECT count(*) FROM {} WHERE {}").format(sql.Identifier(self.table), condition)
            return int(self._run(asked, values)[0][0])
        except self._failures as error:
            raise self._failed(error) from None

    def close(self) -> None:
        """End the connection."""
        self._connection.close()

    def _failed(self, error: Exception) -> StoreError:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return StoreError(f"PostgreSQL failed at table {self.table}: {said}")  # the URL may hold a password


def translated(where: Conditions) -> tuple[Any, list[Any]]:
    """Conditions as SQL with places for values, and these."""
    from psycopg import sql

    values: list[Any] = []

    def place(value: Any) -> str:
        values.append(value)
        return "%s"

    def named(name: str) -> str:
        return sql.Identifier(name).as_string(None).replace("%", "%%")  # a single one is a place

    clause: Any = where_clause(where, Dialect(named, place, "text", "float8", ' COLLATE "C"'))
    return sql.SQL(clause), values


def _kind(field: pa.Field, dim: int) -> str:
    """A column's type in PostgreSQL. Raises StoreError."""
    if field.name == FEATURE:
        return f"vector({dim})"
    if field.name in CODES:
        return "bytea"
    kind = field.type
    for test, name in (
        (pa.types.is_boolean, "bool"),
        (pa.types.is_integer, "int8"),
        (pa.types.is_floating, "float8"),
        (pa.types.is_date, "date"),
        (lambda of: pa.types.is_timestamp(of) and of.tz is not None, "timestamptz"),
        (pa.types.is_timestamp, "timestamp"),
        (lambda of: pa.types.is_string(of) or pa.types.is_large_string(of) or pa.types.is_null(of), "text"),
    ):
        if test(kind):
            return name
    raise StoreError(f"the column {field.name!r} is of type {kind}, for which a table of PostgreSQL has no column here.")


def _values(batch: pa.RecordBatch, name: str) -> Iterable[Any]:
    """A column's values, row by row, as psycopg sends them."""
    column = batch.column(name)
    if name == FEATURE or name in CODES:
        rows = column.flatten().to_numpy(zero_copy_only=False).reshape(len(batch), -1)
        return rows if name == FEATURE else (row.astype(CODE_TYPES[name]).tobytes() for row in rows)
    return [value.replace("\0", "") if isinstance(value, str) else value for value in column.to_pylist()]


def _matrix(name: str, column: Sequence[Any]) -> NDArray[Any]:
    """(n, width) of a column."""
    if name in CODES:
        return (
            np.frombuffer(b"".join(column), CODE_TYPES[name]).reshape(len(column), -1) if column else np.zeros((0, 0), np.float32)
        )
    return np.array([value.to_numpy() for value in column], np.float32).reshape(len(column), -1)
