"""`mmref shards build|index|inspect|verify`: parses options and prints tables; the work is in the modules beside it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mmref.cluster.resources import workers_that_fit
from mmref.data.shard_set import ShardSet
from mmref.shards.build import SOURCES, BuildOptions, build_shards, make_source
from mmref.shards.in_place import InPlaceOptions, index_tars
from mmref.shards.reading import ReadingOptions
from mmref.shards.source_options import add_fractions, add_output, add_sources, downloads
from mmref.shards.tar_writer import ImageOptions
from mmref.storage.whole_folder import check_output
from mmref.terminal.arguments import count, local_path, place
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
    add_sources(build.add_subparsers(dest="source", required=True, metavar="|".join(SOURCES)), run_build)
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


def _add_index(commands: Any) -> None:
    text = "use WebDataset tars as they lie, img2dataset's among them: nothing is copied, each tar is scanned once"
    index = commands.add_parser("index", help=text, description=text)
    index.add_argument(
        "tars", nargs="+", metavar="TARS", help="tars, folders of them, globs or ranges ('{00000..00999}.tar'); paths or URLs"
    )
    add_output(index)
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
    add_fractions(index)
    index.set_defaults(run=run_index)


def run_build(args: argparse.Namespace) -> int:
    """Builds the set, prints its counts and what was left out. Returns the exit code."""
    if "downloads" in args.source_options:
        args.downloads = downloads(args)
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
    print(printable(f"{shards.name}: {manifest.get('source', 'of an unknown source')}"))
    print(printable(f"licence: {manifest.get('licence', 'not stated')}"))
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
