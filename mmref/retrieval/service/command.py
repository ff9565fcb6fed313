"""`mmref serve INDEX [INDEX ...]` and jobs/serve.py: options in. What they start needs the extra `serve`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from mmref.errors import ServeError, UsageError
from mmref.extras import missing, need
from mmref.retrieval.service.access import TOKEN, network
from mmref.retrieval.service.limits import Limits
from mmref.storage.texts import read_text
from mmref.terminal.arguments import amount, count, local_path, positive
from mmref.terminal.parser import Parser

SHORTEST_TOKEN = 16


def serve_main(argv: Sequence[str]) -> int:
    """`mmref serve INDEX [INDEX ...]`."""
    parser = Parser(
        prog="mmref serve",
        description="Search indexes through a page and over HTTP. An index that changes on disk is opened again while it "
        "serves. Beyond this machine a token is needed.",
    )
    parser.add_argument(
        "indexes",
        nargs="+",
        type=local_path,
        metavar="INDEX",
        help="directory of `mmref index`; the first is the default",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=count, default=8000, help="0: a free one (default: %(default)s)")
    parser.add_argument(
        "--replicas", type=count,
        help="Ray Serve replicas of each index, started by load; 0: in this process (default: 1; 0 without the extra `replicas`)",
    )  # fmt: skip
    parser.add_argument(
        "--min-replicas", type=count, metavar="N",
        help="replicas of each index that are kept whatever the load: with two, one that dies is not missed (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--token-file",
        type=local_path,
        metavar="FILE",
        help=f"file with the token that requests must bring (default: ${TOKEN})",
    )
    parser.add_argument(
        "--trusted-proxy", metavar="ADDRESS", type=network, action="append", default=[],
        help="address or range (10.0.0.0/8) of a proxy whose X-Forwarded-For names the client that limits count; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--keep-metadata",
        action="store_true",
        help="give images out with what cameras and programs wrote into them (GPS, ...)",
    )
    parser.add_argument("--store", metavar="URL", help="what finds the candidates: of `mmref index export`, for one index alone")
    parser.add_argument(
        "--judge", action="store_true",
        help="let visitors say on the page which results are right: what they say is written into a file, for "
        "`mmref train --from-judgements`",
    )  # fmt: skip
    parser.add_argument(
        "--judgements", type=local_path, metavar="FILE",
        help="where --judge writes, for one index alone (default: judgements.jsonl in each index)",
    )  # fmt: skip
    defaults = Limits()
    for name, text in (
        ("text", "longest query, characters"),
        ("image_bytes", "largest image of a query"),
        ("pixels", "most pixels of an image of a query"),
        ("top", "most results of a query"),
        ("candidates", "most candidates of a query that are refined"),
        ("rate", "searches a second of one client; 0: any number"),
    ):
        default = getattr(defaults, name)
        kind = positive if isinstance(default, int) else amount
        parser.add_argument(_flag(name), type=kind, default=default, help=f"{text} (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, most in defaults.most().items():
        if (given := getattr(args, f"max_{name}")) > most:
            fix = f"give at most {most}"
            raise UsageError(f"{_flag(name)} {given} is more than the service's other limits leave room for: {fix}.")
    if args.store and len(args.indexes) > 1:
        raise UsageError("--store is of one index: serve the others on another port.")
    if args.judgements and not args.judge:
        raise UsageError("--judgements says where --judge writes: give both.")
    if args.judgements and len(args.indexes) > 1:
        raise UsageError("--judgements is of one index: leave it out, so that each keeps its own, or serve the others apart.")
    need("serve", "mmref serve")
    if args.replicas:
        need("replicas", f"--replicas {args.replicas}", otherwise="Or serve in one process: `--replicas 0`.")
    elif args.replicas is None:
        args.replicas = 0 if missing("replicas") else 1
    kept = min(1, args.replicas) if args.min_replicas is None else args.min_replicas
    if not min(1, args.replicas) <= kept <= args.replicas:
        fix = "keep at least 1, and at most as many as --replicas says."
        raise UsageError(f"--min-replicas {kept} does not go with --replicas {args.replicas}: {fix}")
    chosen = {f.name: getattr(args, f"max_{f.name}") for f in fields(Limits) if hasattr(args, f"max_{f.name}")}
    limits, token = Limits(**chosen, keep_metadata=args.keep_metadata), read_token(args.token_file)
    from mmref.retrieval.service.server import serve

    status: Any = 0
    try:
        serve(
            args.indexes, args.host, args.port, args.replicas, token, limits, args.trusted_proxy, kept, args.store,
            args.judge, args.judgements,
        )  # fmt: skip
    except SystemExit as stopped:
        status = stopped.code
    sys.stdout.flush()
    os._exit(status)  # a search that still computes, and Python's own tidying, would hold the process for seconds


def _flag(name: str) -> str:
    """The option of a field of Limits."""
    return f"--max-{name.replace('_', '-')}"


def read_token(path: str | None) -> str | None:
    """The token of a file or of the environment, None where there is none. Raises ServeError.

    The variable is taken out of the environment: whatever is started from here on would inherit it.
    """
    given = os.environ.pop(TOKEN, "").strip()
    if path:
        try:
            token = read_text(path, ServeError).strip()
        except ServeError as error:
            raise ServeError(f"the token cannot be read: {error}") from None
        source = path
    else:
        token, source = given, f"${TOKEN}"
    if (token or path) and (len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        raise ServeError(
            f"the token of {source} is too short, or no plain text: give at least {SHORTEST_TOKEN} letters and digits, "
            "such as `openssl rand -hex 16` prints."
        )
    return token or None
