"""Queries shared out over processes: each ranks its chunks, and all get the results of every query."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def _as_it_is(rows: NDArray[Any]) -> NDArray[Any]:
    return rows


@dataclass(frozen=True)
class QueryShare:
    """One of `parts` equal shares of the queries: chunks part, part + parts, ...

    The chunks are the same whatever the number of parts, so products of their features are so to the last bit.

    Args:
        gather: rows (n, ...) of this part to those of all parts in their order, (parts n, ...); every part calls it.
        device: where scores are made and ranked; None: in memory, by NumPy.
    """

    part: int = 0
    parts: int = 1
    gather: Callable[[NDArray[Any]], NDArray[Any]] = _as_it_is
    device: torch.device | None = None

    def chunks(self, count: int, size: int) -> Iterator[slice]:
        """This part's chunks of `count` queries, `size` queries in each but the last."""
        for start in range(self.part * size, count, self.parts * size):
            yield slice(start, min(start + size, count))

    def together(self, own: Sequence[NDArray[Any]], count: int, size: int, width: int, dtype: Any = np.float64) -> NDArray[Any]:
        """Rows of every query (count, width), of those (n, width) that each part has for each of its `chunks` (collective)."""
        rounds = -(-count // (size * self.parts))
        rows = np.zeros((rounds * size, width), dtype)  # a part with less is filled up
        if own:
            found = np.concatenate(own)
            rows[: len(found)] = found
        everyone = self.gather(rows).reshape(self.parts, rounds, size, width)
        return everyone.swapaxes(0, 1).reshape(-1, width)[:count]

    def scorer(self, queries: NDArray[np.float32], gallery: NDArray[np.float32]) -> Callable[[slice], Any]:
        """What gives the dot products (n, G) of some queries with the gallery: an array, or a tensor on the device."""
        if self.device is None:
            return lambda rows: queries[rows] @ gallery.T
        asked, found = self.put(queries), self.put(gallery)
        return lambda rows: asked[rows] @ found.T

    def put(self, array: NDArray[Any]) -> Tensor:
        """An array on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)


ALONE = QueryShare()
