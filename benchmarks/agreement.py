"""Does a running service find what the evaluation says? R@1, R@5, R@10 of every caption of a split, by image and by object,
before and after refinement: asked of `mmref serve` over HTTP, and of `mmref evaluate`.

The index is made of the same split, so that its images are the gallery. A service answers with the whole list or a page of it;
ten results are enough to know whether the right one is among the first 1, 5 and 10.

python benchmarks/agreement.py runs/demo --out agreement.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from output import write_figures
from serve import serving

from mmref.cli import main
from mmref.data.shard_set import ShardSet
from mmref.evaluate.evaluation import evaluate_run, open_run
from mmref.evaluate.features import read_queries
from mmref.evaluate.metrics import RECALL_AT
from mmref.retrieval.client import ServiceClient
from mmref.retrieval.results import Query

CLOSE = 1e-9  # percent: one caption of ten thousand is 0.01


def compare(run: str, split: str, work: Path) -> dict[str, Any]:
    _, config, _ = open_run(run)
    metrics = evaluate_run(run, split=split, report=False)
    path = work / split
    assert not main(["index", config.data.root, "--model", run, "--out", str(path), "--split", split, "--workers", "0"])
    of = ShardSet.open(config.data.root).index(split)
    queries = read_queries(of)
    wanted = [of.object_ids[at] for at in queries.objects]
    rows: list[dict[str, Any]] = []
    with serving([path], 0, "--max-rate", "0") as (_, port):
        client = ServiceClient(f"http://127.0.0.1:{port}")
        for by in ("image", "object"):
            for state in ("initial", "refined"):
                began = time.perf_counter()
                asked = {"by": by, "top": max(RECALL_AT), "refine": state == "refined"}
                answers = client.search_many([Query(text) for text in queries.texts], asked)
                seconds = time.perf_counter() - began
                found = [[one.object_id for one in answer.results] for answer in answers]
                block = metrics[state] if by == "image" else metrics["by_object"][state]
                for k in RECALL_AT:
                    hits = [own in found[text][:k] for text, own in zip(queries.text, wanted)]
                    served = 100 * float(np.mean(hits))
                    row = {"by": by, "state": state, "measure": f"R@{k}", "evaluated": block[f"R@{k}"], "served": served}
                    rows.append(row | {"equal": abs(served - block[f"R@{k}"]) < CLOSE})
                    print({**rows[-1], "asked_s": round(seconds, 1)}, flush=True)
    return {"queries": len(wanted), "sentences": len(queries.texts), "rows": rows, "equal": all(row["equal"] for row in rows)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="evaluated run")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        found = compare(args.run, args.split, Path(work))
    write_figures(found, args.out)
    sys.exit(not found["equal"])
