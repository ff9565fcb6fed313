"""`mmref index export`: the rows of an index, to an engine that finds candidates, or to a file."""

from __future__ import annotations

from collections.abc import Sequence

from mmref.errors import UsageError
from mmref.terminal.arguments import local_path
from mmref.terminal.parser import Parser


def export_main(argv: Sequence[str]) -> int:
    """`mmref index export INDEX --to ENGINE --out PLACE`."""
    parser = Parser(
        prog="mmref index export",
        description="Write what an index knows of its items (ids, metadata, features, codes) to an engine or a file, in place of "
        "what was there. `mmref search INDEX --store URL` and `mmref serve INDEX --store URL` have the engine find candidates. "
        "Model and thumbnails stay in the index. Export again when it has changed.",
    )
    parser.add_argument("index", type=local_path, metavar="INDEX")
    parser.add_argument("--to", required=True, choices=("parquet", "lancedb", "qdrant", "pgvector"), help="what is written to")
    parser.add_argument(
        "--out", required=True, metavar="FILE|URL",
        help="a file for parquet; else lancedb://FOLDER, qdrant://HOST:PORT or postgresql://USER@HOST/DATABASE, and #TABLE "
        "(default: #mmref)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    from mmref.retrieval.stores.export import export_index
    from mmref.retrieval.stores.places import engine_of

    if args.to == "parquet":
        args.out = local_path(args.out)
    elif engine_of(args.out) != args.to:
        raise UsageError(f"--to {args.to} and the URL of --out do not go together.")
    about = export_index(args.index, args.to, args.out)
    print(f"{about.items:,} items exported, {about.dim} numbers each, generation {about.generation}")
    if args.to != "parquet":
        print("next: mmref search INDEX TEXT --store URL")
    return 0
