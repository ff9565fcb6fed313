"""`mmref export`: a run's best model as a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence

from mmref.terminal.arguments import local_path, place
from mmref.terminal.parser import Parser


def main(argv: Sequence[str]) -> int:
    """`mmref export`."""
    parser = Parser(
        prog="mmref export",
        description="Write the best checkpoint of an evaluated run as one folder: weights, config, tokenizer, references, the "
        "refinement chosen on val, and a copy for plain transformers. `mmref.load(DIR)` reads it.",
    )
    parser.add_argument("run_dir", type=place, metavar="RUN", help="run directory of `mmref train`, or its URL")
    parser.add_argument("--out", required=True, type=local_path, metavar="DIR", help="folder to write; must not exist yet")
    parser.add_argument("--data", type=place, metavar="SHARDS", help="shard set of the run, where it has been moved")
    args = parser.parse_args(argv)
    from mmref.export.write import export_run

    print(f"exported to {export_run(args.run_dir, args.out, args.data)}")
    return 0
