"""What do judgements bring? A simulated judge looks at the first results of sentences, the one command of the documentation
trains on what it said, and sentences that were held out tell the gain. The same training without judgements is the control.

Sentences are captions of test objects, one of each object, and the index holds the images of test: objects that the model has
not seen. The judge says yes where an image is of the caption's object. Val is untouched: it chooses the refinement, and tells
what was forgotten. `pairs`, `precision` and `rank` are of judged items alone, which the first model has chosen. `truth` is of
all images of test, where the simulation knows every right one.

python benchmarks/judgements.py runs/demo --sentences 300 --seeds 0 1 2 --control --out judgements.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from output import write_figures

import mmref
from mmref.cli import main
from mmref.config import load_config
from mmref.config.files import make_config
from mmref.data.shard_set import ShardSet
from mmref.evaluate.bootstrap import paired_difference
from mmref.evaluate.evaluation import START_METRICS, open_run
from mmref.evaluate.features import read_queries
from mmref.evaluate.metrics import PerQuery, evaluate_features, summarize
from mmref.export.model import Model
from mmref.retrieval.feedback import Judgements
from mmref.retrieval.fine_tune import divide, judge_models
from mmref.retrieval.searcher import Searcher
from mmref.retrieval.vectors import gather

SHOWN = ("R@1", "mAP")


def simulate(searcher: Searcher, root: str, sentences: int, top: int) -> dict[str, str]:
    """Judge the first results of one caption of each object, which are saved in the index; {sentence: object}."""
    index = ShardSet.open(root).index("test")
    queries, rng = read_queries(index), np.random.default_rng(0)
    asked: dict[str, str] = {}
    for row in rng.permutation(index.n_objects)[:sentences].tolist():
        texts = queries.texts[rng.choice(queries.text[queries.objects == row])]
        asked.setdefault(texts.strip(), index.object_ids[row])
    judgements = Judgements.of(searcher.index)
    for (text, wanted), results in zip(asked.items(), searcher.search_many(list(asked), top)):
        for result in results:
            judgements.save(searcher, text, result.id, result.object_id == wanted)
    return asked


def truth(
    searcher: Searcher, model: Model, features: np.ndarray, asked: dict[str, str], held: list[str]
) -> tuple[PerQuery, np.ndarray]:
    """What held-out sentences achieve on all images of the index, and their objects."""
    ids = {name: i for i, name in enumerate(dict.fromkeys(searcher.items["object_id"].to_pylist()))}
    objects = np.array([ids[asked[text]] for text in held])
    gallery = np.array([ids[name] for name in searcher.items["object_id"].to_pylist()])
    text = model.encode_text(held)
    scores = model.refine(text, features)
    ranked = evaluate_features(text, features, objects, gallery, score_fn=lambda rows, _: scores[rows])
    return ranked, objects


def trained(run_dir: str, searcher: Searcher, asked: dict[str, str], held: list[Any], seed: int) -> dict[str, Any]:
    """What a training brought on held-out judgements, on the whole truth, and on val."""
    model = mmref.load(run_dir)
    old = gather([s.features for s in searcher.segments], np.arange(len(searcher)))
    new = model.encode_images([searcher.image_bytes(name) for name in searcher.items["id"].to_pylist()])
    texts = list(dict.fromkeys(j.query for j in held))
    before, objects = truth(searcher, searcher.model, old, asked, texts)
    after, _ = truth(searcher, model, new, asked, texts)
    gained = paired_difference(before, after, objects)
    best = [max(tried_on_val(run_dir, name), key=lambda row: row["objective"]) for name in (START_METRICS, "metrics.json")]
    return {
        "held_out": judge_models(searcher, model, held, seed)["refined"],
        "truth": {name: {"before": summarize(before)[name], "after": summarize(after)[name], **gained[name]} for name in SHOWN},
        "val": {name: [row[name] for row in best] for name in SHOWN},
    }


def tried_on_val(run_dir: str, name: str) -> list[dict[str, float]]:
    """What each refinement achieves on val, before training or after it."""
    found: list[dict[str, float]] = json.loads((Path(run_dir) / name).read_text())["refinement"]["tried"]
    return found


def without(run_dir: str, flags: list[str]) -> None:
    """Train the same number of steps on the set of the model's own training alone."""
    config = load_config(["--config", f"{run_dir}/judgements/config.yaml", *flags])
    fields = {"data.mix": {}, "data.neighbors": "", "run_dir": f"{run_dir}-control"}
    from mmref.train.trainer import train

    train(make_config(config, fields))


def run(given: argparse.Namespace, flags: list[str], work: str) -> dict[str, Any]:
    _, config, _ = open_run(given.run)
    root, index = config.data.root, f"{work}/index"
    assert not main(["index", root, "--model", given.run, "--split", "test", "--out", index, "--workers", "0"])
    searcher = Searcher(index)
    asked = simulate(searcher, root, given.sentences, given.top)
    judgements = Judgements.of(searcher.index).read()
    rows = []
    for seed in given.seeds:
        began, run_dir = time.perf_counter(), f"{work}/run-{seed}"
        words = ["train", "--from-judgements", index, "--run_dir", run_dir, "--split-seed", str(seed), *flags]
        assert not main(words), f"{words} failed"
        seconds = time.perf_counter() - began
        held = divide(judgements, 0.3, seed)[1]
        row = {"seed": seed, "seconds": seconds, "with judgements": trained(run_dir, searcher, asked, held, seed)}
        if given.control:
            without(run_dir, flags)
            row["without"] = trained(f"{run_dir}-control", searcher, asked, held, seed)
        rows.append(row)
    right = sum(j.relevant for j in judgements)
    return {"sentences": len(asked), "judgements": len(judgements), "right": right, "items": len(searcher), "seeds": rows}


def show(found: dict[str, Any]) -> None:
    print(f"{found['judgements']} judgements, {found['right']} right, of {found['sentences']} sentences, {found['items']} images")
    for row in found["seeds"]:
        for name in ("with judgements", "without"):
            if name not in row:
                continue
            said = [
                f"{measure} {of['before']['mean']:.1f} -> {of['after']['mean']:.1f} ({of['change']['ci95'][0]:+.1f} to "
                f"{of['change']['ci95'][1]:+.1f})"
                for measure, of in row[name]["held_out"].items()
            ]
            said += [
                f"truth {m} {of['before']:.1f} -> {of['after']:.1f} ({of['ci95'][0]:+.1f} to {of['ci95'][1]:+.1f})"
                for m, of in row[name]["truth"].items()
            ]
            said += [f"val {m} {of[0]:.1f} -> {of[1]:.1f}" for m, of in row[name]["val"].items()]
            print(f"seed {row['seed']}, {name}: {'; '.join(said)}; {row['seconds']:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run of `mmref train`")
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--top", type=int, default=10, help="results of each that are judged")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the division into trained on and held out")
    parser.add_argument("--control", action="store_true", help="also train without judgements")
    parser.add_argument("--work", help="folder for index and runs (default: one that goes)")
    parser.add_argument("--out")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = run(args, more, args.work or folder)
    show(figures)
    write_figures(figures, args.out)
