"""`mmref index`: options in, what an index holds out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from mmref.cluster.resources import workers_that_fit
from mmref.errors import QueryError, UsageError
from mmref.storage.fetch import OUTSIDE, OUTSIDE_HELP
from mmref.storage.texts import read_lines
from mmref.terminal.arguments import count, images, local_path, model, place, share, size, text
from mmref.terminal.output import printable, to_json
from mmref.terminal.parser import Parser

DEVICES = ("auto", "cpu", "cuda")


def index_main(argv: Sequence[str]) -> int:
    """`mmref index IMAGES --model M --out INDEX`, `mmref index VERB INDEX`."""
    from mmref.retrieval.duplicates_command import duplicates_main
    from mmref.retrieval.export_command import export_main

    verbs = {
        "add": _add, "sync": _sync, "remove": _remove, "duplicates": duplicates_main, "info": _info, "export": export_main,
    }  # fmt: skip
    return verbs[argv[0]](argv[1:]) if argv[:1] and argv[0] in verbs else _create(argv)


def _source_options(parser: argparse.ArgumentParser, needed: bool = True) -> None:
    """IMAGES, as the next positional argument, and how they are read."""
    from mmref.retrieval.images import FOLDERS

    parser.add_argument(
        "images", nargs=None if needed else "?", type=images, metavar="IMAGES",
        help="folder (recursive), shard set, table, Parquet files that hold images (also a glob), URL prefix, or dataset of "
        f"Hugging Face's `datasets`: its folder, or user/name{'' if needed else ' (default: all that the index is of)'}",
    )  # fmt: skip
    parser.add_argument("--split", help="split of a shard set or dataset (default: all of them)")
    parser.add_argument("--config", help="of a dataset that has several")
    parser.add_argument(
        "--folders", choices=FOLDERS, default="auto",
        help="what the folders in a folder are: objects; plain: nothing; auto: objects where every picture lies in "
        "object/picture (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--image-column", default="image", help="column of a table with paths, URLs or images (default: image)")
    parser.add_argument("--object-column", default="object_id", help="column with object ids, where there is one")
    parser.add_argument(
        "--image-root", type=place, metavar="DIR", help="what a table's paths are relative to; else the table's folder"
    )
    parser.add_argument(
        "--id-column",
        metavar="NAME",
        help="column with the items' ids; else relative paths, and short ids of other places",
    )
    parser.add_argument(OUTSIDE, action="store_true", help=f"of a table: {OUTSIDE_HELP}")
    parser.add_argument(
        "--workers", type=count,
        help="Ray actors that embed; 0: in this process, quickest for a few thousand images (default: one a core; 0 without Ray)",
    )  # fmt: skip
    device_option(parser)


def device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: a GPU where there is one (default: %(default)s)")


def _columns(args: argparse.Namespace) -> Any:
    from mmref.retrieval.images import TableColumns

    return TableColumns(
        args.image_column, args.object_column, args.image_root, args.id_column, args.allow_outside, args.config, args.folders
    )


def _create(argv: Sequence[str]) -> int:
    from mmref.retrieval import index
    from mmref.retrieval.vectors import Kind

    parser = Parser(
        prog="mmref index",
        description="Make a search index of your images: every kind that Pillow and OpenCV read here, told by its ending, else "
        "by its first bytes; the rest is counted. The same command again goes on after a kill. "
        "`mmref index add|sync|remove|duplicates|info|export INDEX` change, describe or copy one; a folder of such a name is "
        "given as ./add.",
    )
    parser.add_argument(
        "--model",
        required=True,
        type=model,
        metavar="MODEL",
        help="pretrained model by hub id or folder, run directory, or folder of `mmref export`",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=local_path,
        metavar="INDEX",
        help="the index directory; must not exist yet, or be empty",
    )
    parser.add_argument(
        "--kind", choices=get_args(Kind), default="auto",
        help="exact search (flat) or approximate (ivf, hnsw, and ivfpq in less memory); auto: exact up "
        "to a million images, then ivf, or ivfpq where that needs more than --memory (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--memory", type=size, metavar="SIZE",
        help="what searches may keep in memory, as 2GB or 500MB; auto chooses by it (default: half of this machine's)",
    )  # fmt: skip
    parser.add_argument(
        "--recall",
        type=share,
        default=0.95,
        help="of the ten nearest that ivf, hnsw and ivfpq must find (default: %(default)s)",
    )
    _source_options(parser)
    args = parser.parse_args(argv)
    manifest = index.create(
        args.images,
        args.model,
        args.out,
        args.split,
        _columns(args),
        args.kind,
        workers_that_fit(args.workers),
        args.recall,
        args.device,
        args.memory,
    )
    _tell(args.out, manifest)
    return 0


def _add(argv: Sequence[str]) -> int:
    from mmref.retrieval import index

    parser = Parser(
        prog="mmref index add",
        description="Have an index hold what a source holds now: new images are added, changed ones embedded again, those "
        "that are gone named (`mmref index sync` removes them). An image from elsewhere whose id an item has already gets its "
        "folder's name before it. A source that the index is of already is read as before, unless options say otherwise.",
    )
    parser.add_argument("index", type=local_path, metavar="INDEX")
    parser.add_argument("--model", type=model, metavar="MODEL", help="checked to be the index's own, which is used")
    _source_options(parser)
    args = parser.parse_args(argv)
    workers = workers_that_fit(args.workers)
    for one in _chosen(args, index.sources_of(args.index)):
        manifest = index.add(args.index, one.images, args.model, one.split, one.columns, workers, args.device)
        for line in manifest.notes:
            print(line)
    _report(args.index, manifest)
    return 0


def _sync(argv: Sequence[str]) -> int:
    from mmref.retrieval import index

    parser = Parser(
        prog="mmref index sync",
        description="Have an index hold what its sources hold now, and nothing else of them: new images are added, changed ones "
        "embedded again, those that are gone removed. Each source is one change of the index, which a running service takes up. "
        "A source that is read with options other than at its first time is given with them.",
    )
    parser.add_argument("index", type=local_path, metavar="INDEX")
    parser.add_argument("--dry-run", action="store_true", help="print what would change, a line an image, and change nothing")
    parser.add_argument(
        "--remove-up-to", type=share, default=index.REMOVED_AT_ONCE, metavar="SHARE",
        help="share of a source's items that may be gone, and always ten; more is an error, since a disk may not be there. "
        "0: none, 1: whatever is gone, even all of it (default: %(default)s)",
    )  # fmt: skip
    _source_options(parser, needed=False)
    args = parser.parse_args(argv)
    sources = _chosen(args, index.sources_of(args.index))
    for one in sources:
        if len(sources) > 1:
            print(printable(f"{one.images}{f' ({one.split})' if one.split else ''}:"))
        manifest = index.sync(
            args.index,
            one,
            workers_that_fit(args.workers),
            args.device,
            args.remove_up_to,
            print if args.dry_run else None,
        )
        for line in manifest.notes:
            print(f"dry run: {line}" if args.dry_run else line)
    if not args.dry_run:
        _report(args.index, manifest)
    return 0


def _chosen(args: argparse.Namespace, known: list[Any]) -> list[Any]:
    """All sources of an index, or those that IMAGES names: as the index knows them, unless options say how to read them."""
    from mmref.retrieval.images import DEFAULT_COLUMNS
    from mmref.retrieval.manifest import Source
    from mmref.retrieval.sources import images_place

    columns = _columns(args)
    if args.images is None:
        if not known:
            raise UsageError(f"{args.index} does not tell what it was made of: name IMAGES.")
        if args.split is not None or columns != DEFAULT_COLUMNS:
            raise UsageError("options that say how images are read need IMAGES: without it every source is read as before.")
        return known
    given = Source(images_place(args.images), args.split, columns)
    found = [one for one in known if one.images == given.images and args.split in (None, one.split)]
    return found if found and columns == DEFAULT_COLUMNS else [given]


def _remove(argv: Sequence[str]) -> int:
    from mmref.retrieval import index
    from mmref.retrieval.set_aside import read_ids

    parser = Parser(prog="mmref index remove", description="Remove items from an index.")
    parser.add_argument("index", type=local_path, metavar="INDEX")
    parser.add_argument("ids", type=text, metavar="ID", nargs="*", help="ids of items")
    parser.add_argument("--ids-file", type=local_path, metavar="FILE", help="more ids, one a line")
    parser.add_argument("--for-good", action="store_true", help="`add` and `sync` do not take them in again (left_out.jsonl)")
    args = parser.parse_args(argv)
    ids = args.ids + (read_ids(args.ids_file) if args.ids_file else [])
    if not ids:
        raise UsageError("name the items to remove: ids, or a file of them with --ids-file.")
    _report(args.index, index.remove(args.index, ids, args.for_good))
    return 0


def _info(argv: Sequence[str]) -> int:
    from mmref.retrieval import bundle
    from mmref.retrieval.manifest import Manifest
    from mmref.retrieval.segment import open_segments

    parser = Parser(prog="mmref index info", description="What an index holds.")
    parser.add_argument("index", type=local_path, metavar="INDEX")
    parser.add_argument("--json", action="store_true", help="print the manifest")
    args = parser.parse_args(argv)
    folder = Path(args.index)
    manifest = Manifest.read(folder)
    bundle.check_model(folder, manifest.model)
    if args.json:
        print(to_json(asdict(manifest), indent=1))
        return 0
    _report(args.index, manifest)
    segments = open_segments(folder, manifest)
    on_disk = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    columns = dict.fromkeys(name for segment in segments for name in segment.items.column_names)
    print(printable(f"columns: {', '.join(columns)}"))
    print(f"model {manifest.model[:12]}, generation {manifest.generation}, {on_disk / 1e6:,.1f} MB on disk")
    print(printable(f"from: {', '.join(manifest.sources)}"))
    return 0


def _tell(path: str, manifest: Any) -> None:
    """What the last change did and passed over, then what the index holds."""
    for line in manifest.notes:
        print(line)
    _report(path, manifest)


def _report(path: str, manifest: Any) -> None:
    from mmref.retrieval.segment import open_segments
    from mmref.retrieval.size import described

    skipped = f", {manifest.skipped:,} could not be read (skipped.jsonl)" if manifest.skipped else ""
    print(f"{path}: {manifest.items:,} images, {manifest.dim} numbers each, {manifest.kind}{skipped}")
    if manifest.kind != "flat":
        v = manifest.vectors
        print(f"recall@10 {v['recall@10']:.3f} against an exact search, measured with {v['queries']} {v['measured_on']}")
        if v["recall@10"] < v["wanted"]:
            print(f"warning: below the {v['wanted']} that was asked for, at the highest setting")
    folder = Path(path)
    print(described(folder, manifest, open_segments(folder, manifest)))


def lines_of(path: str) -> list[str]:
    """Lines of a file that are not empty. Raises QueryError."""
    if not (lines := list(filter(None, read_lines(path, QueryError)))):
        raise QueryError(f"{path} is empty: one entry a line.")
    return lines
