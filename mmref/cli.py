"""`mmref shards|train|sizing|evaluate|export|index|search|judge|ledger|tune|ablate`: the same functions that jobs/ call."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

# before any import of ray or transformers: quieter, and no attempt to reach a hub for a local path's sake
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from mmref import __version__
from mmref.errors import MMRefError


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _dispatch(argv))


def run_command(command: Callable[[], int]) -> int:
    """Run a command; an error of ours is printed as its message, anything else keeps its traceback."""
    try:
        return command()
    except MMRefError as error:
        print(f"mmref: {type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("mmref: interrupted; the same command resumes from the last checkpoint.", file=sys.stderr)
        return 130


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["train"]:
        return train(argv[1:])
    if argv[:1] == ["sizing"]:
        from mmref.sizing import main as sizing

        return sizing(argv[1:])
    if argv[:1] == ["tune"]:
        from tune.sweep import main as tune

        return tune(argv[1:])
    if argv[:1] == ["ablate"]:
        from tune.ablate import main as ablate

        return ablate(argv[1:])
    if argv[:1] and argv[0] in ("index", "search", "judge"):
        from mmref.retrieval import commands as retrieval

        return {"index": retrieval.index_main, "search": retrieval.search_main, "judge": retrieval.judge_main}[argv[0]](
            argv[1:]
        )
    parser = argparse.ArgumentParser(prog="mmref", description="Text-to-image retrieval with multi-modal references.")
    parser.add_argument("--version", action="version", version=f"mmref {__version__}")
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="{shards,train,sizing,evaluate,export,index,search,judge,ledger,tune,ablate}",
    )
    from data_shards.cli import add_parser as add_shards

    add_shards(commands)
    for name, text in (
        ("train", "train, evaluate and report; `mmref train --help`"),
        ("sizing", "memory, bytes and FLOPs of a run before it is started; `mmref sizing --help`"),
        ("index", "make a search index of your images, add to it, remove; `mmref index --help`"),
        ("search", "search an index with a sentence, an image, or both; `mmref search --help`"),
        ("judge", "keep what was right and wrong, export it as training data; `mmref judge --help`"),
        ("tune", "search hyper-parameters; `mmref tune --help`"),
        ("ablate", "compare configs over seeds; `mmref ablate --help`"),
    ):
        commands.add_parser(name, help=text, add_help=False)
    add_evaluate(commands.add_parser("evaluate", help="score a run's best checkpoint on a split"))
    add_export(commands.add_parser("export", help="write a run's best model as a folder that loads anywhere"))
    add_ledger(commands.add_parser("ledger", help="hold the samples a run has seen against its plan"))
    args = parser.parse_args(argv)
    result = args.run(args)
    return int(result or 0)


def train(argv: list[str]) -> int:
    """`mmref train` and jobs/train.py."""
    from mmref.config import load_config

    config = load_config(argv)
    from mmref.train.trainer import train as run

    run(config)
    print(f"report: {os.path.abspath(config.run_dir) if '://' not in config.run_dir else config.run_dir}/report.html")
    return 0


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mmref evaluate` and jobs/evaluate.py."""
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run directory of `mmref train`")
    parser.add_argument("--data", metavar="SHARDS", help="shard set; default: the one the run was trained on")
    parser.add_argument("--split", default="test", help="split to report (default: test); refinement is chosen on val")
    parser.add_argument("--out", metavar="FILE", help="also write the metrics to this file or URL")
    parser.add_argument("--workers", type=int, help="Ray actors that compute features (default: eval.workers)")
    parser.add_argument("--no-report", action="store_true", help="do not write report.html")
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """`mmref evaluate` and jobs/evaluate.py."""
    from mmref.evaluate.evaluate import evaluate_run

    evaluate_run(args.checkpoint, args.data, args.split, args.out, args.workers, report=not args.no_report)
    return 0


def add_export(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mmref export`."""
    parser.description = (
        "Write the best checkpoint of an evaluated run as one folder: weights, config, tokenizer, references, the "
        "refinement chosen on val, and a copy for plain transformers. `mmref.load(DIR)` reads it."
    )
    parser.add_argument("run_dir", metavar="RUN", help="run directory of `mmref train`, or its URL")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist yet")
    parser.add_argument("--data", metavar="SHARDS", help="shard set of the run, where it has been moved")
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> int:
    """`mmref export`."""
    from mmref.export import export_run

    print(f"exported to {export_run(args.run_dir, args.out, args.data)}")
    return 0


def add_ledger(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mmref ledger`."""
    parser.description = (
        "Which samples the model of a run was trained on, up to its latest checkpoint, against what its plan asks for: "
        "how many were lost or repeated by failures, and how many broken ones were replaced. Exit status 1 when any was "
        "lost or repeated."
    )
    parser.add_argument("run_dir", metavar="RUN", help="run directory of `mmref train`")
    parser.set_defaults(run=ledger)


def ledger(args: argparse.Namespace) -> int:
    """`mmref ledger`."""
    from mmref.train.ledger import audit_run

    audit = audit_run(args.run_dir)
    print(audit)
    return 0 if audit.sound else 1


if __name__ == "__main__":
    sys.exit(main())
