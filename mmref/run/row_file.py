"""References in files: rows with optimizer state, and the id of the object behind each row.

A checkpoint's rows lie in `references-<part>.safetensors`: one file a rank that wrote them, and one for each time that
objects were added since (mmref/references/bank_rows.py). Rows are found by object id, so a file fits whatever number of
workers reads it and however the shard set has changed since.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch
from safetensors import safe_open
from torch import Tensor

from mmref.errors import CheckpointError
from mmref.storage.packed_strings import NAMES as ID_TENSORS
from mmref.storage.packed_strings import pack_strings, unpack_strings

CHUNK = 1 << 16  # rows read at a time


def pack_ids(object_ids: pa.LargeStringArray) -> dict[str, Tensor]:
    """Ids as the tensors that a file of rows holds them in."""
    return dict(zip(ID_TENSORS, map(torch.from_numpy, pack_strings(object_ids))))


class RowFile:
    """One file of rows, read a slice at a time."""

    def __init__(self, path: str, file: Any) -> None:
        self.name, self._file = path.rsplit("/", 1)[-1], file
        self.first = int(file.metadata()["first"])  # files in this order are the rows in order
        names = set(file.keys())
        if not names.issuperset(ID_TENSORS):
            raise CheckpointError(
                f"{path} does not say which objects its references belong to: an older version of mmref wrote it. Train "
                "again with this one."
            )
        self.object_ids = unpack_strings(*(file.get_tensor(name).numpy() for name in ID_TENSORS))
        self.names = sorted(names - set(ID_TENSORS))

    def __len__(self) -> int:
        return len(self.object_ids)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start .. stop - 1 of a tensor."""
        return self._file.get_slice(name)[start : len(self) if stop is None else stop]


@contextlib.contextmanager
def row_files(folder: str, meta: dict[str, Any]) -> Iterator[list[RowFile]]:
    """The open files of a checkpoint's references, in row order. Raises CheckpointError for those of an older version."""
    with contextlib.ExitStack() as stack:
        paths = [f"{folder}/{name}" for name in meta["files"] if name.startswith("references-")]
        yield sorted((RowFile(p, stack.enter_context(safe_open(p, "pt"))) for p in paths), key=lambda f: f.first)
