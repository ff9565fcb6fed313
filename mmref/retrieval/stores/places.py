"""Which engine a URL is of: `lancedb://folder`, `qdrant://host:port`, `postgresql://host/database`, with `#table` behind it."""

from __future__ import annotations

from mmref.errors import StoreError
from mmref.retrieval.stores.store import TABLE, Store

SCHEMES = {
    "lancedb": "lancedb", "qdrant": "qdrant", "qdrants": "qdrant", "postgresql": "pgvector", "postgres": "pgvector",
}  # fmt: skip
"""Scheme of a URL -> the engine, by the name that `mmref index export --to` has for it."""


def engine_of(url: str) -> str:
    """The engine that a URL is of. Raises StoreError."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in SCHEMES or not rest:
        named = scheme if separator else url  # all of a URL may hold a password
        raise StoreError(f"{named} names no store: give lancedb://FOLDER, qdrant://HOST:PORT or postgresql://HOST/DATABASE.")
    return SCHEMES[scheme]


def open_store(url: str) -> Store:
    """The table that a URL names, which need not be there yet. Raises StoreError, ExtraMissingError."""
    engine = engine_of(url)
    place, _, table = url.partition("#")
    rest, table = place.partition("://")[2], table or TABLE
    if not table.replace("_", "").replace("-", "").isalnum() or not table.isascii():
        raise StoreError(f"a table's name has letters, digits, _ and -, found {table!r}.")
    if engine == "lancedb":
        from mmref.retrieval.stores.lance import Lance

        return Lance(rest, table)
    if engine == "qdrant":
        from mmref.retrieval.stores.qdrant import Qdrant

        return Qdrant(place, table)
    from mmref.retrieval.stores.postgres import Postgres

    return Postgres(place, table)
