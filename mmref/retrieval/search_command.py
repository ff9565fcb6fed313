"""`mmref search` and `mmref judge`: options in, a table or a file out."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mmref.errors import FilterError, UsageError
from mmref.retrieval.command import device_option, lines_of
from mmref.storage.locations import expanded
from mmref.storage.whole_folder import check_output, write_output
from mmref.terminal.arguments import count, local_path, positive, share, text
from mmref.terminal.output import printable, to_json
from mmref.terminal.parser import Parser
from mmref.terminal.progress import say

if TYPE_CHECKING:
    from mmref.retrieval.results import Answer, Result


def search_main(argv: Sequence[str]) -> int:
    """`mmref search INDEX "a sentence"`, `mmref search --url http://HOST:PORT "a sentence"`."""
    args = _search_parser().parse_intermixed_args(_conditions_apart(argv))
    _check_search(args)
    from mmref.retrieval.results import Query
    from mmref.retrieval.show import NO_CLOSE_MATCH, format_objects, format_results, render_page

    queries = [Query(line) for line in lines_of(args.batch)] if args.batch else []
    queries = queries or [Query(args.text, args.image, args.image_weight)]
    if args.html:
        check_output("--html", args.html)
    if args.url:
        from mmref.retrieval.client import ServiceClient

        service = ServiceClient(args.url, args.token, args.index_name)
        if args.judge:
            service.check_judging(queries[0].text or "")  # before anybody is asked
        answers = service.search_many(queries, _asked(args))
    else:
        searcher = _searcher(args)
        answers = _answers(searcher, queries, args)
    shown: Any = format_objects if args.by == "object" else format_results
    names = [query.text or str(query.image) for query in queries]
    for name, answer in zip(names, answers):
        if args.json:
            found = [r.to_dict() for r in answer.results]
            print(to_json({"query": name, "close_match": answer.close_match, "results": found}))
        elif not args.html:
            print(printable(name) if len(names) > 1 else "", shown(answer.results), sep="\n" if len(names) > 1 else "")
            if answer.close_match is False:
                print(NO_CLOSE_MATCH)
    if args.html:
        told = list(zip(names, answers))
        if args.url:
            page = render_page(service.name, service.items, service.thumbnail, told)
        else:
            page = render_page(searcher.index.name, len(searcher), searcher.thumbnail, told)
        write_output("--html", args.html, page)
        print(f"written to {args.html}")
    if args.judge:
        of_sentences: Any = [(query.text or "", answer.results) for query, answer in zip(queries, answers)]
        if args.url:
            _ask(of_sentences, service.judge, service.url)
        else:
            from mmref.retrieval.feedback import Judgements

            judgements = Judgements.of(searcher.index, args.judgements)
            _ask(of_sentences, lambda *said: judgements.save(searcher, *said), judgements.path)
    return 0


def _check_search(args: argparse.Namespace) -> None:
    """Which words are INDEX and TEXT, and whether the options go together. Raises UsageError."""
    if args.url:
        if args.text is not None:
            raise UsageError(f"--url asks a service, so that {args.index!r} is no index to open: give the sentence alone.")
        args.index, args.text = None, args.index
        if args.judgements or args.store or args.device != "auto":
            raise UsageError("--judgements, --store and --device are of an index that is opened here: leave them out, or --url.")
    elif args.index is None:
        raise UsageError("name the INDEX to search, or a service with --url.")
    elif args.token is not None or args.index_name is not None:
        raise UsageError("--token and --index are of a service: give --url with them.")
    else:
        args.index = local_path(args.index)
    if args.text is not None:
        args.text = text(args.text)
    if args.by == "image" and args.images:
        raise UsageError("--images is of objects: give --by object with it.")
    if args.by == "object" and args.judge:
        raise UsageError("--judge asks of single images: leave out --by object.")
    if args.judge and args.image:
        raise UsageError("--judge keeps what a sentence asks for, and an image is none: leave out --image.")
    if args.batch and (args.text or args.image):
        raise UsageError("give one query, or many with --batch, not both.")


def _searcher(args: argparse.Namespace) -> Any:
    from mmref.retrieval.filters import read_where

    try:
        read_where(args.where)
    except FilterError as error:  # before the index is opened, which takes seconds
        raise UsageError(str(error)) from None
    from mmref.model.device import described
    from mmref.retrieval.store_searcher import open_searcher

    searcher = open_searcher(args.index, args.device, args.store)
    if searcher.device.type != "cpu":
        say(f"encoding on {described(searcher.device)}")
    return searcher


def _answers(searcher: Any, queries: Sequence[Any], args: argparse.Namespace) -> list[Answer]:
    """The answer to each query, images or objects."""
    from mmref.retrieval.results import DEFAULT_IMAGES, Answer

    how = {"refine": not args.no_refine, "candidates": args.candidates, "where": args.where}
    how |= {"offset": args.offset, "sort": args.sort}
    if args.by == "object":
        found = searcher.search_many_objects(queries, args.top, args.images or DEFAULT_IMAGES, **how)
    else:
        found = searcher.search_many(queries, args.top, **how)
    return [Answer(results, searcher.is_close(query, results)) for query, results in zip(queries, found)]


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    """The same as a service takes it; None where it decides."""
    return {
        "by": args.by, "top": args.top, "images": args.images, "refine": not args.no_refine, "candidates": args.candidates,
        "where": args.where, "offset": args.offset, "sort": args.sort,
    }  # fmt: skip


def _search_parser() -> Parser:
    parser = Parser(
        prog="mmref search",
        description="Search an index with a sentence, an image, or both. With --url a running `mmref serve` is asked instead, "
        "which answers at once: INDEX is left out then.",
    )
    parser.add_argument("index", nargs="?", metavar="INDEX", help="directory of `mmref index`")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what to look for")
    parser.add_argument("--url", metavar="URL", help="a service to ask: http://HOST:PORT")
    parser.add_argument("--store", metavar="URL", help="what finds the candidates: of `mmref index export`")
    parser.add_argument(
        "--token", help="of the service (default: $MMREF_TOKEN, which others on this machine do not see in the list of processes)"
    )
    parser.add_argument("--index", dest="index_name", type=text, metavar="NAME", help="of a service with several indexes")
    parser.add_argument("--image", type=expanded, metavar="FILE", help="look for what is like this image")
    parser.add_argument(
        "--image-weight", type=share, default=0.5, help="share of the image beside a sentence (default: %(default)s)"
    )
    parser.add_argument("--batch", type=local_path, metavar="FILE", help="many sentences, one a line")
    parser.add_argument(
        "--by", choices=("image", "object"), default="image",
        help="what the results are: images, or objects, each by its best image (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--top", type=positive, help="results of each query (default: 10, or all of a smaller index)")
    parser.add_argument("--images", type=positive, metavar="N", help="images of each object with --by object (default: 3)")
    parser.add_argument("--no-refine", action="store_true", help="do not compare by references")
    parser.add_argument(
        "--candidates",
        type=count,
        metavar="P",
        help="refine this many of the first pass; 0: all; default: as in evaluation",
    )
    parser.add_argument("--offset", type=count, default=0, metavar="N", help="pass over the first N results: the next page")
    parser.add_argument(
        "--sort", type=text, metavar="COLUMN",
        help="put the results in the order of a column; --sort=-COLUMN: the highest first (default: by score)",
    )  # fmt: skip
    parser.add_argument(
        "--where", action="append", type=text, default=[], metavar="COLUMN=VALUE",
        help="only items that meet this: =, !=, <, <=, >, >=, ~ (contains), 'COLUMN in A,B', 'COLUMN is missing'. Repeated: all "
        "of them; conditions with a sign may also follow the first one",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print results as JSON, a line for each query")
    parser.add_argument("--html", type=local_path, metavar="FILE", help="write results as a page with thumbnails")
    parser.add_argument("--judge", action="store_true", help="ask of each result whether it is right, and keep the answers")
    parser.add_argument("--judgements", type=local_path, metavar="FILE", help="where (default: judgements.jsonl in the index)")
    device_option(parser)
    return parser


def _conditions_apart(argv: Sequence[str]) -> list[str]:
    """Words in which each condition has a `--where` of its own: `--where A=1 'B>2' TEXT` ends before what is no condition."""
    words: list[str] = []
    conditions = 0  # behind the last --where
    for word in argv:
        if word == "--where":
            conditions = 1
        elif conditions == 1:
            conditions = 2
        elif conditions and not word.startswith("-") and ("=" in word or re.match(r"[^\s<>~]+[<>~]", word)):
            words.append("--where")
        else:
            conditions = 0
        words.append(word)
    return words


# -- judgements ------------------------------------------------------------------------------------------------------


def _ask(found: Sequence[tuple[str, Sequence[Result]]], keep: Callable[[str, str, bool], None], place: object) -> None:
    """Ask of the results of each sentence on the terminal: y, n, enter to pass over, q to stop."""
    saved = 0
    for sentence, results in found:
        for result in results:
            try:
                asked = f"{result.rank}. {printable(result.id)}: right for {sentence!r}?"
                answer = input(f"{asked} [y/n, enter: skip, q: stop] ").strip().lower()
            except EOFError:
                answer = "q"
            if answer == "q":
                print(f"\n{saved} judgements saved in {place}")
                return
            if answer in ("y", "n"):
                keep(sentence, result.id, answer == "y")
                saved += 1
    print(f"{saved} judgements saved in {place}")


def judge_main(argv: Sequence[str]) -> int:
    """`mmref judge INDEX TEXT --right ID ... --wrong ID ...`, `mmref judge export INDEX --out DIR`."""
    if argv[:1] == ["export"]:
        return _export_judgements(argv[1:])
    parser = Parser(
        prog="mmref judge",
        description="Say which items are right for a sentence. `mmref judge export INDEX --out DIR` writes what was judged as "
        "a table for `mmref shards build table`, to fine-tune or evaluate with.",
    )
    parser.add_argument("index", type=local_path, metavar="INDEX")
    parser.add_argument("text", type=text, metavar="TEXT", help="the sentence")
    parser.add_argument("--right", nargs="+", type=text, default=[], metavar="ID", help="items that it asks for")
    parser.add_argument("--wrong", nargs="+", type=text, default=[], metavar="ID", help="items that it does not")
    parser.add_argument(
        "--take-back", nargs="+", type=text, default=[], metavar="ID", help="items of which nothing is to be said any more"
    )
    parser.add_argument(
        "--judgements", type=local_path, metavar="FILE", help="where to save (default: judgements.jsonl in the index)"
    )
    args = parser.parse_args(argv)
    from mmref.retrieval.feedback import Judgements
    from mmref.retrieval.searcher import Searcher

    if not (args.right or args.wrong or args.take_back):
        raise UsageError("name items with --right, --wrong or --take-back.")
    searcher = Searcher(args.index)
    judgements = Judgements.of(searcher.index, args.judgements)
    said = [(i, True) for i in args.right] + [(i, False) for i in args.wrong] + [(i, None) for i in args.take_back]
    for item_id, _ in said:
        searcher.row(item_id)  # all are known before the first is saved
    for item_id, relevant in said:
        judgements.save(searcher, args.text, item_id, relevant)
    print(f"{len(said)} judgements saved in {judgements.path}")
    return 0


def _export_judgements(argv: Sequence[str]) -> int:
    parser = Parser(prog="mmref judge export", description="Judgements as a table and its images.")
    parser.add_argument("index", type=local_path, metavar="INDEX")
    parser.add_argument("--out", required=True, type=local_path, metavar="DIR", help="folder for table.jsonl and images/")
    parser.add_argument("--split", help="split of every row: `test` for an evaluation split; default: by object at build")
    parser.add_argument(
        "--judgements", type=local_path, metavar="FILE", help="what to export (default: judgements.jsonl in the index)"
    )
    args = parser.parse_args(argv)
    from mmref.retrieval.feedback import Judgements, export_table
    from mmref.retrieval.searcher import Searcher

    searcher = Searcher(args.index)
    rows, left_out = export_table(searcher, Judgements.of(searcher.index, args.judgements).read(), args.out, args.split)
    print(f"{rows} images in {args.out}/table.jsonl; next: mmref shards build table {args.out}/table.jsonl --out SET")
    for line in left_out:
        print(f"left out: {printable(line)}")
    return 0
