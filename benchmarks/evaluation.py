"""Time and agreement of the ranking metrics against implementations a user would otherwise write or copy.

    python benchmarks/evaluation.py --out evaluation.json
    python benchmarks/evaluation.py --large 19848 --before OTHER_CHECKOUT --out large.json

All of them rank the same random scores, with ties, in one run: mmref.evaluate.metrics; a literal per-query Python loop
(sort, then walk down the list); NumPy with a stable argsort per query; and the field's usual form, a full
argsort and cumulative sums over the whole score matrix in torch. The last breaks ties as its sort happens to.

`--large` does another thing: an evaluation of so many captions on as many images, two of an object, as training does it: on one
process, and the share of one of four. With `--before` another checkout of mmref does the same, in turns. The seconds are the
processor's.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from output import write_figures

from mmref.evaluate.bootstrap import bootstrap_ci
from mmref.evaluate.metrics import MAIN_METRICS, score_ranking, summarize
from mmref.evaluate.refinement import ReferenceSpace, choose_refinement, refinement_grid

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 3  # of the large case
# What another checkout can run too: features by a seed, scored and ranked.
IN_PROCESS = """
import json, sys, time
import numpy as np
from mmref.evaluate.metrics import evaluate_features, summarize
count, share = int(sys.argv[1]), json.loads(sys.argv[2])
rng = np.random.default_rng(0)
labels = rng.permutation(np.arange(count) // 2)
centers = rng.standard_normal((count // 2 + 1, 512), dtype=np.float32)
def near():
    x = centers[labels] + 3 * rng.standard_normal((count, 512), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)
text, image = near(), near()
extra = {}
if share:
    from mmref.evaluate.shares import QueryShare
    extra = {"share": QueryShare(0, share, lambda rows: np.concatenate([rows] * share))}
began = time.process_time()
found = evaluate_features(text, image, labels, labels, 256, **extra)
print(json.dumps({"seconds": time.process_time() - began, "metrics": summarize(found)}))
"""


def literal(scores: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray) -> dict[str, float]:
    """The protocol word by word: sort the gallery of each query, walk down the list."""
    gallery = gallery_labels.tolist()
    rows = []
    for row, label in zip(scores.tolist(), query_labels.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j: -row[j])  # a stable sort: ties stay in index order
        hits, precision, first, last = 0, 0.0, 0, 0
        for rank, j in enumerate(order, 1):
            if gallery[j] == label:
                hits += 1
                precision += hits / rank
                first, last = first or rank, rank
        if hits:
            rows.append([first <= 1, first <= 5, first <= 10, precision / hits, hits / last])
    return _percent(np.array(rows, dtype=float))


def argsort_per_query(scores: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray) -> dict[str, float]:
    """NumPy inside, a Python loop over queries outside."""
    rows = []
    for row, label in zip(scores, query_labels, strict=True):
        ranks = 1 + np.flatnonzero(gallery_labels[np.argsort(-row, kind="stable")] == label)
        if len(ranks):
            ap = np.mean(np.arange(1, len(ranks) + 1) / ranks)
            rows.append([ranks[0] <= 1, ranks[0] <= 5, ranks[0] <= 10, ap, len(ranks) / ranks[-1]])
    return _percent(np.array(rows, dtype=float))


def full_matrix_torch(scores: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray) -> dict[str, float]:
    """Argsort of the whole matrix, cumulative hits over every gallery position; every query must have a hit."""
    order = torch.argsort(torch.from_numpy(scores), dim=1, descending=True, stable=True)
    matches = torch.from_numpy(gallery_labels)[order] == torch.from_numpy(query_labels)[:, None]
    hits = matches.cumsum(1)  # (Nq, Ng) int64
    total = hits[:, -1]
    precision = hits / torch.arange(1, hits.shape[1] + 1)
    ap = (precision * matches).sum(1) / total
    last = (hits == total[:, None]).int().argmax(1) + 1
    columns = [*((hits[:, k - 1] > 0).double() for k in (1, 5, 10)), ap.double(), (total / last).double()]
    return _percent(torch.stack(columns, 1).numpy())


def _percent(rows: np.ndarray) -> dict[str, float]:
    return dict(zip(MAIN_METRICS, (100 * rows.mean(axis=0)).tolist(), strict=True))


def ours(scores: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray) -> dict[str, float]:
    return summarize(score_ranking(scores, query_labels, gallery_labels))


def timed(function: Callable, *arguments: object, repeats: int = 1) -> tuple[Any, float]:
    """Result and the least wall seconds of `repeats` calls."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*arguments)
        best = min(best, time.perf_counter() - start)
    return result, best


def ranking_case(n_queries: int, n_gallery: int, n_objects: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    gallery_labels = rng.integers(0, n_objects, n_gallery)
    query_labels = gallery_labels[rng.integers(0, n_gallery, n_queries)]
    # Cosines rounded to 1/256, as half precision would: equal scores in every row.
    scores = rng.normal(0, 0.15, (n_queries, n_gallery)) + 0.3 * (query_labels[:, None] == gallery_labels)
    scores = (np.round(scores * 256) / 256).astype(np.float32)
    case = scores, query_labels, gallery_labels
    result, seconds = timed(ours, *case, repeats=3)
    report: dict[str, Any] = {"queries": n_queries, "gallery": n_gallery, "objects": n_objects, "metrics": result}
    report["seconds"] = {"mmref": seconds}
    report["largest_difference"] = {}
    for other in (literal, argsort_per_query, full_matrix_torch):
        expected, report["seconds"][other.__name__] = timed(other, *case)
        report["largest_difference"][other.__name__] = max(abs(result[k] - expected[k]) for k in MAIN_METRICS)
    report["times_faster"] = {k: v / seconds for k, v in report["seconds"].items() if k != "mmref"}
    _, report["seconds"]["bootstrap_ci_1000"] = timed(bootstrap_ci, score_ranking(*case), query_labels)
    return report


def refinement_case(n_queries: int, n_gallery: int, n_references: int, dim: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((n, dim), dtype=np.float32) for n in (n_queries, n_gallery, n_references)]
    queries, gallery, references = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in arrays)
    labels = rng.integers(0, n_gallery // 4, n_queries), np.arange(n_gallery) // 4
    grid = refinement_grid()
    start = time.perf_counter()
    choose_refinement(ReferenceSpace(references), queries, gallery, *labels, grid)
    seconds = time.perf_counter() - start
    return {
        "queries": n_queries,
        "gallery": n_gallery,
        "references": n_references,
        "settings_tried": len(grid) + 1,
        "seconds": seconds,
        "seconds_per_setting": seconds / (len(grid) + 1),
    }


def large_case(count: int, before: Path | None) -> dict[str, Any]:
    """Least processor seconds of some rounds by variant, and how many times those of the first the others take."""
    variants = {"now": (ROOT, 0), "one of four": (ROOT, 4), **({"before": (before.resolve(), 0)} if before else {})}
    found: dict[str, list[Any]] = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, (checkout, share) in variants.items():
            command = [sys.executable, "-c", IN_PROCESS, str(count), str(share)]
            environment = {**os.environ, "PYTHONPATH": str(checkout)}
            done = subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {name: min(one["seconds"] for one in runs) for name, runs in found.items()}
    return {
        "queries": count,
        "gallery": count,
        "seconds": seconds,
        "ratio": {name: value / seconds["now"] for name, value in seconds.items()},
        "metrics": {name: runs[0]["metrics"] for name, runs in found.items() if name != "one of four"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the numbers here as JSON")
    parser.add_argument("--queries", type=int, default=6156)
    parser.add_argument("--gallery", type=int, default=3074)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--large", type=int, help="captions and images of an evaluation in training")
    parser.add_argument("--before", type=Path, help="another checkout of mmref, for `--large`")
    options = parser.parse_args()
    if options.large:
        write_figures(large_case(options.large, options.before), options.out)
        return
    report = {
        "few_hits": ranking_case(options.queries, options.gallery, options.gallery // 3, options.seed),
        "many_hits": ranking_case(options.queries, options.gallery // 2, max(2, options.gallery // 110), options.seed),
        "refinement": refinement_case(options.queries, options.gallery, 2600, 256, options.seed),
        "machine": {"cpus": os.cpu_count(), "processor": platform.processor(), "numpy": np.__version__},
    }
    write_figures(report, options.out)


if __name__ == "__main__":
    main()
