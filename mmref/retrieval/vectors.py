"""The nearest features of a query by inner product: exactly over mapped matrices, or through a faiss IVF or HNSW index."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from mmref.errors import SearchIndexError

Kind = Literal["auto", "flat", "ivf", "hnsw"]
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]

FLAT_UP_TO = 1_000_000  # items that `auto` searches exactly
BLOCK_ROWS = 65_536  # rows gathered at a time for a search among some of them
RECALL_AT = 10
TRAINED_PER_LIST = 64  # vectors an IVF list is trained on
HNSW_LINKS, HNSW_BUILD = 32, 100
OVERFETCH = 2  # candidates for each result: 8 bits cannot tell close neighbours apart, the features can
SPLIT_ROWS = 20_000  # fewer rows than this for each thread are not worth a thread
# Two queries and more are one matrix product, which reads the features once for all of them. By default faiss asks for
# 20.
faiss.cvar.distance_compute_blas_threshold = 2


def best(scores: Floats, rows: Rows, k: int) -> tuple[Floats, Rows]:
    """The k highest of each query's scores (q, n), descending; of equal ones the lower row first. -1 rows come last."""
    order = np.lexsort((rows, -scores))[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def exact(queries: Floats, matrices: Sequence[Floats], k: int) -> tuple[Floats, Rows]:
    """Scores and rows (q, k) of the nearest among all rows of the matrices end to end. k <= rows."""
    parts = list(_parts(matrices))
    # Each part has a thread, and none of OpenMP's inside: those wait for each other by spinning, which on busy cores
    # makes a search of 40 ms take a second.
    with ThreadPoolExecutor(len(parts), initializer=faiss.omp_set_num_threads, initargs=(1,)) as pool:
        found = list(pool.map(lambda part: _knn(queries, part[1], k, part[0]), parts))
    return best(np.concatenate([s for s, _ in found], 1), np.concatenate([r for _, r in found], 1), k)


def exact_among(queries: Floats, matrices: Sequence[Floats], among: Rows, k: int) -> tuple[Floats, Rows]:
    """As `exact`, over the given rising row numbers. k <= len(among)."""
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    first = 0
    for matrix in matrices:
        inside = among[np.searchsorted(among, first) : np.searchsorted(among, first + len(matrix))]
        for start in range(0, len(inside), BLOCK_ROWS):
            chosen = inside[start : start + BLOCK_ROWS]
            found, at = _knn(queries, matrix[chosen - first], k, 0)
            joined = np.concatenate([scores, found], 1), np.concatenate([rows, chosen[at]], 1)
            scores, rows = best(*joined, k)
        first += len(matrix)
    return scores, rows


def _parts(matrices: Sequence[Floats]) -> Iterator[tuple[int, Floats]]:
    """(first row, matrix), large ones cut into a part for each thread."""
    threads = faiss.omp_get_max_threads()
    first = 0
    for matrix in matrices:
        pieces = max(1, min(threads, len(matrix) // SPLIT_ROWS))
        edges = [len(matrix) * i // pieces for i in range(pieces + 1)]
        for start, stop in pairwise(edges):
            yield first + start, matrix[start:stop]
        first += len(matrix)


def _knn(queries: Floats, matrix: Floats, k: int, first: int) -> tuple[Floats, Rows]:
    k = min(k, len(matrix))
    scores, rows = faiss.knn(queries, np.ascontiguousarray(matrix), k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows + first


class Approximate:
    """A faiss index over compressed features (8 bits a number) that proposes candidates; their scores come from the
    features themselves. Items are known to it by uid, so that it outlives removals."""

    def __init__(self, index: Any, kind: str, setting: int) -> None:
        self.index, self.kind, self.setting = index, kind, setting
        self._apply(setting)

    @classmethod
    def open(cls, path: Path, kind: str, setting: int, dim: int) -> Approximate:
        """Of features (n, dim). Raises SearchIndexError."""
        swig: Any = faiss
        try:
            index: Any = faiss.read_index(str(path))
        except (RuntimeError, MemoryError) as error:  # all that faiss raises
            raise SearchIndexError(f"{path} cannot be read ({error}): the index is damaged; make it again.") from None
        wanted = swig.IndexIVFScalarQuantizer if kind == "ivf" else swig.IndexIDMap
        sound = isinstance(index, wanted) and index.metric_type == faiss.METRIC_INNER_PRODUCT
        if sound and kind != "ivf":
            sound = isinstance(faiss.downcast_index(index.index), swig.IndexHNSWSQ)
        if not sound or index.d != dim:
            raise SearchIndexError(
                f"{path} holds a {type(index).__name__} of {index.d} numbers, not one of {kind} of {dim}: make the index again."
            )
        return cls(index, kind, setting)

    @classmethod
    def build(cls, kind: str, matrices: Sequence[Floats], uids: Rows) -> Approximate:
        """IVF with 4 sqrt(n) lists, or HNSW with 32 links."""
        count, dim = len(uids), matrices[0].shape[1]
        index: Any
        swig: Any = faiss  # its stubs know less than it offers
        eight_bits, inner_product = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        if kind == "ivf":
            lists = max(1, min(int(4 * math.sqrt(count)), count // TRAINED_PER_LIST))
            index = swig.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, lists, eight_bits, inner_product)
        else:
            graph = swig.IndexHNSWSQ(dim, eight_bits, HNSW_LINKS, inner_product)
            graph.hnsw.efConstruction = HNSW_BUILD
            index = swig.IndexIDMap(graph)
        wanted = min(count, TRAINED_PER_LIST * max(1, int(4 * math.sqrt(count))))
        index.train(gather(matrices, np.sort(np.random.default_rng(0).permutation(count)[:wanted])))
        approximate = cls(index, kind, 1)
        first = 0
        for matrix in matrices:
            approximate.add(matrix, uids[first : first + len(matrix)])
            first += len(matrix)
        return approximate

    def __len__(self) -> int:
        return int(self.index.ntotal)

    def _apply(self, setting: int) -> None:
        self.setting = setting
        if self.kind == "ivf":
            self.index.nprobe = setting
        else:
            graph: Any = faiss.downcast_index(self.index.index)
            graph.hnsw.efSearch = setting

    def add(self, features: Floats, uids: Rows) -> None:
        for start in range(0, len(uids), BLOCK_ROWS):
            at = slice(start, start + BLOCK_ROWS)
            self.index.add_with_ids(np.ascontiguousarray(features[at]), np.ascontiguousarray(uids[at]))

    def write(self, path: Path) -> None:
        faiss.write_index(self.index, str(path))
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    def search(self, queries: Floats, matrices: Sequence[Floats], uids: Rows, k: int) -> tuple[Floats, Rows]:
        """As `exact`, nearly. Where fewer than k are found, rows are -1 with scores of minus infinity."""
        removed = len(self) - len(uids)
        _, found = self.index.search(queries, min(len(self), OVERFETCH * k + min(removed, k)))
        at = np.minimum(np.searchsorted(uids, found), len(uids) - 1)
        known = (found >= 0) & (uids[at] == found)
        rows = np.where(known, at, -1)
        scores = np.einsum("qkd,qd->qk", gather(matrices, np.where(known, at, 0)), queries, optimize=True)
        return best(np.where(known, scores, -np.inf).astype(np.float32), rows, k)

    def tune(self, queries: Floats, matrices: Sequence[Floats], uids: Rows, recall: float) -> float:
        """Raise nprobe or efSearch until recall@10 against the exact search is reached; returns the recall."""
        k = min(RECALL_AT, len(uids))
        _, truth = exact(queries, matrices, k)
        highest = self.index.nlist if self.kind == "ivf" else 4096
        setting, reached = 1 if self.kind == "ivf" else 16, 0.0
        while True:
            self._apply(min(setting, highest))
            _, rows = self.search(queries, matrices, uids, k)
            reached = float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(truth, rows)]))
            if reached >= recall or setting >= highest:
                return reached
            setting *= 2


def gather(matrices: Sequence[NDArray[Any]], rows: Rows) -> NDArray[Any]:
    """Rows (any shape) of matrices that lie end to end: rows.shape + (width,)."""
    if len(matrices) == 1:
        return matrices[0][rows]
    edges = np.cumsum([len(m) for m in matrices])
    of = np.searchsorted(edges, rows, side="right")
    result = np.empty((*rows.shape, matrices[0].shape[1]), matrices[0].dtype)
    for i, matrix in enumerate(matrices):
        inside = of == i
        if inside.any():
            result[inside] = matrix[rows[inside] - (edges[i] - len(matrix))]
    return result
