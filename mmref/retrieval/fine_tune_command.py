"""`mmref train`, also `--from-judgements`: which of the two is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence

from mmref.errors import UsageError
from mmref.extras import need
from mmref.terminal.arguments import count, local_path, share
from mmref.terminal.parser import Parser

FLAG = "--from-judgements"


def train_main(argv: Sequence[str]) -> int:
    """`mmref train`, jobs/train.py."""
    if not any(word.partition("=")[0] == FLAG for word in argv):
        from mmref.train.command import train_main as plain

        return plain(argv)
    return _from_judgements(argv)


def _from_judgements(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="mmref train",
        usage=f"mmref train {FLAG} INDEX|FILE --run_dir DIR [--held-out SHARE] [--SECTION.FIELD VALUE ...]",
        description="Fine-tune the model of an index on what was judged right and wrong (by `mmref search --judge` or `mmref "
        "judge`), and evaluate it on sentences that were held out. Fields of `mmref train` win over "
        "what is chosen.",
        allow_abbrev=False,
    )
    parser.add_argument(FLAG, type=local_path, metavar="INDEX|FILE", help="index with judgements, or a file of them with --index")
    parser.add_argument("--index", type=local_path, help="index whose results were judged, where a file is given")
    parser.add_argument(
        "--run_dir", required=True, type=local_path, metavar="DIR", help="of the new run; the same again resumes it"
    )
    parser.add_argument(
        "--held-out", type=share, default=0.3, metavar="SHARE",
        help="share of the sentences whose judgements are for evaluation alone (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--split-seed", type=count, default=0, metavar="N", help="of the division of sentences (default: 0)")
    parser.add_argument(
        "--judgements-alone", action="store_true",
        help="do not mix in the set that the model was trained on; by default half of the steps are of it, where it can be read",
    )  # fmt: skip
    args, flags = parser.parse_known_args(argv)
    index, file = places(args.from_judgements, args.index)
    need("train", f"mmref train {FLAG}")
    from mmref.retrieval.fine_tune import fine_tune

    fine_tune(index, file, args.run_dir, flags, args.held_out, args.split_seed, not args.judgements_alone)
    print(f"report: {args.run_dir}/report.html")
    print(f"next, to search with the new model: mmref index IMAGES --model {args.run_dir} --out NEW_INDEX")
    return 0


def places(given: str, index: str | None) -> tuple[str, str | None]:
    """(index, file of judgements; None: the index's own). Raises UsageError."""
    if index:
        return index, given
    if os.path.isdir(given):
        return given, None
    if os.path.exists(os.path.join(os.path.dirname(given), "manifest.json")):
        return os.path.dirname(given), given
    raise UsageError(f"{given} is no index, and its folder is none: name the index whose results were judged with --index.")
