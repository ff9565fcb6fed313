"""`mmref shards build|index|inspect|verify`: parses options and prints tables; the work is in the modules beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from mmref.cluster.resources import workers_that_fit
from mmref.data.shard_set import ShardSet
from mmref.errors import UsageError
from mmref.shards.build import SOURCES, BuildOptions, build_shards, make_source
from mmref.shards.in_place import InPlaceOptions, index_tars
from mmref.shards.reading import ReadingOptions
from mmref.shards.sources.listed import split_name
from mmref.shards.tar_writer import ImageOptions
from mmref.storage.download import Terms
from mmref.storage.downloads import Downloads
from mmref.storage.fetch import OUTSIDE, OUTSIDE_HELP
from mmref.storage.whole_folder import check_output
from mmref.terminal.arguments import count, images, local_path, place, positive, source
from mmref.terminal.output import printable
from mmref.terminal.parser import Parser


def main(argv: Sequence[str]) -> int:
    """`mmref shards`."""
    args = build_parser().parse_args(argv)
    return int(args.run(args) or 0)


def build_parser() -> argparse.ArgumentParser:
    """The options of `mmref shards`; the chosen command is left in `args.run`: args -> exit status."""
    parser = Parser(prog="mmref shards", description="Build, index, inspect and verify shard sets.")
    commands = parser.add_subparsers(dest="shards_command", required=True, metavar="build|index|inspect|verify")
    build = commands.add_parser("build", help="build a shard set from a source")
    _add_sources(build.add_subparsers(dest="source", required=True, metavar="|".join(SOURCES)))
    _add_index(commands)
    inspect = commands.add_parser("inspect", help="counts, caption kinds and samples of a set")
    inspect.add_argument("root", type=place, help="folder or URL of the set")
    inspect.add_argument("--samples", type=count, default=3, help="samples of a split to print (default: %(default)s)")
    inspect.add_argument(
        "--sheet", type=local_path, metavar="PNG", help="write a contact sheet of the first split, or of --split"
    )
    inspect.add_argument("--split", help="only this split")
    inspect.set_defaults(run=run_inspect)
    verify = commands.add_parser("verify", help="check files, checksums, counts and offsets of a set")
    verify.add_argument("root", type=place, help="folder or URL of the set")
    verify.add_argument("--fast", action="store_true", help="leave out the checksums")
    verify.set_defaults(run=run_verify)
    return parser


def _add_output(parser: argparse.ArgumentParser) -> None:
    """Options of whatever writes a set."""
    parser.add_argument("--out", required=True, type=local_path, metavar="DIR", help="folder of the new set")
    parser.add_argument("--overwrite", action="store_true", help="replace a complete set in --out when the new one is whole")
    parser.add_argument(
        "--workers", type=count, help="parallel Ray tasks; 0: in this process (default: one a core; 0 without Ray)",
    )  # fmt: skip
    parser.add_argument("--tokenizer-vocab", type=positive, help="train a tokenizer of this size into DIR/tokenizer")


def _add_fractions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fractions", type=parse_fractions, default="train=0.7,val=0.1,test=0.2",
        help="of the objects in each split, where the data has no split (default: %(default)s)",
    )  # fmt: skip


def _add_index(commands: Any) -> None:
    text = "use WebDataset tars as they lie, img2dataset's among them: nothing is copied, each tar is scanned once"
    index = commands.add_parser("index", help=text, description=text)
    index.add_argument(
        "tars", nargs="+", metavar="TARS", help="tars, folders of them, globs or ranges ('{00000..00999}.tar'); paths or URLs"
    )
    _add_output(index)
    objects = index.add_mutually_exclusive_group()
    objects.add_argument(
        "--object-id", metavar="FIELD",
        help="field of the samples' .json with the object's id, or .cls (default: `object_id`, else the .cls, where samples have "
        "one; else each image is an object)",
    )  # fmt: skip
    objects.add_argument(
        "--ids", choices=("image", "duplicate"),
        help="an object is: an image, or all images of equal bytes, for which all of them are read",
    )  # fmt: skip
    index.add_argument(
        "--captions", nargs="+", default=[], metavar="FIELD",
        help="fields with captions (texts or lists), .txt for that member (default: `captions`, else `caption`, else .txt)",
    )  # fmt: skip
    index.add_argument("--split", metavar="FIELD", help="field with the split; else `split`, else a fixed hash of the object id")
    index.add_argument("--join", type=place, metavar="TABLE", help="a table with more fields: CSV, TSV, JSONL or Parquet")
    index.add_argument(
        "--on",
        metavar="COLUMN",
        help="column of the table, and field of samples that it belongs to: COLUMN, or COLUMN=FIELD, which may be __key__",
    )
    index.add_argument("--keep", nargs="*", default=[], metavar="FIELD", help="further fields to keep in the set")
    index.add_argument("--classes", type=place, metavar="FILE", help="names of the classes in .cls, one a line, as captions")
    index.add_argument("--licence", default="not stated", help="licence of the data, for the manifest")
    _add_fractions(index)
    index.set_defaults(run=run_index)


def _common_options() -> argparse.ArgumentParser:
    """Options of every source. A new parser each time: `parents` share their actions, so a default would leak."""
    common = argparse.ArgumentParser(add_help=False)
    _add_output(common)
    common.add_argument("--target-mb", type=float, default=128, help="size of a shard in MB (default: %(default)s)")
    common.add_argument(
        "--min-shards", type=positive, default=4, help="shards of a split, however small it is (default: %(default)s)"
    )
    common.add_argument("--samples-per-shard", type=positive, help="images in a shard, in place of --target-mb")
    common.add_argument("--no-check-images", action="store_true", help="do not decode every image once")
    common.add_argument("--resize-to-px", type=positive, help="re-encode images whose shorter side is longer than this")
    common.add_argument("--pack", action="store_true", help="write .tar.gz beside each tar, for sets that travel")
    return common


def _add_sources(sources: Any) -> None:
    def add(name: str, text: str) -> argparse.ArgumentParser:
        found: argparse.ArgumentParser = sources.add_parser(name, help=text, description=text, parents=[_common_options()])
        found.set_defaults(run=run_build)
        return found

    emoji = add("emoji", "the bundled set: emoji drawings, from npm packages")
    emoji.add_argument(
        "--packages", type=local_path, metavar="DIR", help="folder of the unpacked packages; else npm fetches them"
    )
    emoji.add_argument("--size-px", type=positive, default=64, help="side of the rendered images (default: %(default)s)")
    emoji.add_argument("--quality", type=int, default=72, help="WebP quality, 1 to 100 (default: %(default)s)")
    emoji.set_defaults(source_options=("packages", "size_px", "quality"), tokenizer_vocab=4000)
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
    table = add("table", "your own data: a CSV, TSV, JSONL or Parquet table")
    table.add_argument(
        "path", type=place,
        help="the table; rows name an image, or hold it (Parquet; also a folder or a glob of files), its object and captions",
    )  # fmt: skip
    table.add_argument("--image", default="image", help="column with the image's path or URL (default: %(default)s)")
    table.add_argument("--object-id", default="object_id", help="column with the object's id (default: %(default)s)")
    table.add_argument("--captions", nargs="+", help="caption columns (texts or lists); else `caption` or `captions`")
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
    dataset, folder = _add_dataset(add), _add_folder(add)
    for parser in (cub, flowers, table, dataset, folder):
        _add_fractions(parser)


def _add_downloads(source: argparse.ArgumentParser) -> None:
    """Options of images behind http(s) URLs; `_downloads` reads them."""
    source.add_argument("--downloads", type=positive, default=64, help="images fetched at a time (default: %(default)s)")
    source.add_argument("--per-host", type=positive, default=16, help="of these from one host (default: %(default)s)")
    source.add_argument(
        "--max-download-mb", type=float, default=64, help="size of an image that is fetched (default: %(default)s)"
    )
    source.add_argument("--user-agent", default=Terms.user_agent, help="who asks, as hosts see it (default: %(default)s)")
    source.add_argument(
        "--ignore-robots-tag", action="store_true",
        help="take images too that their hosts do not give for training (X-Robots-Tag: noai, noimageai, noindex, noimageindex)",
    )  # fmt: skip


def _downloads(args: argparse.Namespace) -> Downloads:
    if not args.max_download_mb > 0:
        raise UsageError(f"--max-download-mb must be above 0, found {args.max_download_mb}.")
    if not args.user_agent.isprintable() or not args.user_agent.isascii() or not args.user_agent.strip():
        raise UsageError(f"--user-agent {args.user_agent!r} cannot be sent: write letters of ASCII alone.")
    terms = Terms(args.user_agent, int(args.max_download_mb * 1e6), for_training=not args.ignore_robots_tag)
    return Downloads(terms, args.downloads, args.per_host)


def _add_dataset(add: Callable[[str, str], argparse.ArgumentParser]) -> argparse.ArgumentParser:
    dataset = add("dataset", "a dataset of Hugging Face's `datasets`: saved on this machine, or by its id on a hub")
    dataset.add_argument(
        "dataset", type=images, metavar="NAME_OR_FOLDER",
        help="folder of `save_to_disk`, of Parquet files or of what else `datasets` opens; or user/name, user/name@revision",
    )  # fmt: skip
    dataset.add_argument("--config", help="where the dataset has several")
    dataset.add_argument("--image", help="column of images (default: the only one)")
    dataset.add_argument("--captions", nargs="+", help="columns of captions, texts or lists (default: the one plainly meant)")
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


def _add_folder(add: Callable[[str, str], argparse.ArgumentParser]) -> argparse.ArgumentParser:
    folder = add("folder", "a folder of folders, object/image.jpg, with captions in files beside the images")
    folder.add_argument(
        "root", type=source, metavar="ROOT", help="holds a folder of each object, or train/, val/ and test/ of them"
    )
    folder.add_argument("--captions", nargs="+", help="columns of captions.csv, captions.jsonl or metadata.jsonl")
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
    """`train=0.7,val=0.1,test=0.2` -> dict. Raises UsageError unless they are positive and sum to 1."""
    try:
        found = {name.strip(): float(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise UsageError(f"--fractions {text!r} is not of the form train=0.7,val=0.1,test=0.2.") from error
    if min(found.values()) < 0 or abs(sum(found.values()) - 1) > 1e-6:
        raise UsageError(f"--fractions {text!r} sum to {sum(found.values()):g}: they must be positive and sum to 1.")
    return found


def run_build(args: argparse.Namespace) -> int:
    """Builds the set, prints its counts and what was left out. Returns the exit code."""
    if "downloads" in args.source_options:
        args.downloads = _downloads(args)
    made = make_source(args.source, **{name: getattr(args, name) for name in args.source_options})
    options = BuildOptions(
        target_mb=args.target_mb,
        min_shards=args.min_shards,
        samples_per_shard=args.samples_per_shard,
        workers=workers_that_fit(args.workers),
        overwrite=args.overwrite,
        pack=args.pack,
        tokenizer_vocab=args.tokenizer_vocab,
        images=ImageOptions(check=not args.no_check_images, resize_to_px=args.resize_to_px),
    )
    _print_written(build_shards(made, args.out, options), args.out)
    return 0


def run_index(args: argparse.Namespace) -> int:
    """Indexes tars, says how they were understood and prints as `run_build`. Returns the exit code."""
    reading = ReadingOptions(
        object_id=args.object_id,
        ids=args.ids,
        captions=tuple(args.captions),
        split=args.split,
        join=args.join,
        on=args.on,
        keep=tuple(args.keep),
        classes=args.classes,
        fractions=args.fractions,
    )
    options = InPlaceOptions(reading, args.licence, workers_that_fit(args.workers), args.overwrite, args.tokenizer_vocab)
    manifest = index_tars(args.tars, args.out, options)
    for name, words in manifest["reading"].items():
        print(f"{name + ':':10}{printable(words)}")
    _print_written(manifest, args.out)
    return 0


def _print_written(manifest: dict[str, Any], out: str) -> None:
    print(f"{'split':8}{'objects':>10}{'images':>10}{'captions':>10}{'shards':>8}{'MB':>9}")
    for split, entry in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in entry["shards"]) / 1e6
        counts = f"{entry['objects']:>10,}{entry['images']:>10,}{entry['captions']:>10,}"
        print(f"{printable(split):8}{counts}{len(entry['shards']):>8}{size:>9.1f}")
    for line in manifest["warnings"]:
        print(f"warning: {printable(line)}")
    skipped = manifest["skipped"]
    if skipped["count"]:
        kinds = ", ".join(f"{kind} {number:,}" for kind, number in skipped["kinds"].items())
        print(f"{skipped['count']:,} left out ({printable(kinds)}); all are named in left_out.jsonl, the first:")
        print("\n".join(f"  {printable(line)}" for line in skipped["first"][:5]))
    print(f"Written to {out}")


def run_inspect(args: argparse.Namespace) -> int:
    """Prints a table of the set and samples of every split. Returns the exit code."""
    from mmref.shards.inspect import contact_sheet, split_summary

    if args.sheet:
        check_output("--sheet", args.sheet)
    shards = ShardSet.open(args.root)
    manifest = shards.manifest
    print(printable(f"{manifest['name']}: {manifest['source']}"))
    print(printable(f"licence: {manifest['licence']}"))
    splits = [args.split] if args.split else shards.splits
    for split in splits:
        found = split_summary(shards, split, args.samples)
        print()
        print(
            f"{printable(split)}: {found['objects']:,} objects, {found['images']:,} images ({found['images_per_object']:.1f} an "
            f"object), {found['captions']:,} captions ({found['captions_per_image']:.1f} an image, "
            f"{found['words_per_caption']:.1f} words), {found['shards']} shards, {found['megabytes']:.1f} MB"
        )
        total = max(sum(found["caption_kinds"].values()), 1)
        kinds = ", ".join(f"{printable(k)} {100 * n / total:.0f} %" for k, n in found["caption_kinds"].items())
        print(f"  kinds: {kinds}")
        if found["broken"]:
            print(f"  {found['broken']} samples cannot be read: run `mmref shards verify {args.root}`")
        for meta in found["samples"]:
            captions = " | ".join(meta["captions"])[:160]
            print(printable(f"  {meta['object_id']} / {meta['image_id']}: {captions}"))
    if args.sheet:
        contact_sheet(shards, splits[0], args.sheet)
        print(f"\ncontact sheet of {splits[0]}: {args.sheet}")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """Prints every problem, one a line. Returns 1 when there are any."""
    problems = ShardSet.open(args.root).verify(checksums=not args.fast)
    for problem in problems:
        print(printable(problem))
    print(f"{args.root}: " + (f"{len(problems)} problems" if problems else "sound"))
    return 1 if problems else 0
