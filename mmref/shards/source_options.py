"""Options of `mmref shards build`, source by source."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from mmref.errors import UsageError
from mmref.shards.sources.listed import split_name
from mmref.storage.download import Terms
from mmref.storage.downloads import Downloads
from mmref.storage.fetch import OUTSIDE, OUTSIDE_HELP
from mmref.terminal.arguments import amount, count, images, local_path, place, positive, source

Add = Callable[[str, str], argparse.ArgumentParser]  # a source's name and what it is -> its parser


def add_sources(sources: Any, run: Callable[[argparse.Namespace], int]) -> None:
    """A parser for each source of `mmref shards build`, whose command is `run`."""

    def add(name: str, text: str) -> argparse.ArgumentParser:
        found: argparse.ArgumentParser = sources.add_parser(name, help=text, description=text, parents=[_common_options()])
        found.set_defaults(run=run)
        return found

    _add_drawings(add)
    cub, flowers = _add_classes(add)
    _add_persons(add)
    for parser in (cub, flowers, _add_table(add), _add_dataset(add), _add_folder(add)):
        add_fractions(parser)


def _add_drawings(add: Add) -> None:
    for name, text in (
        ("emoji", "the bundled set: emoji drawings, from npm packages"),
        ("icons", "things that many open icon sets draw, from npm packages"),
    ):
        drawings = add(name, text)
        drawings.add_argument(
            "--packages", type=local_path, metavar="DIR", help="folder of the unpacked packages; else npm fetches them"
        )
        drawings.add_argument("--size-px", type=positive, default=64, help="side of the rendered images (default: %(default)s)")
        drawings.add_argument("--quality", type=int, default=72, help="WebP quality, 1 to 100 (default: %(default)s)")
        drawings.set_defaults(source_options=("packages", "size_px", "quality"), tokenizer_vocab=4000)


def _add_classes(add: Add) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    cub = add("cub", "CUB-200-2011 with text_c10 captions, in its native layout")
    cub.add_argument("path", type=local_path, help="folder that holds CUB_200_2011/ and text_c10/")
    cub.set_defaults(source_options=("path", "fractions", "val_fraction"))
    flowers = add("flowers", "Oxford Flowers-102 with text_c10 captions, in its native layout")
    flowers.add_argument("--root", required=True, type=local_path, metavar="DIR", help="folder that holds jpg/ and text_c10/")
    flowers.set_defaults(source_options=("root", "fractions", "val_fraction"))
    for classes in (cub, flowers):
        classes.add_argument(
            "--val-fraction", type=float, default=0.0,
            help="keep the test classes apart while choosing: this share of the train classes becomes val, by a fixed hash, the "
            "val classes become test, and the test classes are left out (default: the splits as published)",
        )  # fmt: skip
    return cub, flowers


def _add_persons(add: Add) -> None:
    for name, text, has_val in (
        ("cuhk", "CUHK-PEDES (reid_raw.json and imgs/)", True),
        ("icfg", "ICFG-PEDES (ICFG-PEDES.json and imgs/)", False),
        ("rstp", "RSTPReid (data_captions.json and imgs/)", True),
        ("ufine", "UFine6926 (its annotations in one JSON file, and images)", False),
    ):
        persons = add(name, text)
        persons.add_argument(
            "--root", required=True, type=local_path, metavar="DIR", help="folder of the annotation file and the images"
        )
        persons.add_argument(
            "--annotations", type=local_path, metavar="FILE", help="annotation file, where it has another name or place"
        )
        persons.add_argument(
            "--images",
            type=local_path,
            metavar="DIR",
            help="folder of the images; else imgs/, images/ or the root itself",
        )
        persons.set_defaults(source_options=("root", "annotations", "images", *(() if has_val else ("val_fraction",))))
        if not has_val:
            persons.add_argument(
                "--val-fraction", type=float, default=0.05,
                help="of the train persons held out as val, by a fixed hash; 0: none (default: %(default)s)",
            )  # fmt: skip


def _add_table(add: Add) -> argparse.ArgumentParser:
    table = add("table", "your own data: a CSV, TSV, JSONL or Parquet table")
    table.add_argument(
        "path", type=place,
        help="the table; rows name an image, or hold it (Parquet; also a folder or a glob of files), its object and captions",
    )  # fmt: skip
    table.add_argument("--image", default="image", help="column with the image's path or URL (default: %(default)s)")
    table.add_argument("--object-id", default="object_id", help="column with the object's id (default: %(default)s)")
    _add_captions(table, "caption columns (texts or lists); else `caption` or `captions`")
    table.add_argument("--split", help="column with the split; else `split`, else a fixed hash of the object id")
    table.add_argument(
        "--image-root", type=place, metavar="DIR", help="what image paths are relative to; else the table's folder"
    )
    table.add_argument(OUTSIDE, action="store_true", help=OUTSIDE_HELP)
    _add_downloads(table)
    table.add_argument("--keep", nargs="*", default=[], help="further columns to keep in the samples")
    table.add_argument("--licence", default="not stated", help="licence of the data, for the manifest")
    table.add_argument("--min-images", type=positive, default=1, help="leave out objects with fewer usable images")
    options = ("path", "image", "object_id", "captions", "split", "image_root", "keep", "licence", "min_images")
    table.set_defaults(source_options=(*options, "fractions", "allow_outside", "downloads"))
    return table


def _add_downloads(source: argparse.ArgumentParser) -> None:
    """Options of images behind http(s) URLs; `downloads` reads them."""
    source.add_argument("--downloads", type=positive, default=64, help="images fetched at a time (default: %(default)s)")
    source.add_argument("--per-host", type=positive, default=16, help="of these from one host (default: %(default)s)")
    source.add_argument(
        "--max-download-mb", type=amount, default=64, help="size of an image that is fetched (default: %(default)s)"
    )
    source.add_argument("--user-agent", default=Terms.user_agent, help="who asks, as hosts see it (default: %(default)s)")
    source.add_argument(
        "--ignore-robots-tag", action="store_true",
        help="take images too that their hosts do not give for training (X-Robots-Tag: noai, noimageai, noindex, noimageindex)",
    )  # fmt: skip


def downloads(args: argparse.Namespace) -> Downloads:
    if not args.max_download_mb > 0:
        raise UsageError(f"--max-download-mb must be above 0, found {args.max_download_mb}.")
    if not args.user_agent.isprintable() or not args.user_agent.isascii() or not args.user_agent.strip():
        raise UsageError(f"--user-agent {args.user_agent!r} cannot be sent: write letters of ASCII alone.")
    terms = Terms(args.user_agent, int(args.max_download_mb * 1e6), for_training=not args.ignore_robots_tag)
    return Downloads(terms, args.downloads, args.per_host)


def _add_dataset(add: Add) -> argparse.ArgumentParser:
    dataset = add("dataset", "a dataset of Hugging Face's `datasets`: saved on this machine, or by its id on a hub")
    dataset.add_argument(
        "dataset", type=images, metavar="NAME_OR_FOLDER",
        help="folder of `save_to_disk`, of Parquet files or of what else `datasets` opens; or user/name, user/name@revision",
    )  # fmt: skip
    dataset.add_argument("--config", help="where the dataset has several")
    dataset.add_argument("--image", help="column of images (default: the only one)")
    _add_captions(dataset, "columns of captions, texts or lists (default: the one plainly meant)")
    dataset.add_argument("--object-id", help="column with the object's id (default: object_id; without one each image is one)")
    dataset.add_argument(
        "--split-map", nargs="+", type=parse_renaming, default=[], metavar="THEIRS=OURS",
        help="our split of each of the dataset's; THEIRS= leaves one out (default: validation is val, others as they are)",
    )  # fmt: skip
    dataset.add_argument("--limit", type=positive, metavar="ROWS", help="of each split the first rows alone, to try")
    dataset.add_argument(OUTSIDE, action="store_true", help="take images that rows name by a path outside of the dataset")
    dataset.add_argument("--keep", nargs="*", default=[], help="further columns to keep in the samples")
    dataset.add_argument("--licence", help="licence of the data, for the manifest (default: what the dataset says)")
    _add_whole(dataset)
    options = ("dataset", "config", "image", "captions", "object_id", "split_map", "limit", "allow_outside", "keep", "licence")
    dataset.set_defaults(source_options=(*options, "min_images", "fractions", "resplit"))
    return dataset


def _add_folder(add: Add) -> argparse.ArgumentParser:
    folder = add("folder", "a folder of folders, object/image.jpg, with captions in files beside the images")
    folder.add_argument(
        "root", type=source, metavar="ROOT", help="holds a folder of each object, or train/, val/ and test/ of them"
    )
    _add_captions(folder, "columns of captions.csv, captions.jsonl or metadata.jsonl")
    folder.add_argument(
        "--caption-from-folder", action="store_true",
        help="an image without a caption gets its folder's name, with blanks in place of _ and -",
    )  # fmt: skip
    folder.add_argument(
        "--depth", type=positive, default=1, help="folders below ROOT, or a split, that name an object (default: %(default)s)"
    )
    folder.add_argument("--licence", default="not stated", help="licence of the data, for the manifest")
    _add_whole(folder)
    options = ("root", "captions", "caption_from_folder", "depth", "licence", "min_images", "fractions", "resplit")
    folder.set_defaults(source_options=options)
    return folder


def _add_captions(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--captions", nargs="+", action=_EachOnce, help=what)


class _EachOnce(argparse.Action):
    """A list of words, of which a second one of the same adds nothing."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys(values)))


def _add_whole(parser: argparse.ArgumentParser) -> None:
    """Options about whole objects."""
    parser.add_argument("--min-images", type=positive, default=1, help="leave out objects with fewer usable images")
    parser.add_argument("--resplit", action="store_true", help="leave aside the data's own splits: divide the objects anew")


def parse_renaming(text: str) -> tuple[str, str]:
    """`validation=val` -> the pair. Raises UsageError, SourceError for what cannot name a split."""
    theirs, mark, ours = text.partition("=")
    if not mark or not theirs.strip():
        raise UsageError(f"--split-map {text!r} is not of the form THEIRS=OURS.")
    return theirs.strip(), split_name(ours) if ours.strip() else ""


def parse_fractions(text: str) -> dict[str, float]:
    """`train=0.7,val=0.1,test=0.2` -> dict. Raises UsageError unless they are positive and sum to 1, SourceError for what cannot
    name a split."""
    try:
        given = [(split_name(name), float(value)) for name, value in (part.split("=") for part in text.split(","))]
    except ValueError as error:
        raise UsageError(f"--fractions {text!r} is not of the form train=0.7,val=0.1,test=0.2.") from error
    found = dict(given)
    if len(found) < len(given):
        raise UsageError(f"--fractions {text!r} names a split twice (validation and dev are val).")
    if min(found.values()) < 0 or not abs(sum(found.values()) - 1) <= 1e-6:  # nor is it with a NaN
        raise UsageError(f"--fractions {text!r} sum to {sum(found.values()):g}: they must be positive and sum to 1.")
    return found


def _common_options() -> argparse.ArgumentParser:
    """Options of every source. A new parser each time: `parents` share their actions, so a default would leak."""
    common = argparse.ArgumentParser(add_help=False)
    add_output(common)
    common.add_argument("--target-mb", type=amount, default=128, help="size of a shard in MB (default: %(default)s)")
    common.add_argument(
        "--min-shards", type=positive, default=4, help="shards of a split, however small it is (default: %(default)s)"
    )
    common.add_argument("--samples-per-shard", type=positive, help="images in a shard, in place of --target-mb")
    common.add_argument("--no-check-images", action="store_true", help="do not decode every image once")
    common.add_argument("--resize-to-px", type=positive, help="re-encode images whose shorter side is longer than this")
    common.add_argument("--pack", action="store_true", help="write .tar.gz beside each tar, for sets that travel")
    return common


def add_output(parser: argparse.ArgumentParser) -> None:
    """Options of whatever writes a set."""
    parser.add_argument("--out", required=True, type=local_path, metavar="DIR", help="folder of the new set")
    parser.add_argument("--overwrite", action="store_true", help="replace a complete set in --out when the new one is whole")
    parser.add_argument(
        "--workers", type=count, help="parallel Ray tasks; 0: in this process (default: one a core; 0 without Ray)",
    )  # fmt: skip
    parser.add_argument("--tokenizer-vocab", type=positive, help="train a tokenizer of this size into DIR/tokenizer")


def add_fractions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fractions", type=parse_fractions, default="train=0.7,val=0.1,test=0.2",
        help="of the objects in each split, where the data has no split (default: %(default)s)",
    )  # fmt: skip
