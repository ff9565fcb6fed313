"""Writing safetensors files of a run, whatever storage it is on."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmref.run.directory import RunDir
from mmref.storage.tensor_file import Hashing, write_tensors


def write_file(run: RunDir, path: str, tensors: dict[str, Tensor], first: int) -> dict[str, Any]:
    """Write a safetensors file of the run: its {"bytes", "sha256"}. Raises StorageError."""

    def write(file: Any) -> dict[str, Any]:
        hashing = Hashing(file)
        write_tensors(hashing, tensors, {"first": str(first)})
        return {"bytes": hashing.bytes, "sha256": hashing.sha256}

    return run.write_stream(path, write)
