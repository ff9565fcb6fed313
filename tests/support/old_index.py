"""Segments as older versions wrote them: items in Parquet, features in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mmref.retrieval.segment import ITEMS, read_items


def as_of_old(segment: Path, without: str) -> None:
    """Write the items anew, without a column that there was not yet, and the features in fp32."""
    items = read_items(segment).drop_columns([without])
    (segment / ITEMS).unlink()
    pq.write_table(items, segment / "items.parquet", compression="zstd")
    features = np.load(segment / "features.npy")
    (segment / "features.npy").unlink()
    np.save(segment / "features.npy", features.astype(np.float32))
