"""`mmref index duplicates`: groups of images that are alike, as lines, a table, a page or JSON, and what takes them out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mmref.errors import SearchIndexError, UsageError
from mmref.storage.whole_folder import check_output, write_output
from mmref.terminal.arguments import local_path
from mmref.terminal.output import printable, to_json
from mmref.terminal.parser import Parser

if TYPE_CHECKING:
    from mmref.retrieval.duplicates import Found, Group

TABLES = (".csv", ".jsonl")
SHOWN_GROUPS, SHOWN_IDS = 10, 4  # on the terminal
MOST_REMOVED = 0.5  # of an index, without a person having looked


def duplicates_main(argv: Sequence[str]) -> int:
    """`mmref index duplicates INDEX`."""
    args = _parser().parse_args(argv)
    from mmref.retrieval import index
    from mmref.retrieval.duplicates import ABOVE, find_duplicates, read_choice

    if args.leave_out:
        if args.remove or args.table or args.html:
            raise UsageError("--leave-out takes a choice that was made before: give it alone.")
        ids = read_choice(args.leave_out)
        manifest = index.remove(args.index, ids, for_good=True)
        print(f"{len(ids):,} images left out for good; {args.index}: {manifest.items:,} images")
        return 0
    for option, path in (("--table", args.table), ("--html", args.html)):
        if path:
            check_output(option, path)
    if args.table and not args.table.lower().endswith(TABLES):
        raise UsageError(f"--table {args.table}: the ending says what it is, {' or '.join(TABLES)}.")
    if args.remove and args.above is None:
        raise UsageError("--remove needs --above: which cosine tells copies depends on the model. Look first, with --html.")
    found = find_duplicates(args.index, ABOVE if args.above is None else args.above, args.keep)
    _write(found, args.table, args.html)
    print(to_json(found.to_dict()) if args.json else "\n".join(describe(found)))
    if args.remove and (ids := found.left_out()):
        if len(ids) > MOST_REMOVED * found.items:
            raise SearchIndexError(
                f"{len(ids):,} of {found.items:,} images would go. Nothing was removed: look at the groups (--html), raise "
                "--above, or name the images with --leave-out FILE."
            )
        manifest = index.remove(args.index, ids, for_good=True)
        if not args.json:
            print(f"{len(ids):,} images left out for good; {args.index}: {manifest.items:,} images")
    return 0


def _parser() -> Parser:
    from mmref.retrieval.duplicates import ABOVE, KEEP

    parser = Parser(
        prog="mmref index duplicates",
        description="Find images of an index that are the same by their bytes, or nearly the same by their features, in groups. "
        "What is alike through others is one group. Nothing changes without --remove or --leave-out.",
    )
    parser.add_argument("index", type=local_path, metavar="INDEX")
    parser.add_argument(
        "--above", type=float, metavar="COSINE",
        help=f"images of at least this cosine are alike; 1: the same bytes alone (default: {ABOVE})",
    )  # fmt: skip
    parser.add_argument(
        "--keep", choices=KEEP, default="first",
        help="which image of a group is not left out: the first in the index, or the one of most pixels (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--table", type=local_path, metavar="FILE", help="write a row an image, as .csv or .jsonl")
    parser.add_argument("--html", type=local_path, metavar="FILE", help="write a page to look at the groups and choose")
    parser.add_argument("--json", action="store_true", help="print the groups as JSON")
    parser.add_argument("--remove", action="store_true", help="take all but the one that is kept of each group out of the index")
    parser.add_argument(
        "--leave-out", type=local_path, metavar="FILE",
        help="take out what a reviewed file names: a table of --table, where leave_out is yes, or ids, one a line",
    )  # fmt: skip
    return parser


def _write(found: Found, table: str | None, page: str | None) -> None:
    from mmref.retrieval.duplicates import as_table
    from mmref.retrieval.show import render_duplicates

    if table:
        write_output("--table", table, as_table(found, os.path.splitext(table)[1].lower()))
    if page:
        write_output("--html", page, render_duplicates(found))


def describe(found: Found) -> Iterator[str]:
    """What was found, in lines."""
    groups = found.groups
    how = "the same bytes" if found.above == 1 else f"a cosine of at least {found.above:g}"
    inside, left_out = len(found.members()), len(found.left_out())
    yield f"{found.items:,} images: {len(groups):,} groups with {how}, of {inside:,} images; {left_out:,} are not the one kept"
    if groups:
        yield f"  the largest has {max(len(group.members) for group in groups):,} images"
    if not found.exact:
        yield "compared through the approximate index: some may be missed"
    counts = {
        "hold the same bytes throughout": sum(group.same_bytes for group in groups),
        "hold images of several objects": sum(group.several("object_id") for group in groups),
        "hold images of several splits": sum(group.several("split") for group in groups),
    }
    yield from (f"  {count:,} {what}" for what, count in counts.items() if count)
    yield from (_line(number, group) for number, group in enumerate(groups[:SHOWN_GROUPS], 1))
    if (more := len(groups) - SHOWN_GROUPS) > 0:
        yield f"... and {more:,} more: --html FILE shows them, --table FILE lists them"


def _line(number: int, group: Group) -> str:
    named = [printable(member.id) for member in group.members[:SHOWN_IDS]]
    more = f", and {len(group.members) - SHOWN_IDS:,} more" if len(group.members) > SHOWN_IDS else ""
    alike = "same bytes" if group.same_bytes else f"{group.lowest:.4f}"
    return f"{number:>6}  {alike:>10}  {', '.join(named)}{more}"
