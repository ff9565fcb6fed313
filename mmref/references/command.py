"""`mmref references info|add|remove`, and `mmref mine`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence

from mmref.errors import ReferencesError, UsageError
from mmref.terminal.arguments import (
    chosen_model,
    count,
    local_path,
    model_argument,
    place,
    positive,
    run_dir_argument,
    text,
)
from mmref.terminal.parser import Parser


def main(argv: Sequence[str]) -> int:
    """`mmref references`."""
    parser = Parser(prog="mmref references", description="Add objects to the references of a trained run, or remove them.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="{info,add,remove}")
    info = actions.add_parser("info", help="how many objects the checkpoints of a run have references of")
    add = actions.add_parser("add", help="give the objects of a shard set references in the best checkpoint")
    remove = actions.add_parser("remove", help="remove objects from every checkpoint of a run, for good")
    for action in (info, add, remove):
        model_argument(action, "run directory, not training meanwhile; for `add` an export or pretrained model as well")
    info.add_argument("--object", nargs="+", type=text, default=[], metavar="ID", help="also say whether these are there")
    run_dir_argument(add)
    add.add_argument("--data", required=True, type=place, metavar="SHARDS", help="shard set that holds the new objects")
    add.add_argument("--split", default="train", help="split of it (default: train)")
    add.add_argument(
        "--per-object", type=positive, metavar="K",
        help="references of each object: the means of K groups of its images and captions, by k-means; for a model without "
        "references (default: reference.per_object of its config, 1 of a pretrained model)",
    )  # fmt: skip
    add.add_argument(
        "--workers", type=count,
        help="Ray actors that compute features; 0: in this process (default: eval.workers; 0 without Ray)",
    )  # fmt: skip
    remove.add_argument("--object", nargs="+", type=text, default=[], metavar="ID", help="ids of the objects")
    remove.add_argument("--file", type=local_path, metavar="FILE", help="text file with an id a line")
    for action, command in ((info, _info), (add, _add), (remove, _remove)):
        action.set_defaults(run=command, parser=action)
    args = parser.parse_args(argv)
    return int(args.run(args))


def mine_main(argv: Sequence[str]) -> int:
    """`mmref mine`."""
    parser = Parser(
        prog="mmref mine",
        description="Write the nearest training objects of each object, as a model sees them, for batches of hard negatives: "
        "`mmref train --data.neighbors FILE`.",
    )
    model_argument(parser, "run directory of `mmref train`, or an export or pretrained model")
    run_dir_argument(parser)
    parser.add_argument("--data", type=place, metavar="SHARDS",
                        help="shard set whose train split is to be trained on (default: what a run was trained on)")  # fmt: skip
    parser.add_argument(
        "--out", type=local_path, metavar="FILE", help="the file (default: neighbors.parquet in the run directory)"
    )
    parser.add_argument("--count", type=positive, default=16, help="neighbors of each object: fewer are harder (default: 16)")
    parser.add_argument("--by", choices=("auto", "references", "features"), default="auto",
                        help="what makes objects alike: their references, or the means of their image and text features "
                        "(default: references where there is one of every object)")  # fmt: skip
    parser.add_argument(
        "--workers",
        type=count,
        help="Ray actors that compute features; 0: in this process (default: eval.workers; 0 without Ray)",
    )
    args = parser.parse_args(argv)
    from mmref.references.mine import mine
    from mmref.run.models import as_run

    run_dir = as_run(chosen_model(parser, args), args.data, args.run_dir)
    mined = mine(run_dir, args.out, args.count, args.data, args.by, args.workers)
    found = mined.neighbors
    alone = f" {mined.alone} objects have none: no usable image and no caption." if mined.alone else ""
    print(
        f"{len(found.rows)} objects, {found.rows.shape[1]} neighbors each by {found.by}: mean cosine of the nearest "
        f"{found.similarity[:, 0].mean():.3f}, of the last {found.similarity[:, -1].mean():.3f}; "
        f"{100 * mined.unnamed:.1f} % of the objects are nobody's neighbor.{alone}"
    )
    print(f"next, to train on groups of them: mmref train ... --data.neighbors {shlex.quote(mined.place)}")
    return 0


def _info(args: argparse.Namespace) -> int:
    """`mmref references info`."""
    from mmref.references.bank_rows import describe

    print("\n".join(describe(chosen_model(args.parser, args), args.object)))
    return 0


def _add(args: argparse.Namespace) -> int:
    """`mmref references add`."""
    from mmref.references.bank_rows import add_objects
    from mmref.run.models import as_run

    run_dir = as_run(chosen_model(args.parser, args), args.data, args.run_dir)
    added = add_objects(run_dir, args.data, args.split, args.workers, args.per_object)
    print(
        f"{added.objects} objects added to {added.folder} ({added.known} had references already, {added.empty} have no usable "
        f"image or caption). Choose the refinement with them: mmref evaluate --model {run_dir}"
    )
    return 0


def _remove(args: argparse.Namespace) -> int:
    """`mmref references remove`."""
    from mmref.references.bank_rows import remove_objects
    from mmref.storage.texts import read_lines

    listed = read_lines(args.file, ReferencesError) if args.file else []
    named = [*args.object, *filter(None, listed)]
    if not named:
        raise UsageError("no object named: give `--object ID ...` or `--file FILE` with an id a line.")
    removed = remove_objects(chosen_model(args.parser, args), named)
    also = f"; also {', '.join(removed.reports)}" if removed.reports else ""
    print(
        f"{removed.objects} objects removed from {removed.checkpoints} checkpoints ({removed.unfinished} unfinished ones "
        f"deleted){also}. What this does not cover: docs/references.md."
    )
    return 0
