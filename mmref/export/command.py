"""`mmref export`: a run's best model as a folder of its own. `mmref push`: as a repository on a hub of models."""

from __future__ import annotations

from collections.abc import Sequence

from mmref.terminal.arguments import chosen_model, local_path, model_argument, place, text
from mmref.terminal.parser import Parser


def main(argv: Sequence[str]) -> int:
    """`mmref export`."""
    parser = Parser(
        prog="mmref export",
        description="Write the best checkpoint of an evaluated run as one folder: weights, config, tokenizer, references, the "
        "refinement chosen on val, and a copy for plain transformers. `mmref.load(DIR)` reads it. A pretrained model is written "
        "as it is.",
    )
    model_argument(parser, "run directory of `mmref train`, or its URL; or a pretrained model, by hub id or folder")
    parser.add_argument("--out", required=True, type=local_path, metavar="DIR", help="folder to write; must not exist yet")
    parser.add_argument("--data", type=place, metavar="SHARDS", help="shard set of the run, where it has been moved")
    parser.add_argument(
        "--interpolate", action="store_true",
        help="mix the weights with those that training started from, by the share that is best on val (WiSE-FT)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    from mmref.errors import ExportError
    from mmref.export.write import export_pretrained, export_run
    from mmref.run.models import find_model

    found = find_model(chosen_model(parser, args))
    if found.kind == "export":
        raise ExportError(f"{found.place} is an export already: copy the folder.")
    if found.kind == "pretrained":
        if args.interpolate:
            raise ExportError(f"{found.place} has not been fine-tuned: there is nothing to interpolate with.")
        print(f"exported to {export_pretrained(found.place, args.out)}")
    else:
        print(f"exported to {export_run(found.place, args.out, args.data, args.interpolate)}")
    return 0


def push_main(argv: Sequence[str]) -> int:
    """`mmref push`."""
    parser = Parser(
        prog="mmref push",
        description="Send a run's best model, or an export, with its model card to a repository on the Hugging Face hub. Set "
        "HF_TOKEN, or run `hf auth login` before; HF_ENDPOINT names another hub. Files of the repository that the model does not "
        "have are removed.",
    )
    parser.add_argument("model", type=place, metavar="RUN", help="evaluated run of `mmref train`, or a folder of `mmref export`")
    parser.add_argument(
        "repo", metavar="USER/REPO", help="repository, made where there is none; USER/REPO@BRANCH: a branch of it"
    )
    parser.add_argument("--data", type=place, metavar="SHARDS", help="shard set of the run, where it has been moved")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", type=text, help="of the commit")
    args = parser.parse_args(argv)
    from mmref.export.push import push

    print(f"pushed: {push(args.model, args.repo, args.data, args.private, args.message)}")
    print(f'load it: mmref.load("hf://{args.repo.removeprefix("hf://")}")')
    return 0
