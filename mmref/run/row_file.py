"""References in files: rows with optimizer state, and the id of the object behind each row.

A checkpoint's rows lie in `references-<part>.safetensors`: one file a rank that wrote them, and one for each time that
objects were added since (mmref/references/bank_rows.py). Rows are found by object id, so a file fits whatever number of
workers reads it and however the shard set has changed since.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from mmref.errors import CheckpointError
from mmref.storage.packed_strings import NAMES as ID_TENSORS
from mmref.storage.packed_strings import pack_strings, unpack_strings

CHUNK = 1 << 16  # rows read at a time
BLOCK_VALUES = 1 << 24  # numbers of references looked at at a time (64 MB)


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
        """Rows start .. stop - 1 of a tensor, mapped from the file."""
        return self._file.get_slice(name)[start : len(self) if stop is None else stop]


@contextlib.contextmanager
def row_files(folder: str, meta: dict[str, Any]) -> Iterator[list[RowFile]]:
    """The open files of a checkpoint's references, in row order. Raises CheckpointError for those of an older version."""
    with contextlib.ExitStack() as stack:
        paths = [f"{folder}/{name}" for name in meta["files"] if name.startswith("references-")]
        yield sorted((RowFile(p, stack.enter_context(safe_open(p, "pt"))) for p in paths), key=lambda f: f.first)


class StoredReferences:
    """All references (m, K, d) of a checkpoint in its files, read a slice at a time in fp32, however they were stored.

    It can be read as long as it lives, also when the files have been deleted.
    """

    def __init__(self, folder: str, meta: dict[str, Any]) -> None:
        """`folder` is on this machine. Raises CheckpointError for a checkpoint of an older version."""
        with row_files(folder, meta) as files:
            # Tensors that are mapped from a file keep it open.
            self._parts = [file.read("rows") for file in files]
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.shape = (int(self._ends[-1]), *self._parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        start, stop, _ = rows.indices(len(self))
        found, first = [], 0
        for part, end in zip(self._parts, self._ends.tolist()):
            if first < stop and end > start:
                found.append(part[max(0, start - first) : stop - first].float().numpy())
            first = end
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros((0, *self.shape[1:]), np.float32)

    def array(self) -> NDArray[np.float32]:
        """All of them: mapped where they are fp32 in one file, else read once."""
        if len(self._parts) == 1:
            return self[:]
        whole = np.empty(self.shape, np.float32)
        for rows in blocks(self):
            whole[rows] = self[rows]
        return whole


References: TypeAlias = "NDArray[np.float32] | StoredReferences"
"""(m, K, d), in memory or in files."""


def blocks(references: References) -> Iterator[slice]:
    """Slices of references that together are all of them."""
    size = max(1, BLOCK_VALUES // max(1, int(np.prod(references.shape[1:]))))
    for start in range(0, len(references), size):
        yield slice(start, start + size)


def are_set(references: References) -> NDArray[np.bool_]:
    """(m,) which objects have a reference that was set: others are zeros."""
    found = [np.abs(references[rows]).max((1, 2)) > 0 for rows in blocks(references)]
    return np.concatenate(found) if found else np.zeros(0, bool)
