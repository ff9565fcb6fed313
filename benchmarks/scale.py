"""A large index in a process of its own: what `search.py scale` makes, opens and measures, and what it is compared with.

The index is written by the code of `mmref index`: segment, choice of the kind, building, tuning, manifest. Only images and
model are left out: features are around centers that a model or a random generator gives.

python benchmarks/scale.py FOLDER [--faiss FILE]    (by `search.py scale`: opens, searches and prints figures as JSON)
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import pyarrow as pa
from numpy.typing import NDArray

from mmref.evaluate.refinement import RefinementSettings
from mmref.retrieval import index
from mmref.retrieval.exact import exact, gather_features, widened
from mmref.retrieval.manifest import Manifest
from mmref.retrieval.ranking import Encoded, Ranker
from mmref.retrieval.segment import Segment, open_segments, write_segment
from mmref.retrieval.size import chosen_kind, described
from mmref.retrieval.vector_file import build_vectors, open_vectors

Floats = NDArray[np.float32]
Search = Callable[[Floats, int], NDArray[np.int64]]  # queries (q, d), k -> rows (q, k)
BLOCK = 50_000
BATCH = 32  # queries that wait are answered together, as in the service
CLIENTS = (1, 8, 32)
# The 4 GB of memory that `clip-retrieval index` gives autofaiss, and autofaiss's own 10 ms a query. As the index is to be mapped,
# HNSW is no choice.
OTHERS_MEMORY, OTHERS_MS = 4e9, 10.0


def unit(x: Floats) -> Floats:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def around(centers: Floats, count: int, noise: float, seed: int) -> Floats:
    """Unit vectors (count, d), each a center's with noise of a length of `noise`."""
    rng = np.random.default_rng(seed)
    some = centers[rng.integers(0, len(centers), count)]
    return unit(some + noise / np.sqrt(some.shape[1]) * rng.standard_normal(some.shape, dtype=np.float32))


def centers_of(args: argparse.Namespace) -> tuple[Floats, Floats | None]:
    """Features of real images, with those of their sentences; without a model random unit vectors, one for 500 items."""
    if args.model is None:
        rng = np.random.default_rng(0)
        return unit(rng.standard_normal((max(100, args.items // 500), args.dim), dtype=np.float32)), None
    from mmref.retrieval.searcher import Query, Searcher

    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        index.create(args.data, args.model, f"{folder}/index", workers=0)
        searcher = Searcher(f"{folder}/index")
        captions = sorted({c for c in searcher.items["caption"].to_pylist() if c})
        np.random.default_rng(0).shuffle(captions)
        return widened(np.array(searcher.segments[0].features)), searcher.encode([Query(c) for c in captions]).features


def chunks(centers: Floats, items: int, noise: float) -> Iterator[tuple[pa.Table, dict[str, Any]]]:
    for start in range(0, items, BLOCK):
        n = min(BLOCK, items - start)
        names = [f"{i:09d}.jpg" for i in range(start, start + n)]
        rows = pa.table({"id": names, "path": [f"/photos/{name}" for name in names], "object_id": pa.nulls(n, pa.string())})
        rows = rows.append_column("offset", pa.array(np.zeros(n, np.int64)))
        yield (
            rows,
            {
                "position": np.arange(n),
                "features": around(centers, n, noise, seed=start + 1),
                "size": np.zeros((n, 2), np.int32),
                "thumbnail_bytes": np.zeros(n, np.int64),
                "thumbnails": np.zeros(0, np.uint8),
            },
        )


def scale(args: argparse.Namespace) -> dict[str, Any]:
    centers, sentences = centers_of(args)
    tuned_on, asked = (around(centers, args.queries, args.noise, seed) for seed in (-1 % 2**32, -2 % 2**32))
    if sentences is not None:
        tuned_on, asked = sentences[0::2][: args.queries], sentences[1::2][: args.queries]
    dim = centers.shape[1]
    result: dict[str, Any] = {"items": args.items, "dim": dim, "noise": args.noise, "centers": len(centers)}
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        began = time.perf_counter()
        write_segment(folder / "segments" / "000000", chunks(centers, args.items, args.noise), 0, args.items, dim)
        segment = Segment(folder / "segments" / "000000")
        result["write_s"] = time.perf_counter() - began
        print(f"{args.items:,} x {dim} written in {result['write_s']:.0f} s", flush=True)
        kind, why = chosen_kind(args.kind, args.items, dim, args.memory)
        print(why, flush=True)
        began = time.perf_counter()
        vectors = build_vectors(folder, kind, 1, [segment], tuned_on, args.recall, args.workers)
        result["build_s"] = time.perf_counter() - began
        manifest = Manifest(1, args.items, dim, args.items, ["000000"], "", kind, vectors)
        manifest.write(folder)
        result |= {"kind": kind, "vectors": vectors, "told": described(folder, manifest, [segment])}
        result["build_peak_mb"] = peak_mb()
        print(f"{kind}, built in {result['build_s']:.0f} s: {vectors}", flush=True)
        truth = exact(asked, [segment.features], 10)[1]
        np.savez(folder / "asked.npz", queries=asked, truth=truth)
        result |= opened(folder)
        print(json.dumps({name: result[name] for name in ("recall@10", "memory_mb", "p50_ms")}), flush=True)
        if not args.alone:
            result["IndexFlatIP"] = against_flat(folder, segment)
            result["clip-retrieval"] = against_others(folder, segment)
    return result


def against_flat(folder: Path, segment: Segment) -> dict[str, Any]:
    """Plain faiss, exact, over features in fp32, where they fit into half of the free memory."""
    needed = 4 * segment.features.size
    if needed > psutil.virtual_memory().available / 2:
        return {"left_out": f"{needed / 1e9:.1f} GB of features do not fit into half of the free memory"}
    began = time.perf_counter()
    plain = faiss.IndexFlatIP(segment.features.shape[1])
    filled(plain, segment)
    faiss.write_index(plain, str(folder / "flat.faiss"))
    del plain
    return {"build_s": time.perf_counter() - began, **opened(folder, "flat.faiss")}


def against_others(folder: Path, segment: Segment) -> dict[str, Any]:
    """An index as autofaiss chooses it for clip-retrieval (autofaiss/external/optimize.py, get_optimal_index_keys_v2), mapped.

    Of a million items on autofaiss takes 16,384 lists, from ten million on 65,536, which take hours to train on a few cores:
    here they are as many as its rule for smaller sets gives.
    """
    count, dim = segment.features.shape
    lists = 2 ** round(math.log2(4 * math.sqrt(count)))
    if count < 1_000_000 and count * (4 * dim + 8) <= OTHERS_MEMORY:
        key = f"IVF{lists},Flat"
    else:
        ratio = 4 * count * dim / OTHERS_MEMORY
        pq = next(n for n in (256, 128, 64, 48, 32, 24, 16, 8, 4) if n < dim and 4 * dim / (n + 8) >= ratio)
        key = f"OPQ{pq}_{(min(dim // pq, 6) + 1) * pq},IVF{lists}{'_HNSW32' if lists >= 1000 else ''},PQ{pq}x8"
    began = time.perf_counter()
    other: Any = faiss.index_factory(dim, key, faiss.METRIC_INNER_PRODUCT)
    sample = np.sort(np.random.default_rng(0).permutation(count)[: 31 * lists])  # at least so many, says autofaiss
    other.train(gather_features([segment.features], sample))
    filled(other, segment)
    built = time.perf_counter() - began
    queries, nprobe = np.load(folder / "asked.npz")["queries"][:64], 16
    while nprobe < lists:
        faiss.ParameterSpace().set_index_parameter(other, "nprobe", 2 * nprobe)
        marks = time.perf_counter()
        for query in queries:
            other.search(query[None], 40)
        if (time.perf_counter() - marks) / len(queries) * 1000 > OTHERS_MS:
            break
        nprobe *= 2
    faiss.ParameterSpace().set_index_parameter(other, "nprobe", nprobe)
    faiss.write_index(other, str(folder / "other.faiss"))
    del other
    return {"index": key, "nprobe": nprobe, "build_s": built, **opened(folder, "other.faiss")}


def filled(into: Any, segment: Segment) -> None:
    for start in range(0, len(segment), BLOCK):
        into.add(np.ascontiguousarray(widened(segment.features[start : start + BLOCK])))


def peak_mb() -> float:
    """The most memory that this process has had resident, pages of mapped files included."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1e3


# -- the process that opens and searches -------------------------------------------------------------------------------


def opened(folder: Path, file: str | None = None) -> dict[str, Any]:
    """Figures of a fresh process that opens the index in a folder, or a file of faiss there, and searches."""
    command = [sys.executable, __file__, str(folder), *(["--faiss", file] if file else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def search_of(folder: Path, file: str | None) -> Search:
    if file:
        plain: Any = faiss.read_index(str(folder / file), faiss.IO_FLAG_MMAP)
        return lambda queries, k: plain.search(queries, k)[1]
    manifest = Manifest.read(folder)
    ranker = Ranker(open_segments(folder, manifest), open_vectors(folder, manifest), None, RefinementSettings())
    return lambda queries, k: ranker.rank(Encoded(queries), k)[0]


def measure(folder: Path, file: str | None) -> dict[str, Any]:
    base = psutil.Process().memory_info().rss / 1e6
    began = time.perf_counter()
    search = search_of(folder, file)
    result: dict[str, Any] = {"open_s": time.perf_counter() - began}
    with np.load(folder / "asked.npz") as arrays:
        queries, truth = arrays["queries"], arrays["truth"]
    found = np.concatenate([search(queries[i : i + BATCH], 10) for i in range(0, len(queries), BATCH)])
    result["recall@10"] = float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(found, truth)]))
    for clients in CLIENTS:
        result[f"clients {clients}"] = at_once(search, queries, clients)
    memory = psutil.Process().memory_full_info()
    result |= {"p50_ms": result["clients 1"]["p50_ms"], "memory_mb": peak_mb(), "of_libraries_mb": base}
    return result | {"own_mb": memory.uss / 1e6}


def at_once(search: Search, queries: Floats, clients: int, seconds: float = 5.0) -> dict[str, float]:
    """Latency of clients that ask one query after the other. What waits is one batch, as in the service."""
    waiting: queue.SimpleQueue[tuple[Floats, threading.Event] | None] = queue.SimpleQueue()
    took: list[float] = []
    ends = time.perf_counter() + seconds

    def client(number: int) -> None:
        at = number
        while time.perf_counter() < ends:
            began, answered = time.perf_counter(), threading.Event()
            waiting.put((queries[at % len(queries)], answered))
            answered.wait()
            took.append(time.perf_counter() - began)
            at += clients

    def answer() -> None:
        while (first := waiting.get()) is not None:
            batch = [first]
            while len(batch) < BATCH and not waiting.empty() and (more := waiting.get()) is not None:
                batch.append(more)
            search(np.stack([query for query, _ in batch]), 10)
            for _, answered in batch:
                answered.set()

    server = threading.Thread(target=answer)
    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    server.start()
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lasted = time.perf_counter() - began
    waiting.put(None)
    server.join()
    p50, p95 = np.percentile(np.array(took) * 1000, [50, 95]).tolist()
    return {"p50_ms": p50, "p95_ms": p95, "searches_per_s": len(took) / lasted}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faiss", metavar="FILE")
    given = parser.parse_args()
    print(json.dumps(measure(given.folder, given.faiss)))
