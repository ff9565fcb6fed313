"""Rows of an index as one Parquet file, for whatever reads such."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmref.errors import StoreError
from mmref.retrieval.stores.store import KEY, About


def write_parquet(path: str, schema: pa.Schema, batches: Iterable[pa.RecordBatch], about: About) -> None:
    """Write the file, which appears as a whole or not at all. Raises StoreError."""
    partial = Path(f"{path}.partial")
    try:
        with pq.ParquetWriter(partial, schema.with_metadata({KEY: about.to_json()}), compression="zstd") as writer:
            for batch in batches:
                writer.write_batch(batch)
        os.replace(partial, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error}.") from None
    finally:
        partial.unlink(missing_ok=True)
