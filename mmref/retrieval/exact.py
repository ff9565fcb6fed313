"""Exact search: the nearest of mapped features by inner product, wherever the processor computes it soonest.

Exact means: the best rows by the inner products of the queries with the features as they are stored, computed in fp32. What
is only proposed by a coarser product is bounded, so that no row of the best can be missed, and scored again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController

from mmref.storage.array_file import RowFile

Floats = NDArray[np.float32]
Features = NDArray[np.float16] | NDArray[np.float32]  # as stored
Rows = NDArray[np.int64]

GATHERED_ROWS = 65_536  # at a time for a search among some of them
SPLIT_ROWS = 20_000  # fewer rows than this for each thread are not worth a thread
BLOCK_ROWS = 8_192  # multiplied at a time: they stay in the processor's cache
WIDENED_ROWS = 16_384  # of fp16 compared in fp32 at a time
ROUNDED_ROWS = 512  # rounded to bf16 at a time: their fp32 stays in a core's own cache
SCANNED = 8  # so many queries and fewer are compared with each row as it is read; more are a matrix product
BF16_FROM = 7  # queries from which on a product in bf16, with what it takes to prove it, is quicker
BF16_MOST = 256  # queries multiplied at a time; their numbers fit 16 bits
BF16_K = 1_024  # the most results that are worth it
BF16_ERROR = 2.0**-8  # relative error of a number rounded to bf16
LONGEST = 1.01  # length of a feature: 1, and what rounding adds
MOST_CANDIDATES = 16_384  # of a query: where a bound leaves more, all rows are compared instead
# Two queries and more are one matrix product, which reads the features once for all of them. By default faiss asks for
# 20.
faiss.cvar.distance_compute_blas_threshold = 2


def best(scores: Floats, rows: Rows, k: int) -> tuple[Floats, Rows]:
    """The k highest of each query's scores (q, n), descending; of equal ones the lower row first. -1 rows come last."""
    order = np.lexsort((rows, -scores))[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def exact(queries: Floats, matrices: Sequence[Features], k: int) -> tuple[Floats, Rows]:
    """Scores and rows (q, k) of the nearest among all rows of the matrices end to end. k <= rows."""
    parts = list(_parts(matrices))
    # Each part has a thread, and none of OpenMP's inside: those wait for each other by spinning, which on busy cores
    # makes a search of 40 ms take a second.
    with ThreadPoolExecutor(len(parts), initializer=_alone) as pool:
        found = list(pool.map(lambda part: _nearest(queries, part[1], k, part[0]), parts))
    return best(np.concatenate([s for s, _ in found], 1), np.concatenate([r for _, r in found], 1), k)


def exact_among(queries: Floats, matrices: Sequence[Features], among: Rows, k: int) -> tuple[Floats, Rows]:
    """As `exact`, over the given rising row numbers. k <= len(among)."""
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    first = 0
    for matrix in matrices:
        inside = among[np.searchsorted(among, first) : np.searchsorted(among, first + len(matrix))]
        for start in range(0, len(inside), GATHERED_ROWS):
            chosen = inside[start : start + GATHERED_ROWS]
            found, at = _knn(queries, matrix[chosen - first], k, 0)
            joined = np.concatenate([scores, found], 1), np.concatenate([rows, chosen[at]], 1)
            scores, rows = best(*joined, k)
        first += len(matrix)
    return scores, rows


def gather(matrices: Sequence[NDArray[Any] | RowFile], rows: Rows) -> NDArray[Any]:
    """Rows (any shape) of matrices that lie end to end: rows.shape + (width,), in the widest of their types."""
    if len(matrices) == 1:
        return matrices[0][rows]
    edges = np.cumsum([len(m) for m in matrices])
    of = np.searchsorted(edges, rows, side="right")
    result = np.empty((*rows.shape, matrices[0].shape[1]), np.result_type(*(m.dtype for m in matrices)))
    for i, matrix in enumerate(matrices):
        inside = of == i
        if inside.any():
            result[inside] = matrix[rows[inside] - (edges[i] - len(matrix))]
    return result


def gather_features(matrices: Sequence[Features | RowFile], rows: Rows) -> Floats:
    """As `gather`, of features, in fp32 to compute with."""
    return widened(gather(matrices, rows))


def widened(features: NDArray[Any]) -> Floats:
    """Features in fp32; NumPy takes twenty times as long to widen fp16."""
    if features.dtype == np.float32:
        return features
    found: Floats = _tensor(np.ascontiguousarray(features)).float().numpy()
    return found


def _tensor(features: NDArray[Any]) -> torch.Tensor:
    """A tensor over an array that may be mapped to be read alone, of which PyTorch would warn. Nobody writes to it."""
    interface = features.__array_interface__
    writable = SimpleNamespace(__array_interface__=interface | {"data": (interface["data"][0], False)}, of=features)
    return torch.from_numpy(np.asarray(writable))


def _parts(matrices: Sequence[Features]) -> Iterator[tuple[int, Features]]:
    """(first row, matrix), large ones cut into a part for each thread."""
    threads = faiss.omp_get_max_threads()
    first = 0
    for matrix in matrices:
        pieces = max(1, min(threads, len(matrix) // SPLIT_ROWS))
        edges = [len(matrix) * i // pieces for i in range(pieces + 1)]
        for start, stop in pairwise(edges):
            yield first + start, matrix[start:stop]
        first += len(matrix)


@cache
def _openmp() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="openmp")


def _alone() -> None:
    """Have this thread, and no other, compute without helpers."""
    torch.get_num_threads()  # which else would set the number of this thread's helpers at its first product
    _openmp().limit(limits=1)
    faiss.omp_set_num_threads(1)


@cache
def multiplies_bf16() -> bool:
    """Whether this processor multiplies in bf16; PyTorch imitates it on others, slowly."""
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _nearest(queries: Floats, matrix: Features, k: int, first: int) -> tuple[Floats, Rows]:
    """The min(k, rows) nearest of a part whose first row has a number, in this thread."""
    k = min(k, len(matrix))
    # Features in fp32, of small indexes, are multiplied as they are sooner than they are rounded and proved.
    large = matrix.dtype == np.float16 and len(matrix) >= BLOCK_ROWS
    if large and len(queries) >= BF16_FROM and k <= BF16_K and multiplies_bf16():
        blocks = [_proved(queries[i : i + BF16_MOST], matrix, k) for i in range(0, len(queries), BF16_MOST)]
        scores, rows = (np.concatenate(parts) for parts in zip(*blocks))
        return scores, rows + first
    return _compared(queries, matrix, k, first)


def _compared(queries: Floats, matrix: Features, k: int, first: int) -> tuple[Floats, Rows]:
    """Every row compared in fp32."""
    if matrix.dtype != np.float16:
        return _knn(queries, matrix, k, first)
    if len(queries) <= SCANNED:
        scores, rows = (np.stack(parts) for parts in zip(*(_scan(query, matrix, k) for query in queries)))
        return best(scores, rows + first, k)
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    size = max(WIDENED_ROWS, 4 * k)
    wide, mapped = torch.empty((min(size, len(matrix)), matrix.shape[1])), _tensor(matrix)
    for start in range(0, len(matrix), size):
        rows_here = min(size, len(matrix) - start)
        block = wide[:rows_here].copy_(mapped[start : start + rows_here])
        found = _knn(queries, block.numpy(), k, first + start)
        scores, rows = best(np.concatenate([scores, found[0]], 1), np.concatenate([rows, found[1]], 1), k)
    return scores, rows


def _knn(queries: Floats, matrix: Features, k: int, first: int) -> tuple[Floats, Rows]:
    k, wide = min(k, len(matrix)), np.ascontiguousarray(widened(matrix))
    scores, rows = faiss.knn(queries, wide, k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, rows + first


def _scan(query: Floats, matrix: Features, k: int) -> tuple[Floats, Rows]:
    """Scores and rows (k,), in no order: faiss widens each fp16 row in registers, so that half the bytes are read."""
    swig: Any = faiss
    query, codes = np.ascontiguousarray(query), matrix.view(np.uint8)
    scores, rows = np.full(k, -np.inf, np.float32), np.full(k, -1, np.int64)
    quantizer = swig.ScalarQuantizer(matrix.shape[1], swig.ScalarQuantizer.QT_fp16)
    scanner = quantizer.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, True, None)
    scanner.set_query(swig.swig_ptr(query))
    scanner.set_list(0, 0.0)
    scanner.scan_codes(len(matrix), swig.swig_ptr(codes), None, swig.swig_ptr(scores), swig.swig_ptr(rows), k)
    return scores, rows


# -- in bf16, proved ---------------------------------------------------------------------------------------------------


def _proved(queries: Floats, matrix: Features, k: int) -> tuple[Floats, Rows]:
    """The k nearest (q, k): candidates by products in bf16, as many as its error allows to be among them, scored in fp32.

    With e the largest error of a query's products, k rows have a score of at least a - e, where a is the k-th of the coarse
    scores. So none of the best has a coarse score below a - 2 e.
    """
    asked = torch.from_numpy(np.ascontiguousarray(queries))
    coarse = asked.to(torch.bfloat16)
    columns = coarse.T.contiguous()
    lost = torch.linalg.vector_norm(asked - coarse.float(), dim=1).numpy()
    length = np.linalg.norm(queries, axis=1)
    # of the query's numbers, of the row's, and of sums of d products in fp32; that of the result depends on its size
    error = LONGEST * (lost + (BF16_ERROR + matrix.shape[1] * 2.0**-23) * length)
    found = _Candidates(len(queries), k, error)
    wide = torch.empty((ROUNDED_ROWS, matrix.shape[1]))
    narrow = torch.empty((BLOCK_ROWS, matrix.shape[1]), dtype=torch.bfloat16)
    mapped = _tensor(matrix)
    for start in range(0, len(matrix), BLOCK_ROWS):
        size = min(BLOCK_ROWS, len(matrix) - start)
        for at in range(0, size, ROUNDED_ROWS):
            some = min(ROUNDED_ROWS, size - at)
            # by way of fp32: both steps are instructions, and fp16 to bf16 is not
            narrow[at : at + some].copy_(wide[:some].copy_(mapped[start + at : start + at + some]))
        found.take(torch.mm(narrow[:size], columns), start)
    scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    for i, chosen in enumerate(found.finished()):
        if chosen is None:
            (scores[i],), (rows[i],) = _compared(queries[i : i + 1], matrix, k, 0)
        else:
            exactly = np.einsum("kd,d->k", widened(matrix[chosen]), queries[i])
            (scores[i],), (rows[i],) = best(exactly[None], chosen[None], k)
    return scores, rows


class _Candidates:
    """Rows of each query whose coarse scores are high enough, as blocks of scores come in.

    Args:
        k: results wanted of each query.
        error: of each query's coarse scores (q,), before they were rounded to bf16 themselves.
    """

    def __init__(self, queries: int, k: int, error: Floats) -> None:
        self.k, self.error = k, error
        self.left_out = np.zeros(queries, bool)  # whose bound says too little
        # As integers bf16 numbers above 0 keep their order, and those below 0 lie below all of these.
        self._least = np.zeros(queries, np.int16)
        self._found: list[tuple[Rows, NDArray[np.int16], Floats]] = []  # rows, queries, scores
        self._blocks, self._pending = 0, 0

    def take(self, scores: torch.Tensor, first: int) -> None:
        """A block (b, q) of bf16 scores, of rows from `first` on."""
        if not self._blocks:
            self._set_least(np.partition(scores.float().numpy(), -min(self.k, len(scores)), 0)[-min(self.k, len(scores))])
        bits = scores.view(torch.int16).numpy()
        hits = np.flatnonzero(bits >= self._least)
        rows, queries = np.divmod(hits, bits.shape[1])
        values = (bits.reshape(-1)[hits].astype(np.int32) << 16).view(np.float32)
        # 16 bits are grouped by counting, wider numbers by comparing
        self._found.append((rows + first, queries.astype(np.int16), values))
        self._blocks, self._pending = self._blocks + 1, self._pending + len(hits)
        if self._blocks & (self._blocks - 1) == 0 or self._pending > MOST_CANDIDATES * len(self.error):
            self._tighten()

    def _set_least(self, kth: Floats) -> None:
        """From the k-th best coarse scores so far. Queries whose bound is not above 0 are left out."""
        below = kth - 2 * self.error
        below = below - 2.1 * BF16_ERROR * (np.abs(kth) + 2 * self.error)  # both scores are rounded
        self.left_out |= ~(below > 0)
        bits = (np.maximum(below, 0).astype(np.float32).view(np.int32) >> 16).astype(np.int16)  # rounded down
        self._least = np.where(self.left_out, np.iinfo(np.int16).max, bits)

    def _tighten(self) -> None:
        """Raise the bounds by what has been found, and drop what is below."""
        rows, queries, values = (np.concatenate(parts) for parts in zip(*self._found))
        order = np.argsort(queries, kind="stable")
        edges = np.searchsorted(queries[order], np.arange(len(self.error) + 1, dtype=np.int16))
        kth = np.full(len(self.error), -np.inf, np.float32)
        for i, (start, stop) in enumerate(pairwise(edges)):
            if stop - start >= self.k and not self.left_out[i]:
                kth[i] = np.partition(values[order[start:stop]], -self.k)[-self.k]
        self._set_least(kth)
        bits = (values.view(np.int32) >> 16).astype(np.int16)
        kept = bits >= self._least[queries]
        many = np.bincount(queries[kept], minlength=len(self.error)) > MOST_CANDIDATES
        if many.any():
            self.left_out |= many
            self._least = np.where(self.left_out, np.iinfo(np.int16).max, self._least)
            kept &= ~self.left_out[queries]
        self._found, self._pending = [(rows[kept], queries[kept], values[kept])], int(kept.sum())

    def finished(self) -> Iterator[Rows | None]:
        """Rising rows of the candidates of each query, None where all rows are to be compared."""
        self._tighten()
        rows, queries, _ = self._found[0]
        for i in range(len(self.error)):
            yield None if self.left_out[i] else rows[queries == i]
