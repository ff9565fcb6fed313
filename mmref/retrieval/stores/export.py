"""`mmref index export`: the rows of an index, written to an engine or a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmref.retrieval import bundle
from mmref.retrieval.exact import widened
from mmref.retrieval.manifest import Manifest
from mmref.retrieval.segment import Segment, join_items, open_segments
from mmref.retrieval.stores.parquet_file import write_parquet
from mmref.retrieval.stores.places import open_store
from mmref.retrieval.stores.store import CODES, FEATURE, OWN, UID, About, check_columns

ROWS = 8192  # at a time
HIDDEN = ("offset", "length", "file_stamp", "file_sha256")  # of items: where bytes lie, which means something here alone


def export_index(index: str, engine: str, place: str) -> About:
    """Write all rows of an index to the table at a URL, or to a Parquet file, in the place of what was there.

    Args:
        engine: parquet, lancedb, qdrant or pgvector.
        place: a path for parquet; else a URL as of `open_store`.

    Raises:
        SearchIndexError: no index, or a column with a name of ours. StoreError, ExtraMissingError.
    """
    folder = Path(index)
    manifest = Manifest.read(folder)
    bundle.check_model(folder, manifest.model)
    segments = open_segments(folder, manifest)
    items = join_items([s.items for s in segments])
    names = [name for name in items.column_names if name not in HIDDEN]
    check_columns(names, index)
    codes = [name for name in CODES if all(name in s.codes for s in segments)]
    about = About(manifest.items, manifest.dim, manifest.model, manifest.generation, bool(codes))
    schema = store_schema(items.schema, names, segments[0], codes)
    batches = _batches(items, segments, schema)
    if engine == "parquet":
        write_parquet(place, schema, batches, about)
    else:
        store = open_store(place)
        try:
            store.write(schema, batches, about)
        finally:
            store.close()
    return about


def store_schema(items: pa.Schema, names: list[str], segment: Segment, codes: list[str]) -> pa.Schema:
    """Columns of an export: those of every row, metadata, the feature, and sparse codes where there are any."""
    own = [pa.field(UID, pa.int64(), False), *(items.field(name) for name in OWN[1:])]
    metadata = [items.field(name) for name in names if name not in OWN]
    arrays = [pa.field(FEATURE, pa.list_(pa.float32(), segment.features.shape[1]), False)]
    for name in codes:
        array = segment.codes[name]
        arrays.append(pa.field(name, pa.list_(pa.from_numpy_dtype(array.dtype), array.shape[1]), False))
    return pa.schema([*own, *metadata, *arrays])


def _batches(items: pa.Table, segments: list[Segment], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    first = 0
    for segment in segments:
        for start in range(0, len(segment), ROWS):
            stop = min(start + ROWS, len(segment))
            some = items.slice(first + start, stop - start)
            columns = []
            for field in schema:
                if field.name == UID:
                    columns.append(pa.array(segment.uids[start:stop], pa.int64()))
                elif field.name == FEATURE or field.name in CODES:
                    array = segment.features if field.name == FEATURE else segment.codes[field.name]
                    some_rows = np.ascontiguousarray(array[start:stop])
                    values = pa.array((widened(some_rows) if field.name == FEATURE else some_rows).reshape(-1))
                    columns.append(pa.FixedSizeListArray.from_arrays(values, type=field.type))
                else:
                    columns.append(some[field.name].combine_chunks().cast(field.type))
            yield pa.RecordBatch.from_arrays(columns, schema=schema)
        first += len(segment)
