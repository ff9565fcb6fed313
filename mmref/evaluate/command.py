"""`mmref evaluate`: scores a run's best checkpoint on a split."""

from __future__ import annotations

from collections.abc import Sequence

from mmref.terminal.arguments import count, place
from mmref.terminal.parser import Parser


def main(argv: Sequence[str]) -> int:
    """`mmref evaluate` and jobs/evaluate.py."""
    parser = Parser(
        prog="mmref evaluate",
        description="Score the best checkpoint of a run on a split, before and after refinement, which is chosen on val.",
    )
    parser.add_argument("--checkpoint", required=True, type=place, metavar="RUN", help="run directory of `mmref train`")
    parser.add_argument("--data", type=place, metavar="SHARDS", help="shard set; default: the one the run was trained on")
    parser.add_argument("--split", default="test", help="split to report (default: test); refinement is chosen on val")
    parser.add_argument("--out", type=place, metavar="FILE", help="also write the metrics to this file or URL")
    parser.add_argument(
        "--workers", type=count,
        help="Ray actors that compute features; 0: in this process (default: eval.workers; 0 without Ray)",
    )  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="do not write report.html")
    args = parser.parse_args(argv)
    from mmref.evaluate.evaluation import evaluate_run

    evaluate_run(args.checkpoint, args.data, args.split, args.out, args.workers, report=not args.no_report)
    return 0
