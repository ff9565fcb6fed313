"""`mmref train` and `mmref ledger`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from mmref.extras import need
from mmref.storage.locations import absolute
from mmref.terminal.arguments import place
from mmref.terminal.parser import Parser

PROFILED_STEPS = 5  # of `--profile` without a number


def train_main(argv: Sequence[str]) -> int:
    """`mmref train` and jobs/train.py."""
    from mmref.config import load_config

    parser = Parser(prog="mmref train", add_help=False, allow_abbrev=False)
    parser.add_argument("--profile", nargs="?", type=int, const=PROFILED_STEPS)  # the help of the config tells of it
    args, words = parser.parse_known_args(argv)
    if args.profile is not None:
        words += ["--train.profile", str(args.profile)]
    config = load_config(words)
    need("train", "mmref train")
    from mmref.train.trainer import train as run

    metrics, where = run(config), absolute(config.run_dir)
    if metrics:
        print(f"report: {where}/report.html")
    print(f"next, to search pictures of your own: mmref index PHOTOS --model {shlex.quote(where)} --out INDEX")
    return 0


def ledger_main(argv: Sequence[str]) -> int:
    """`mmref ledger`: exit status 1 when a sample was lost or repeated."""
    parser = Parser(
        prog="mmref ledger",
        description="Which samples the model of a run was trained on, up to its latest checkpoint, against what its plan asks "
        "for: how many were lost or repeated by failures, and how many broken ones were replaced. Exit status 1 when any was "
        "lost or repeated.",
    )
    parser.add_argument("run_dir", type=place, metavar="RUN", help="run directory of `mmref train`")
    args = parser.parse_args(argv)
    from mmref.train.ledger import audit_run

    audit = audit_run(args.run_dir)
    print(audit)
    return 0 if audit.sound else 1
