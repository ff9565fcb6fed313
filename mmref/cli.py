"""`mmref COMMAND`: the one place that knows every command. The doors in jobs/, tune/ and data_shards/ call `main` as well."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

# These must be set before any import of ray, torch, transformers or OpenCV: they are quieter then, no hub is asked for a local
# path, and OpenCV leaves the cores to us.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OPENCV_FOR_THREADS_NUM", "1")
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
# Threads of PyTorch and faiss wait for each other by spinning. Where other programs want the cores, each wait then lasts until
# the system takes the core away, and what takes milliseconds takes a second (benchmarks/busy_cores.py). These spin shortly, and
# sleep: on idle cores that costs nothing.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "1000"

from mmref.terminal.parser import Parser
from mmref.terminal.run_command import run_command
from mmref.version import __version__


class Command(NamedTuple):
    """What runs a command: "module:function", which takes the words behind it and returns the exit status."""

    place: str
    what: str  # one line of help
    after_interrupt: str = ""  # what the same command does after Ctrl-C, where it does not begin anew

    def __call__(self, argv: Sequence[str]) -> int:
        module, _, function = self.place.partition(":")  # imported when it is asked for: some take seconds
        run: Callable[[Sequence[str]], int] = getattr(importlib.import_module(module), function)
        return run(argv)


COMMANDS = {
    "shards": Command("mmref.shards.command:main", "build, inspect and verify shard sets (your own data: `build table`)"),
    "train": Command(
        "mmref.retrieval.fine_tune_command:train_main",
        "train, evaluate and report",
        "the same command resumes from the last checkpoint",
    ),
    "sizing": Command("mmref.sizing.command:main", "memory, bytes and FLOPs of a run before it is started"),
    "evaluate": Command("mmref.evaluate.command:main", "score a run, an export or a pretrained model on a split"),
    "explain": Command("mmref.explain.command:main", "where a match lies, what references say, why a result moved"),
    "references": Command("mmref.references.command:main", "add objects to the references of a run or model, or remove them"),
    "mine": Command("mmref.references.command:mine_main", "write which objects a model confuses, for batches of hard negatives"),
    "export": Command("mmref.export.command:main", "write a run's best model as a folder that loads anywhere"),
    "push": Command("mmref.export.command:push_main", "send a run's best model, or an export, to the Hugging Face hub"),
    "index": Command("mmref.retrieval.command:index_main", "make a search index of your images, add to it, remove"),
    "search": Command("mmref.retrieval.search_command:search_main", "search an index with a sentence, an image, or both"),
    "serve": Command("mmref.retrieval.service.command:serve_main", "a search page and HTTP service over indexes"),
    "judge": Command("mmref.retrieval.search_command:judge_main", "keep what was right and wrong, export it as training data"),
    "ledger": Command("mmref.train.command:ledger_main", "hold the samples a run has seen against its plan"),
    "tune": Command("mmref.tuning.command:tune_main", "search hyper-parameters"),
    "ablate": Command("mmref.tuning.command:ablate_main", "compare configs over seeds"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    command = next((COMMANDS[word] for word in words if word in COMMANDS), None)
    return run_command(lambda: _dispatch(words), command.after_interrupt if command else "")


def _dispatch(argv: Sequence[str]) -> int:
    at = next((at for at, word in enumerate(argv) if word in COMMANDS), None)
    if at == 0:
        return COMMANDS[argv[0]](argv[1:])
    parser = Parser(
        prog="mmref",
        description="Text-to-image retrieval with multi-modal references.",
        epilog="`mmref COMMAND --help` says what a command takes.",
    )
    parser.add_argument("--version", action="version", version=f"mmref {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.what, add_help=False)
    parser.parse_args(argv if at is None else argv[: at + 1])  # help, the version, an error, or what stands before a command
    return COMMANDS[argv[at]](argv[at + 1 :]) if at is not None else 2


if __name__ == "__main__":
    sys.exit(main())
