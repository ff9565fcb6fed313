"""Bytes of the tensors that are alive at once: what a step takes at its peak, on any device, fake tensors included."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages made inside the `with` until they are freed; `peak` is the largest sum, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._watch(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched:
            return

        def freed(_: weakref.ref) -> None:
            del self._watched[key]
            self.live -= size

        self._watched[key] = weakref.ref(storage, freed)
        self.live += size
