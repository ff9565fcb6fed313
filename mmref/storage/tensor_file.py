"""Writing safetensors files as a stream: to any file system, hashed on the way, without a second copy in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 24  # bytes handed to the file at a time

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Hashing:
    """A file being written, its bytes counted and hashed."""

    def __init__(self, file: Any) -> None:
        self.file, self.bytes, self._hash = file, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            self._hash.update(piece)
            self.file.write(piece)
            self.bytes += len(piece)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True)
class Pieces:
    """A tensor that is made as it is written: its rows, some at a time."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Iterable[Tensor]


def write_tensors(file: Any, tensors: Mapping[str, Tensor | Pieces], metadata: dict[str, str] | None = None) -> None:
    """Write contiguous host tensors by name in the safetensors format."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    # The widest come first, so that every tensor starts at a multiple of its element size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        for piece in tensor.rows if isinstance(tensor, Pieces) else [tensor]:
            if piece.numel():
                file.write(piece.detach().reshape(-1).view(torch.uint8).numpy().data)


def sha256_of_rest(file: Any) -> str:
    """SHA-256 of what is left of a file, hexadecimal."""
    found = hashlib.sha256()
    while piece := file.read(PIECE):
        found.update(piece)
    return found.hexdigest()
