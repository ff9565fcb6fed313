"""A training from judgements: what was judged right and wrong becomes a shard set, the model of the index goes on learning with
it, and sentences that were held out tell what that brought.

In the run directory:

    judgements/      the set that was built of the judgements for training, its table, its neighbors, the config as derived
    judgements.json  what held-out judgements say, before and after, for the report

A right item is trained on with the sentences that it was right for. A wrong one is trained on with the caption of its own that
the index has, in the same steps as what was right for that sentence: so it is a hard negative of it. A wrong item without a
caption serves no training.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmref.config import Config, dump_yaml, load_config
from mmref.config.files import make_config
from mmref.data.fit import Fitted
from mmref.data.neighbors import NONE, Neighbors, index_fingerprint
from mmref.data.shard_set import ShardSet, train_index
from mmref.errors import SampleError, TooFewJudgementsError
from mmref.evaluate import judged as held_out_scores
from mmref.evaluate.evaluation import open_run
from mmref.evaluate.judged import JudgedQuery, compared, measure
from mmref.evaluate.report import JUDGED, report_path, with_section
from mmref.export.model import Model, load
from mmref.export.write import export_run
from mmref.retrieval.bundle import own_training_split
from mmref.retrieval.exact import gather_features
from mmref.retrieval.feedback import TABLE, Judgement, Judgements, caption_of, export_table
from mmref.retrieval.searcher import Searcher
from mmref.shards.build import BuildOptions, build_shards, make_source
from mmref.terminal.output import printable
from mmref.terminal.progress import Counter, say

FOLDER = "judgements"  # of a run
HELD_OUT = 0.3
LEAST_QUERIES = 10  # with something right, to train on, and with right and wrong, to evaluate with
GALLERY = 2000  # items among which places are told: the new model has to embed each of them
ENCODED = 128  # images at a time
NEIGHBORS = 16  # of each object, at most

JUDGED_SHARE = 0.5  # of the steps, the others are of the set that the model was trained on
PASSES = 15  # over the judged objects
STEPS = (40, 2000)  # at least and at most
LR_SHARE = 0.3  # of the peak learning rates that the model was trained with
PRETRAINED = {"train.lr": 1e-5, "train.lr_new": 5.0, "train.weight_decay": 4e-5, "loss.tau": 0.02}  # configs/clip_finetune.yaml
ALONE = {"train": 0.85, "val": 0.15}  # of the judged objects, where the set that the model was trained on cannot be read


@dataclass(frozen=True)
class Prepared:
    """Judgements divided, the config of the training, and how the model of the index ranks the held-out ones."""

    config: Config
    held_out: list[Judgement]
    trained_on: list[Judgement]
    said: list[str]  # lines on what was left out and chosen


def divide(judgements: Sequence[Judgement], share: float, seed: int = 0) -> tuple[list[Judgement], list[Judgement]]:
    """(to train on, held out): all judgements of a sentence are on one side. The same sentences, share and seed divide alike."""
    queries = sorted({j.query for j in judgements})
    order = np.random.default_rng(seed).permutation(len(queries))
    held = {queries[i] for i in order[: round(share * len(queries))]}
    return [j for j in judgements if j.query not in held], [j for j in judgements if j.query in held]


def fine_tune(
    index: str,
    file: str | None,
    run_dir: str,
    flags: Sequence[str] = (),
    held_out: float = HELD_OUT,
    seed: int = 0,
    mixed: bool = True,
) -> dict[str, Any]:
    """Train the model of an index on judgements, evaluate it on held-out ones, and write the run with its report.

    Args:
        index: directory of `mmref index`, which has the model and knows the images.
        file: judgements; by default those in the index.
        run_dir: of the new run, a local path.
        flags: of `mmref train`, which win over what is chosen here.
        held_out: share of the sentences whose judgements are not trained on.
        seed: of the division into sentences to train on and to evaluate with.
        mixed: train on the set of the model's own training too, where it can be read.

    Returns:
        What judgements.json holds.

    Raises:
        TooFewJudgementsError; QueryError: no judgements; the errors of training.
    """
    searcher = Searcher(index)
    judgements = Judgements.of(searcher.index, file).read()
    prepared = prepare(searcher, judgements, run_dir, flags, held_out, seed, mixed)
    for line in prepared.said:
        print(printable(line), flush=True)
    from mmref.train.trainer import train

    train(prepared.config)
    run, _, checkpoint = open_run(run_dir)
    with tempfile.TemporaryDirectory(prefix="mmref-") as folder:
        trained = load(str(export_run(run_dir, f"{folder}/model")))
        found = judge_models(searcher, trained, prepared.held_out, seed)
    of = {"checkpoint": checkpoint.folder, "before": searcher.model.card.get("pretrained", f"the model of {searcher.index.name}")}
    found |= of | {"seed": seed, "trained_on": _count(prepared.trained_on)}
    run.write_text(held_out_scores.FILE, json.dumps(found, indent=1))
    page = report_path()
    if run.exists(page):
        run.write_text(page, with_section(run.read_text(page), held_out_scores.section(found), JUDGED))
    print(held_out_scores.format_judged(found))
    return found


def _count(judgements: Sequence[Judgement]) -> dict[str, int]:
    return {"judgements": len(judgements), "queries": len({j.query for j in judgements})}


# -- before the training ---------------------------------------------------------------------------------------------


def prepare(
    searcher: Searcher,
    judgements: Sequence[Judgement],
    run_dir: str,
    flags: Sequence[str] = (),
    held_out: float = HELD_OUT,
    seed: int = 0,
    mixed: bool = True,
) -> Prepared:
    """Divide judgements, build what is trained on into the run directory, and derive the config. As `fine_tune`."""
    known = set(searcher.items["id"].to_pylist())
    there = [j for j in judgements if j.id in known]
    said = [f"{len(judgements) - len(there)} judgements are of items that are not in the index any more"] * (
        len(there) < len(judgements)
    )
    trained_on, held = divide(there, held_out, seed)
    held = _with_images(searcher, held)
    check_enough(trained_on, held)
    folder = Path(run_dir) / FOLDER
    own = None
    if mixed and own_training_split(searcher.model.config, "the judgements are trained on alone") is not None:
        own = searcher.model.config.data.root
    left_out = build_set(searcher, trained_on, folder, own is None, {j.query for j in held})
    said += [f"{len(left_out)} judged images serve no training: {'; '.join(left_out[:3])}"] if left_out else []
    shards = str(folder / "set")
    config = derive(searcher, run_dir, shards, own, flags)
    neighbors = hard_negatives(config, shards, trained_on)
    (folder / "neighbors.parquet").write_bytes(neighbors.to_bytes())
    with_set = f"mixed with {own}" if own else "alone: the model may lose what it knew beside them"
    said.append(
        f"training on {_count(trained_on)['judgements']} judgements of {_count(trained_on)['queries']} sentences, {with_set}; "
        f"{config.train.max_steps} steps, learning rate {config.train.lr:g}"
    )
    return Prepared(config, held, trained_on, said)


def _with_images(searcher: Searcher, judgements: Sequence[Judgement]) -> list[Judgement]:
    """Judgements of images that can be read; what is left out is said."""
    found = {name: _image(searcher, searcher.model, name) for name in dict.fromkeys(j.id for j in judgements)}
    _say_unread("held-out images", [error for error in found.values() if isinstance(error, SampleError)])
    return [j for j in judgements if not isinstance(found[j.id], SampleError)]


def check_enough(trained_on: Sequence[Judgement], held: Sequence[Judgement]) -> None:
    """Raise TooFewJudgementsError."""
    right = {j.query for j in trained_on if j.relevant}
    both = {j.query for j in held if j.relevant} & {j.query for j in held if not j.relevant}
    for count, what, part in (
        (len(right), "with something right", "to train on"),
        (len(both), "with right and wrong results", "held out"),
    ):
        if count < LEAST_QUERIES:
            raise TooFewJudgementsError(
                f"the judgements {part} are of {count} sentences {what}, and it takes at least {LEAST_QUERIES}: judge more "
                "results (`mmref serve INDEX --judge`), or change the share of `--held-out`."
            )


def build_set(
    searcher: Searcher, judgements: Iterable[Judgement], folder: Path, with_val: bool, held: Collection[str] = ()
) -> list[str]:
    """Build the shard set of judgements into a folder; returns what was left out. The same judgements give the same set.

    An image that was judged wrong, and whose own caption is one of the sentences `held` out, is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    judgements = list(judgements)
    right = {j.id for j in judgements if j.relevant}
    told = {j.id for j in judgements if j.id not in right and caption_of(searcher, j.id).strip() in held}
    used = [j for j in judgements if j.id not in told]
    _, left_out = export_table(searcher, used, str(folder / "table"), None if with_val else "train")
    left_out += [f"{name}: its caption is a held-out sentence" for name in sorted(told)]
    source = make_source("table", path=str(folder / "table" / TABLE), **({"fractions": ALONE} if with_val else {}))
    build_shards(source, str(folder / "set"), BuildOptions(min_shards=1, overwrite=True, progress=False))
    return left_out


def derive(searcher: Searcher, run_dir: str, shards: str, own: str | None, flags: Sequence[str] = ()) -> Config:
    """The config of a training from judgements: the model's own, gently, with the judged set beside the model's own set."""
    model, base = searcher.model, searcher.model.config
    objects = ShardSet.open(shards).index("train").n_objects
    q = base.train.images_per_object
    per_step = min(base.train.global_batch // q, objects)
    share = JUDGED_SHARE if own else 1.0
    steps = int(np.clip(np.ceil(PASSES * objects / per_step / share), *STEPS))
    fields: dict[str, Any] = {
        "run_dir": run_dir,
        "data.root": own or shards,
        "data.mix": {shards: share} if own else {},
        "data.neighbors": str(Path(run_dir) / FOLDER / "neighbors.parquet"),
        "data.tokenizer": str(searcher.index / "model" / "tokenizer"),
        "data.window_shards": 0,
        "data.max_objects": 0,
        "data.max_images": 0,
        "train.start_from": str(searcher.index / "model"),
        "train.global_batch": per_step * q,
        "train.max_steps": steps,
        "train.epochs": 0.0,
        "train.warmup_steps": steps // 10,
        "train.lr": LR_SHARE * base.train.lr,
        "reference.lr": LR_SHARE * base.reference.lr,
        "train.eval_every": steps,  # the last checkpoint is taken: val may hold what was judged
        "train.workers": 1,
        "train.min_workers": 0,
        "train.accumulation": 1,
        "train.gpu": "auto",
        # References of judged objects begin at random: they follow, and guide nothing.
        "loss.w_guide": 0.0,
    }
    if "pretrained" in model.card:
        fields |= PRETRAINED
    if not own:
        fields |= {"reference.update": "moving_average"}
    path = Path(run_dir) / FOLDER / "config.yaml"
    path.write_text(dump_yaml(make_config(base, fields)), "utf-8")
    return load_config(["--config", str(path), *flags])


def hard_negatives(config: Config, shards: str, judgements: Sequence[Judgement]) -> Neighbors:
    """Neighbors for `data.neighbors`: objects of what was judged wrong for a sentence, of those of what was right for it, and the
    other way round."""
    index = train_index(config)
    table = [json.loads(line) for line in (Path(shards).parent / "table" / TABLE).read_text("utf-8").split("\n") if line]
    of_item = {row["item"]: row["object_id"] for row in table}
    judged = ShardSet.open(shards).index("train").object_ids
    whole = index if index.chosen is None else train_index(make_config(config, {"data.max_objects": 0}))
    before = whole.n_objects - len(judged)  # objects of the set that they are mixed with
    rows_in_whole = range(index.n_objects) if index.chosen is None else index.chosen.tolist()
    row_of = {judged[at - before]: row for row, at in enumerate(rows_in_whole) if at >= before}
    by_query: dict[str, tuple[set[int], set[int]]] = {}
    for judgement in judgements:
        row = row_of.get(of_item.get(judgement.id, ""))
        if row is not None:
            by_query.setdefault(judgement.query, (set(), set()))[judgement.relevant].add(row)
    near: dict[int, dict[int, None]] = {}
    for wrong, right in by_query.values():
        for a in right:
            for b in wrong - right:
                near.setdefault(a, {})[b] = None
                near.setdefault(b, {})[a] = None
    rows = np.full((index.n_objects, NEIGHBORS), NONE, np.int32)
    for row, others in near.items():
        some = sorted(others)[:NEIGHBORS]
        rows[row, : len(some)] = some
    return Neighbors(rows, np.zeros(rows.shape, np.float32), index_fingerprint(index), "judgements", "judgements")


# -- after it --------------------------------------------------------------------------------------------------------


def judge_models(searcher: Searcher, trained: Model, judgements: Sequence[Judgement], seed: int = 0) -> dict[str, Any]:
    """What held-out judgements say of the model of an index and of a trained one: `initial` by cosine, `refined` as in a search.

    Places are those among all items of the index, or among 2,000 of it: what was judged, and others drawn by the seed. Images
    that cannot be read are left out.
    """
    gallery = _gallery(searcher, judgements, seed)
    ids = searcher.items["id"].take(gallery).to_pylist()
    new, read = _embedded(searcher, trained, ids)
    gallery, at = gallery[read], {ids[row]: i for i, row in enumerate(read)}
    judgements = [j for j in judgements if j.id in at]
    by_query: dict[str, tuple[list[int], list[int]]] = {}  # rows of what was wrong, and of what was right
    for judgement in judgements:
        by_query.setdefault(judgement.query, ([], []))[judgement.relevant].append(at[judgement.id])
    queries = list(by_query)
    judged = [
        JudgedQuery(i, np.array(right, np.int64), np.array(wrong, np.int64)) for i, (wrong, right) in enumerate(by_query.values())
    ]
    old = gather_features([s.features for s in searcher.segments], gallery)
    images = {searcher.model: old, trained: new}
    found: dict[str, Any] = {"gallery": len(gallery), "left_out": len(ids) - len(read), "held_out": _count(judgements)}
    initial, refined = [], []
    for model, features in images.items():
        text = model.encode_text(queries)
        initial.append(measure(text @ features.T, judged))
        refined.append(measure(model.refine(text, features), judged))
    return found | {"initial": compared(initial[0], initial[1]), "refined": compared(refined[0], refined[1])}


def _gallery(searcher: Searcher, judgements: Iterable[Judgement], seed: int) -> NDArray[np.int64]:
    """Rising rows of the index: all, or those that were judged and others."""
    if len(searcher) <= GALLERY:
        return np.arange(len(searcher))
    rows = {searcher.row(j.id) for j in judgements}
    others = np.random.default_rng(seed).permutation(len(searcher))[:GALLERY].tolist()
    return np.array(sorted([*rows, *[row for row in others if row not in rows][: max(0, GALLERY - len(rows))]]), np.int64)


def _embedded(searcher: Searcher, model: Model, ids: Sequence[str]) -> tuple[NDArray[np.float32], list[int]]:
    """Features of the images that can be read, and which of the ids these are; the others are said."""
    say("embedding the images of the index with the trained model ...")
    parts, rows, unread = [], [], []
    with Counter("embedding", len(ids), "image") as progress:
        for start in range(0, len(ids), ENCODED):
            images = []
            for row, name in enumerate(ids[start : start + ENCODED], start):
                image = _image(searcher, model, name)
                if isinstance(image, SampleError):
                    unread.append(image)
                else:
                    images.append(image)
                    rows.append(row)
                progress.add(1)
            parts.append(model.encode_images(images))
    _say_unread("images of the index", unread)
    return np.concatenate(parts), rows


def _image(searcher: Searcher, model: Model, name: str) -> Fitted | SampleError:
    """An image of an index as a model takes it, or why it cannot be read."""
    try:
        return Fitted(model.pixels([searcher.image_bytes(name)])[0])
    except SampleError as error:
        return error


def _say_unread(what: str, problems: Sequence[SampleError]) -> None:
    if problems:
        say(f"{len(problems):,} {what} cannot be read and are left out: {printable(problems[0])}")
