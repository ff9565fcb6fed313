"""`mmref shards|train|evaluate|references|export|index|search|...`: the same functions that jobs/ call."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable

# before any import of ray or transformers: quieter, and no attempt to reach a hub for a local path's sake
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from mmref.errors import FileError, MMRefError, OutputError, ReaderLeftError, ReferencesError
from mmref.storage.locations import absolute, bypass_proxies
from mmref.terminal import output
from mmref.terminal.arguments import local_path, place, positive, text
from mmref.terminal.output import PrintableFormatter, printable
from mmref.version import __version__

OF_FILES = {  # what is wrong with a file that the error names, rather than with us
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EBUSY, errno.ETXTBSY, errno.EXDEV,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _dispatch(argv))


def run_command(command: Callable[[], int]) -> int:
    """Run a command; an error of ours is printed as its message, anything else keeps its traceback."""
    output.prepare()
    bypass_proxies()
    if logging.lastResort:
        logging.lastResort.setFormatter(PrintableFormatter())  # of warnings, where no other handler is set up
    try:
        try:
            return _named(command)
        finally:  # where argparse leaves too: at its own end Python could only complain
            sys.stdout.flush()
    except OutputError as error:
        return _report(error)


def _named(command: Callable[[], int]) -> int:
    try:
        return command()
    except MMRefError as error:
        return _report(error)
    except OSError as error:
        if error.errno not in OF_FILES or error.filename is None:
            raise
        return _report(FileError(f"{os.fsdecode(error.filename)}: {error.strerror}."))
    except KeyboardInterrupt:
        print("mmref: interrupted; the same command resumes from the last checkpoint.", file=sys.stderr)
        return 130


def _report(error: MMRefError) -> int:
    """Say what an error is; its exit status."""
    if not isinstance(error, ReaderLeftError):  # who left wants to hear no more
        print(printable(f"mmref: {type(error).__name__}: {error}", lines=True), file=sys.stderr)
    return error.exit_status


def _dispatch(argv: list[str]) -> int:
    if argv[:1] == ["train"]:
        return train(argv[1:])
    if argv[:1] == ["sizing"]:
        from mmref.sizing.command import main as sizing

        return sizing(argv[1:])
    if argv[:1] == ["tune"]:
        from mmref.tuning.sweep import main as tune

        return tune(argv[1:])
    if argv[:1] == ["ablate"]:
        from mmref.tuning.ablate import main as ablate

        return ablate(argv[1:])
    if argv[:1] and argv[0] in ("index", "search", "judge"):
        from mmref.retrieval import commands as retrieval

        return {"index": retrieval.index_main, "search": retrieval.search_main, "judge": retrieval.judge_main}[argv[0]](
            argv[1:]
        )
    if argv[:1] == ["serve"]:
        from mmref.retrieval.service.server import serve_main

        return serve_main(argv[1:])
    parser = argparse.ArgumentParser(prog="mmref", description="Text-to-image retrieval with multi-modal references.")
    parser.add_argument("--version", action="version", version=f"mmref {__version__}")
    commands = parser.add_subparsers(
        dest="command",
        required=True,
        metavar="{shards,train,sizing,evaluate,explain,references,export,index,search,serve,judge,ledger,tune,ablate}",
    )
    from mmref.shards.command import add_parser as add_shards

    add_shards(commands)
    for name, what in (
        ("train", "train, evaluate and report; `mmref train --help`"),
        ("sizing", "memory, bytes and FLOPs of a run before it is started; `mmref sizing --help`"),
        ("index", "make a search index of your images, add to it, remove; `mmref index --help`"),
        ("search", "search an index with a sentence, an image, or both; `mmref search --help`"),
        ("serve", "a search page and HTTP service over indexes; `mmref serve --help`"),
        ("judge", "keep what was right and wrong, export it as training data; `mmref judge --help`"),
        ("tune", "search hyper-parameters; `mmref tune --help`"),
        ("ablate", "compare configs over seeds; `mmref ablate --help`"),
    ):
        commands.add_parser(name, help=what, add_help=False)
    add_evaluate(commands.add_parser("evaluate", help="score a run's best checkpoint on a split"))
    from mmref.explain.command import add_arguments as add_explain

    add_explain(commands.add_parser("explain", help="where a match lies, what references say, why a result moved"))
    add_references(commands.add_parser("references", help="add objects to a trained run's references, or remove them"))
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
    print(f"report: {absolute(config.run_dir)}/report.html")
    return 0


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mmref evaluate` and jobs/evaluate.py."""
    parser.add_argument("--checkpoint", required=True, type=place, metavar="RUN", help="run directory of `mmref train`")
    parser.add_argument(
        "--data", type=place, metavar="SHARDS", help="shard set; default: the one the run was trained on"
    )
    parser.add_argument("--split", default="test", help="split to report (default: test); refinement is chosen on val")
    parser.add_argument("--out", type=place, metavar="FILE", help="also write the metrics to this file or URL")
    parser.add_argument("--workers", type=positive, help="Ray actors that compute features (default: eval.workers)")
    parser.add_argument("--no-report", action="store_true", help="do not write report.html")
    parser.set_defaults(run=evaluate)


def evaluate(args: argparse.Namespace) -> int:
    """`mmref evaluate` and jobs/evaluate.py."""
    from mmref.evaluate.evaluation import evaluate_run

    evaluate_run(args.checkpoint, args.data, args.split, args.out, args.workers, report=not args.no_report)
    return 0


def add_references(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mmref references`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="{info,add,remove}")
    info = actions.add_parser("info", help="how many objects the checkpoints of a run have references of")
    add = actions.add_parser("add", help="give the objects of a shard set references in the best checkpoint")
    remove = actions.add_parser("remove", help="remove objects from every checkpoint of a run, for good")
    for action in (info, add, remove):
        action.add_argument(
            "run_dir", type=place, metavar="RUN", help="run directory of `mmref train`, not training meanwhile"
        )
    info.add_argument(
        "--object", nargs="+", type=text, default=[], metavar="ID", help="also say whether these are there"
    )
    add.add_argument("--data", required=True, type=place, metavar="SHARDS", help="shard set that holds the new objects")
    add.add_argument("--split", default="train", help="split of it (default: train)")
    add.add_argument("--workers", type=positive, help="Ray actors that compute features (default: eval.workers)")
    remove.add_argument("--object", nargs="+", type=text, default=[], metavar="ID", help="ids of the objects")
    remove.add_argument("--file", type=local_path, metavar="FILE", help="text file with an id a line")
    for action, command in ((info, references_info), (add, references_add), (remove, references_remove)):
        action.set_defaults(run=command)


def references_info(args: argparse.Namespace) -> int:
    """`mmref references info`."""
    from mmref.references.bank_rows import describe

    print("\n".join(describe(args.run_dir, args.object)))
    return 0


def references_add(args: argparse.Namespace) -> int:
    """`mmref references add`."""
    from mmref.references.bank_rows import add_objects

    added = add_objects(args.run_dir, args.data, args.split, args.workers)
    print(
        f"{added.objects} objects added to {added.folder} ({added.known} had references already, {added.empty} have no usable "
        f"image or caption). Choose the refinement with them: mmref evaluate --checkpoint {args.run_dir}"
    )
    return 0


def references_remove(args: argparse.Namespace) -> int:
    """`mmref references remove`."""
    from mmref.references.bank_rows import remove_objects
    from mmref.storage.texts import read_lines

    listed = read_lines(args.file, ReferencesError) if args.file else []
    named = [*args.object, *filter(None, listed)]
    if not named:
        raise ReferencesError("no object named: give `--object ID ...` or `--file FILE` with an id a line.")
    removed = remove_objects(args.run_dir, named)
    also = f"; also {', '.join(removed.reports)}" if removed.reports else ""
    print(
        f"{removed.objects} objects removed from {removed.checkpoints} checkpoints ({removed.unfinished} unfinished ones "
        f"deleted){also}. What this does not cover: docs/references.md."
    )
    return 0


def add_export(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mmref export`."""
    parser.description = (
        "Write the best checkpoint of an evaluated run as one folder: weights, config, tokenizer, references, the "
        "refinement chosen on val, and a copy for plain transformers. `mmref.load(DIR)` reads it."
    )
    parser.add_argument("run_dir", type=place, metavar="RUN", help="run directory of `mmref train`, or its URL")
    parser.add_argument(
        "--out", required=True, type=local_path, metavar="DIR", help="folder to write; must not exist yet"
    )
    parser.add_argument("--data", type=place, metavar="SHARDS", help="shard set of the run, where it has been moved")
    parser.set_defaults(run=export)


def export(args: argparse.Namespace) -> int:
    """`mmref export`."""
    from mmref.export.write import export_run

    print(f"exported to {export_run(args.run_dir, args.out, args.data)}")
    return 0


def add_ledger(parser: argparse.ArgumentParser) -> None:
    """Arguments of `mmref ledger`."""
    parser.description = (
        "Which samples the model of a run was trained on, up to its latest checkpoint, against what its plan asks for: "
        "how many were lost or repeated by failures, and how many broken ones were replaced. Exit status 1 when any was "
        "lost or repeated."
    )
    parser.add_argument("run_dir", type=place, metavar="RUN", help="run directory of `mmref train`")
    parser.set_defaults(run=ledger)


def ledger(args: argparse.Namespace) -> int:
    """`mmref ledger`."""
    from mmref.train.ledger import audit_run

    audit = audit_run(args.run_dir)
    print(audit)
    return 0 if audit.sound else 1


if __name__ == "__main__":
    sys.exit(main())
