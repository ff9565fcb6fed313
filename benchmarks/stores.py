"""The same queries through an index, and through LanceDB, Qdrant and PostgreSQL with pgvector: are the refined results equal, and
how long does each take?

Sentences are captions of the run's val and train splits, encoded once before the clock starts: what is timed is the first pass,
the way of the codes, and the refinement. Two results are equal up to ties where scores in each place differ by at most 1e-5, and
the items there are the same, except where their own scores do.

python benchmarks/stores.py runs/demo --queries 1000 --postgres --out stores.json
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from output import write_figures

from mmref.cli import main
from mmref.data.shard_set import ShardSet
from mmref.evaluate.evaluation import open_run
from mmref.evaluate.features import read_queries
from mmref.retrieval.ranking import Encoded
from mmref.retrieval.searcher import Query, Searcher
from mmref.retrieval.store_searcher import StoreSearcher
from mmref.retrieval.stores.export import export_index

TOP = 10
CLOSE = 1e-5
Ranked = tuple[np.ndarray, np.ndarray]  # rows and scores (TOP,)


def timed(searcher: Searcher, queries: Encoded) -> tuple[list[Ranked], dict[str, float]]:
    """Results of each query, one at a time, and milliseconds."""
    everything = searcher.select()
    searcher.ranked(queries.take([0]), TOP, True, None, everything)
    found, took = [], []
    for i in range(len(queries)):
        began = time.perf_counter()
        rows, scores, *_ = searcher.ranked(queries.take([i]), TOP, True, None, everything)
        took.append(1e3 * (time.perf_counter() - began))
        found.append((rows[0], scores[0]))
    p50, p95 = np.percentile(took, [50, 95])
    return found, {"p50_ms": round(float(p50), 2), "p95_ms": round(float(p95), 2)}


def equal(mine: Ranked, theirs: Ranked) -> bool:
    """Whether two rankings are the same up to ties."""
    if np.abs(mine[1] - theirs[1]).max() > CLOSE:
        return False
    differ = np.flatnonzero(mine[0] != theirs[0])
    score = dict(zip(mine[0].tolist(), mine[1].tolist()))
    last = float(mine[1][-1])  # an item that is not there ties with the last
    return all(abs(score.get(int(theirs[0][i]), last) - float(theirs[1][i])) <= 2 * CLOSE for i in differ)


def compare(run: str, count: int, urls: dict[str, str], work: str) -> dict[str, Any]:
    _, config, _ = open_run(run)
    index = f"{work}/index"
    assert not main(["index", config.data.root, "--model", run, "--out", index, "--workers", "0"])
    searcher = Searcher(index)
    texts = [t for split in ("val", "train") for t in read_queries(ShardSet.open(config.data.root).index(split)).texts]
    some = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:count]]
    queries = searcher.encode([Query(text) for text in some])
    mine, took = timed(searcher, queries)
    candidates = searcher.ranker.candidates(None, len(searcher))
    found: dict[str, Any] = {"items": len(searcher), "queries": len(queries), "candidates": candidates, "index": took}
    for engine, url in urls.items():
        began = time.perf_counter()
        export_index(index, engine, url)
        seconds = time.perf_counter() - began
        theirs, took = timed(StoreSearcher(index, url), queries)
        same = sum(map(equal, mine, theirs))
        identical = sum(bool((a[0] == b[0]).all()) for a, b in zip(mine, theirs))
        found[engine] = {"equal": same, "identical": identical, **took, "export_s": round(seconds, 1)}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run of `mmref train`")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--postgres", nargs="?", const="", metavar="URL", help="a database; without a URL one is started")
    parser.add_argument("--qdrant", metavar="URL", help="of a server")
    parser.add_argument("--out")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        places = {"lancedb": f"lancedb://{folder}/lance"}
        if args.qdrant:
            places["qdrant"] = args.qdrant
        if args.postgres is not None:
            sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
            from support.postgres import postgres

            places["pgvector"] = args.postgres or stack.enter_context(postgres())
        figures = compare(args.run, args.queries, places, folder)
    write_figures(figures, args.out)
