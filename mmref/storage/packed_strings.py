"""Strings as two arrays, for files that hold arrays alone (safetensors): their UTF-8 bytes end to end, and where each ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

NAMES = ("object_id_bytes", "object_id_ends")
"""What the two arrays are called where the strings are the ids of the objects behind rows."""


def pack_strings(strings: pa.LargeStringArray | Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of n strings, (total,), and the end of each, (n,)."""
    array = strings if isinstance(strings, pa.LargeStringArray) else pa.array(strings, pa.large_string())
    if not len(array):
        return np.zeros(0, np.uint8), np.zeros(0, np.int64)
    _, offsets, data = array.buffers()
    at = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    text = np.frombuffer(data, np.uint8)[at[0] : at[-1]] if at[-1] > at[0] else np.zeros(0, np.uint8)
    return text.copy(), at[1:] - at[0]


def unpack_strings(data: NDArray[np.uint8], ends: NDArray[np.int64]) -> pa.LargeStringArray:
    """The inverse of `pack_strings`, without a copy."""
    offsets = np.concatenate([[0], ends]).astype(np.int64)
    return pa.LargeStringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(data))
