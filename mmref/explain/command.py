"""`mmref explain RUN`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmref.terminal.arguments import chosen_model, model_argument, place, positive, run_dir_argument, text
from mmref.terminal.output import printable
from mmref.terminal.parser import Parser

EXAMPLES = 4


def main(argv: Sequence[str]) -> int:
    """`mmref explain`."""
    parser = Parser(
        prog="mmref explain",
        description="Explain queries and objects by a run's best checkpoint: where in an image its caption, reference and "
        "features look, the words that the reconstruction head reads out of a reference beside the captions people wrote, and "
        "which references moved a result. PNGs in RUN/explain, and a section of RUN/report.html (of another set: "
        "RUN/explain-SET, RUN/report-SET.html; of another split: -SPLIT). Without a query or object: the captions that "
        "refinement moved most, and the first training objects.",
    )
    model_argument(parser, "run directory of `mmref train`, evaluated; or an export or pretrained model (then with --data)")
    run_dir_argument(parser)
    parser.add_argument("--query", nargs="+", type=text, default=[], metavar="TEXT", help="sentences that search the split")
    parser.add_argument("--object", nargs="+", type=text, default=[], metavar="ID", help="objects of any split of the set")
    parser.add_argument("--examples", type=positive, default=EXAMPLES, help="how many, where none is named (%(default)s)")
    parser.add_argument("--data", type=place, metavar="SHARDS", help="shard set; default: the one the run was trained on")
    parser.add_argument("--split", default="test", help="split whose images are searched (default: test)")
    parser.add_argument("--grid", type=positive, default=7, help="cells of a heat map on each side (default: %(default)s)")
    args = parser.parse_args(argv)
    _explain(args, chosen_model(parser, args))
    return 0


def _explain(args: argparse.Namespace, model: str) -> None:
    """Explain, write, and print what was found."""
    from mmref.explain.explained_run import ExplainedRun
    from mmref.explain.section import write
    from mmref.run.models import as_run

    run = ExplainedRun(as_run(model, args.data, args.run_dir), args.data, args.split, args.grid)
    run.run.check_writable()
    queries, objects = args.query, args.object
    if not queries and not objects:
        queries = run.moved(args.examples - args.examples // 2)
        objects = list(run.shards.index("train").object_ids[: args.examples // 2]) if "train" in run.shards.splits else []
    found = [run.explain_object(name) for name in objects] + [run.explain_query(text) for text in queries]
    for e in found:
        print(printable(f"{e.kind} {e.title}" + (f"; reference of {e.reference}" if e.reference else "")))
        if e.read:
            print(printable(f"  the reference says: {e.read}"))
        if e.telling:
            print(printable("  more than others: " + ", ".join(word for word, _ in e.telling)))
        for m in e.moves:
            because = ", ".join(f"{name} {part:+.3f}" for name, part in m.references)
            right = " (right)" if m.right else ""
            print(printable(f"  {m.rank} (before {m.before}) {m.image_id} “{m.label}”{right}: {because or 'not refined'}"))
    for path in write(run.run, run.checkpoint.folder, found, run.view):
        print(f"written to {path}")
