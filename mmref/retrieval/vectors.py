"""The nearest features of a query by inner product through a faiss IVF, HNSW or IVF-PQ index: it proposes, features decide."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from mmref.errors import SearchIndexError
from mmref.retrieval.exact import Features, Floats, Rows, best, exact, gather_features, widened
from mmref.storage.array_file import RowFile

Kind = Literal["auto", "flat", "ivf", "hnsw", "ivfpq"]

BLOCK_ROWS = 65_536  # added at a time
RECALL_AT = 10
TRAINED_PER_LIST = 64  # vectors an IVF list is trained on
MOST_TRAINED = 500_000  # vectors that are copied to train on, whatever the number of lists
HNSW_LINKS, HNSW_BUILD = 32, 100
OVERFETCH = 2  # candidates for each result: 8 bits cannot tell close neighbours apart, the features can
WIDENED = 4  # times as many are asked for again, where removed items fill the places
PQ_NUMBERS, PQ_MOST_BYTES, PQ_BITS = 4, 64, 8  # of IVF-PQ: numbers to a byte, bytes of a vector, bits to each
PQ_CANDIDATES = (40, 80, 160, 320, 640)  # of IVF-PQ, compared by their features: the first that reaches the recall is kept


def code_bytes(dim: int) -> int:
    """Bytes that IVF-PQ keeps of a vector: one for four numbers, 64 at most."""
    return max(n for n in range(1, min(PQ_MOST_BYTES, max(1, dim // PQ_NUMBERS)) + 1) if dim % n == 0)


class Approximate:
    """A faiss index over compressed features that proposes candidates; their scores come from the features themselves. Items
    are known to it by uid, so that it outlives removals.

    Args:
        setting: nprobe of IVF and IVF-PQ, efSearch of HNSW.
        candidates: the least compared by their features; twice the results are in any case.
    """

    def __init__(self, index: Any, kind: str, setting: int, candidates: int = 0) -> None:
        self.index, self.kind, self.candidates = index, kind, candidates
        self._apply(setting)

    @classmethod
    def open(cls, path: Path, kind: str, setting: int, dim: int, candidates: int = 0, writable: bool = False) -> Approximate:
        """Of features (n, dim). Raises SearchIndexError.

        Args:
            writable: it will be added to. Else the lists of IVF-PQ stay on the disk, mapped.
        """
        swig: Any = faiss
        mapped = kind == "ivfpq" and not writable
        try:
            index: Any = faiss.read_index(str(path), swig.IO_FLAG_MMAP if mapped else 0)
        except (RuntimeError, MemoryError) as error:  # all that faiss raises
            raise SearchIndexError(f"{path} cannot be read ({error}): the index is damaged; make it again.") from None
        wanted = {"ivf": swig.IndexIVFScalarQuantizer, "hnsw": swig.IndexIDMap, "ivfpq": swig.IndexIVFPQ}[kind]
        sound = isinstance(index, wanted) and index.metric_type == faiss.METRIC_INNER_PRODUCT
        if sound and kind == "hnsw":
            sound = isinstance(faiss.downcast_index(index.index), swig.IndexHNSWSQ)
        if not sound or index.d != dim:
            raise SearchIndexError(
                f"{path} holds a {type(index).__name__} of {index.d} numbers, not one of {kind} of {dim}: make the index again."
            )
        if mapped:  # by default each search would start 32 threads to read ahead
            swig.downcast_InvertedLists(index.invlists).prefetch_nthread = 0
        return cls(index, kind, setting, candidates)

    @classmethod
    def build(
        cls, kind: str, matrices: Sequence[Features], uids: Rows, fill: Callable[[Approximate], None] | None = None
    ) -> Approximate:
        """IVF or IVF-PQ with 4 sqrt(n) lists, or HNSW with 32 links, trained on a sample.

        Args:
            fill: adds all features to what is trained; by default they are added here, in blocks.
        """
        count, dim = len(uids), matrices[0].shape[1]
        index: Any
        swig: Any = faiss  # its stubs know less than it offers
        eight_bits, inner_product = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        wanted = min(count, MOST_TRAINED, TRAINED_PER_LIST * max(1, int(4 * math.sqrt(count))))
        lists = max(1, min(int(4 * math.sqrt(count)), count // TRAINED_PER_LIST))
        if kind == "ivfpq":
            bits = min(PQ_BITS, max(1, int(math.log2(wanted))))  # each code is a cluster of its own in training
            index = swig.IndexIVFPQ(faiss.IndexFlatIP(dim), dim, lists, code_bytes(dim), bits, inner_product)
        elif kind == "ivf":
            index = swig.IndexIVFScalarQuantizer(faiss.IndexFlatIP(dim), dim, lists, eight_bits, inner_product)
        else:
            graph = swig.IndexHNSWSQ(dim, eight_bits, HNSW_LINKS, inner_product)
            graph.hnsw.efConstruction = HNSW_BUILD
            index = swig.IndexIDMap(graph)
        sample = gather_features(matrices, np.sort(np.random.default_rng(0).permutation(count)[:wanted]))
        index.train(np.repeat(sample, 2, 0) if count == 1 else sample)  # one bit has two codes already
        approximate = cls(index, kind, 1)
        if fill is not None:
            fill(approximate)
            return approximate
        first = 0
        for matrix in matrices:
            approximate.add(matrix, uids[first : first + len(matrix)])
            first += len(matrix)
        return approximate

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def spares_memory(self) -> bool:
        """Whether searches are to hold nothing of the features: the kind is chosen where memory is short."""
        return self.kind == "ivfpq"

    def _apply(self, setting: int) -> None:
        self.setting = setting
        if self.kind != "hnsw":
            self.index.nprobe = setting
        else:
            graph: Any = faiss.downcast_index(self.index.index)
            graph.hnsw.efSearch = setting

    def add(self, features: Features, uids: Rows) -> None:
        """Features (n, d) of items of these uids, a block at a time."""
        for start in range(0, len(uids), BLOCK_ROWS):
            at = slice(start, start + BLOCK_ROWS)
            self.index.add_with_ids(np.ascontiguousarray(widened(features[at])), np.ascontiguousarray(uids[at]))

    def merge(self, path: Path) -> None:
        """Add what `write` wrote of an index with the same training, which has no uid in common."""
        self.index.merge_from(faiss.read_index(str(path)), 0)

    def write(self, path: Path) -> None:
        faiss.write_index(self.index, str(path))
        with open(path, "rb") as file:
            os.fsync(file.fileno())

    def search(self, queries: Floats, matrices: Sequence[Features | RowFile], uids: Rows, k: int) -> tuple[Floats, Rows]:
        """As `exact`, nearly. Where fewer than k are found, rows are -1 with scores of minus infinity."""
        removed = len(self) - len(uids)
        count = asked = min(len(self), max(self.candidates, OVERFETCH * k) + min(removed, k))
        rows, more = self._proposed(queries, uids, count)
        # Items that were removed are proposed all the same, and where they are the nearest of a query they take its places.
        while len(short := np.flatnonzero(more & (np.count_nonzero(rows >= 0, axis=1) < min(k, len(uids))))):
            asked = min(count + removed, WIDENED * asked)
            wider, more[short] = self._proposed(queries[short], uids, asked)
            rows[short] = np.take_along_axis(wider, np.argsort(wider < 0, axis=1, kind="stable")[:, :count], 1)
        known = rows >= 0
        scores = np.einsum("qkd,qd->qk", gather_features(matrices, np.maximum(rows, 0)), queries, optimize=True)
        return best(np.where(known, scores, -np.inf).astype(np.float32), rows, k)

    def _proposed(self, queries: Floats, uids: Rows, count: int) -> tuple[Rows, NDArray[np.bool_]]:
        """Rows (q, count) that the index proposes, the best first, -1 for what was removed and where no more are found; and
        whether a query that asks for more may find more (q,)."""
        count = min(count, len(self))
        _, found = self.index.search(queries, count)
        at = np.minimum(np.searchsorted(uids, found), len(uids) - 1)
        return np.where((found >= 0) & (uids[at] == found), at, -1), (found[:, -1] >= 0) & (count < len(self))

    def tune(self, queries: Floats, matrices: Sequence[Features], uids: Rows, recall: float) -> float:
        """Raise nprobe or efSearch until recall@10 against the exact search is reached; returns the recall. Of IVF-PQ also as
        many candidates are compared as it takes."""
        k = min(RECALL_AT, len(uids))
        _, truth = exact(queries, matrices, k)
        highest = 4096 if self.kind == "hnsw" else self.index.nlist
        setting, tried = 16 if self.kind == "hnsw" else 1, PQ_CANDIDATES if self.kind == "ivfpq" else (0,)

        def reached(candidates: int) -> float:
            self.candidates = candidates
            _, rows = self.search(queries, matrices, uids, k)
            return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(truth, rows)]))

        while True:
            self._apply(min(setting, highest))
            found = reached(tried[-1])
            if found >= recall:
                return next(share for candidates in tried if (share := reached(candidates)) >= recall)
            if setting >= highest:
                return found
            setting *= 2
