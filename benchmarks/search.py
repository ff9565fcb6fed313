"""What a search costs, and what an approximate one finds. Three parts, each against plain faiss in the same run:

exact        refined top 10 from the first 100 of N items, for 64 queries at once and one at a time, against
             faiss.IndexFlatIP.search of the same vectors; N random unit vectors, M random references
approximate  IVF and HNSW over features of real images repeated to N with noise, asked with features of real sentences:
             recall@10 against the exact search, and the time of both
scale        an index of N features, written by the code of `mmref index` and opened in a fresh process: recall, memory, time of
             building, latency at 1, 8, 32 clients; against plain faiss and against a mapped index as clip-retrieval uses

python benchmarks/search.py exact --items 1000000 --dim 512 --out exact.json
python benchmarks/search.py approximate --model RUN --data data_shards/emoji --items 200000 --out approximate.json
python benchmarks/search.py scale --items 10000000 --memory 2GB --out scale.json
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import faiss
import numpy as np
import pyarrow as pa
from output import write_figures
from scale import BLOCK, Floats, filled, scale, unit

from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings
from mmref.retrieval import index
from mmref.retrieval.chunks import code_arrays
from mmref.retrieval.exact import widened
from mmref.retrieval.ranking import Ranker
from mmref.retrieval.searcher import Query, Searcher
from mmref.retrieval.segment import Segment, write_segment
from mmref.retrieval.vectors import Approximate, Kind
from mmref.terminal.arguments import size


def paired(plain: Callable[[], Any], ours: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Median milliseconds of both, taken in turn, and the median of the ratios of neighbours."""
    plain(), ours()
    times = []
    for _ in range(rounds):
        marks = [time.perf_counter()]
        for call in (plain, ours):
            call()
            marks.append(time.perf_counter())
        times.append(np.diff(marks) * 1000)
    at = np.array(times)
    return float(np.median(at[:, 0])), float(np.median(at[:, 1])), float(np.median(at[:, 1] / at[:, 0]))


def exact(args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    refinement = RefinementSettings(weight=0.2, top_r=args.top_r, tau=0.05, top_p=args.candidates)
    space = ReferenceSpace(rng.standard_normal((args.references, args.dim), dtype=np.float32))
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        print(f"writing {args.items:,} x {args.dim} and their codes ...", flush=True)
        segment = write_random(Path(folder) / "segment", args, space, refinement)
        ranker = Ranker([segment], None, space, refinement)
        plain = faiss.IndexFlatIP(args.dim)
        filled(plain, segment)
        queries = unit(rng.standard_normal((256, args.dim), dtype=np.float32))
        result: dict[str, Any] = {name: getattr(args, name) for name in ("items", "dim", "references", "top_r", "candidates")}
        for batch, rounds in ((64, args.rounds), (1, 4 * args.rounds)):
            at = 0

            def some(size: int) -> Floats:
                nonlocal at
                at = (at + size) % (len(queries) - size + 1)
                return queries[at : at + size]

            flat, refined, ratio = paired(
                lambda n=batch: plain.search(some(n), 10),
                lambda n=batch: ranker.rank(ranker.encode(some(n), 0.0), 10),
                rounds,
            )
            result[f"batch {batch}"] = {"flat_ms": flat, "refined_ms": refined, "ratio": ratio, "rounds": rounds}
            print(f"batch {batch}: Flat {flat:.1f} ms, refined {refined:.1f} ms, ratio {ratio:.2f}", flush=True)
        rows = ranker.rank(ranker.encode(queries[:64], 0.0), 10, refine=False)[0]
        assert np.mean([len(np.intersect1d(a, b)) for a, b in zip(rows, plain.search(queries[:64], 10)[1])]) > 9.99
        result["vectors_mb"] = segment.features.nbytes / 1e6
        result["codes_mb"] = sum(x.nbytes for x in segment.codes.values()) / 1e6
        result["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return result


def write_random(folder: Path, args: argparse.Namespace, space: ReferenceSpace, refinement: RefinementSettings) -> Segment:
    """A segment of random unit vectors without thumbnails; codes of random references (finding them is not measured)."""
    rng = np.random.default_rng(1)

    def chunks():  # type: ignore[no-untyped-def]
        for start in range(0, args.items, BLOCK):
            n = min(BLOCK, args.items - start)
            names = [str(i) for i in range(start, start + n)]
            rows = pa.table({"id": names, "path": names, "object_id": names})
            rows = rows.append_column("offset", pa.array(np.zeros(n, np.int64)))
            near = rng.integers(0, args.references, (n, args.top_r), dtype=np.int32)
            weights = unit(rng.random((n, args.top_r), dtype=np.float32))
            empty, none = np.zeros((n, 2), np.int32), np.zeros(n, np.int64)
            arrays = {"position": np.arange(n), "features": unit(rng.standard_normal((n, args.dim), dtype=np.float32))}
            arrays |= {"near": near, "weights": weights, "size": empty, "thumbnail_bytes": none}
            yield rows, arrays | {"thumbnails": np.zeros(0, np.uint8)}

    assert set(code_arrays(space, refinement, np.ones((1, args.dim), np.float32))) == {"near", "weights"}
    write_segment(folder, chunks(), 0, args.items, args.dim)
    return Segment(folder)


def approximate(args: argparse.Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        index.create(args.data, args.model, f"{folder}/index", workers=0)
        searcher = Searcher(f"{folder}/index")
        real = widened(np.asarray(searcher.segments[0].features))
        captions = [c for c in searcher.items["caption"].to_pylist() if c]
        asked = sorted(set(captions))
        rng.shuffle(asked)
        queries = searcher.encode([Query(text) for text in asked[: 2 * args.queries]]).features
        tuned, held_out = queries[: args.queries], queries[args.queries :]
        # noise of `--noise` of a vector's length: repeated images of one thing, not copies
        copies = -(-args.items // len(real))
        noise = args.noise / np.sqrt(real.shape[1])
        parts = [unit(real + (noise * rng.standard_normal(real.shape)).astype(np.float32)) for _ in range(copies)]
        matrix = np.concatenate(parts)[: args.items]
        del parts
        uids = np.arange(len(matrix))
        flat = faiss.IndexFlatIP(matrix.shape[1])
        flat.add(matrix)
        _, truth = flat.search(held_out, 10)
        result = {"items": len(matrix), "real_images": len(real), "dim": matrix.shape[1], "noise": args.noise}
        for kind in args.kinds:
            began = time.perf_counter()
            found = Approximate.build(kind, [matrix], uids)
            built = time.perf_counter() - began
            found.tune(tuned, [matrix], uids, args.recall)
            _, rows = found.search(held_out, [matrix], uids, 10)
            recall = float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(truth, rows)]))
            entry: dict[str, Any] = {"setting": found.setting, "recall@10": recall, "build_s": built}
            for batch in (64, 1):
                some = held_out[:batch]
                plain, ours, _ = paired(
                    lambda s=some: flat.search(s, 10),
                    lambda s=some, f=found: f.search(s, [matrix], uids, 10),
                    args.rounds,
                )
                entry[f"batch {batch}"] = {"flat_ms": plain, "approximate_ms": ours, "speed_up": plain / ours}
            result[kind] = entry
            print(f"{kind}: {json.dumps(entry)}", flush=True)
        result["queries"] = len(held_out)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    first = parts.add_parser("exact")
    first.add_argument("--dim", type=int, default=512)
    first.add_argument("--references", type=int, default=11_003, help="training objects (default: as many as CUHK-PEDES)")
    first.add_argument("--top-r", type=int, default=64, help="references in a code (default: %(default)s)")
    first.add_argument("--candidates", type=int, default=100)
    second = parts.add_parser("approximate")
    second.add_argument("--model", required=True, metavar="RUN|EXPORT")
    second.add_argument("--data", default="data_shards/emoji")
    second.add_argument("--noise", type=float, default=0.1, help="length of the noise added to each unit vector")
    second.add_argument("--queries", type=int, default=500, help="sentences to tune with, and as many to measure with")
    second.add_argument("--recall", type=float, default=0.95)
    second.add_argument("--kinds", nargs="+", default=["ivf", "hnsw"])
    third = parts.add_parser("scale")
    third.add_argument("--dim", type=int, default=256)
    third.add_argument("--model", metavar="RUN|EXPORT", help="features are around those of --data, and queries are its captions")
    third.add_argument("--data", default="data_shards/emoji")
    third.add_argument("--noise", type=float, default=0.5, help="length of the noise added to each unit vector")
    third.add_argument("--queries", type=int, default=500, help="to tune with, and as many to measure with")
    third.add_argument("--recall", type=float, default=0.97, help="that the index is tuned to (default: %(default)s)")
    third.add_argument("--kind", choices=get_args(Kind), default="auto")
    third.add_argument("--memory", type=size, metavar="SIZE", help="as of `mmref index --memory`")
    third.add_argument("--workers", type=int, default=0, help="Ray tasks that encode parts; 0: in this process")
    third.add_argument("--alone", action="store_true", help="compare with nothing")
    for part, function in ((first, exact), (second, approximate), (third, scale)):
        part.add_argument("--items", type=int, default=1_000_000)
        part.add_argument("--rounds", type=int, default=10)
        part.add_argument("--scratch", help="where the index is written (default: the system's)")
        part.add_argument("--out", help="also write the figures to this file")
        part.set_defaults(run=function)
    args = parser.parse_args()
    began = time.perf_counter()
    result = {**args.run(args), "threads": faiss.omp_get_max_threads(), "wall_s": 0.0}
    result["wall_s"] = time.perf_counter() - began
    write_figures(result, args.out)


if __name__ == "__main__":
    main()
