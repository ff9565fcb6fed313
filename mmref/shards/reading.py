"""How the samples of tars are to be understood: what the user says of it, and what the first tar shows."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmref.errors import ConfigError, SampleError, SourceError
from mmref.shards.samples import DEFAULT_FRACTIONS, check_kept
from mmref.shards.tar_samples import (
    CAPTION_FIELDS,
    CLS,
    IMG2DATASET,
    KEY,
    TXT,
    Reading,
    TarContents,
    common_fields,
    read_tar,
)
from mmref.storage.secrets import said, told
from mmref.storage.tables import read_table
from mmref.storage.tars import Tar
from mmref.storage.texts import read_lines

Joined = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class ReadingOptions:
    """What the user says; fields are those of a sample's json and columns of the joined table."""

    object_id: str | None = None  # field; None: `object_id` or the .cls where samples have one, else as `ids` says
    ids: Literal["image", "duplicate"] | None = None  # an object is an image, or all images of equal bytes
    captions: tuple[str, ...] = ()  # fields, `.txt` for that member
    split: str | None = None  # field; None: `split` where samples have one, else a hash
    join: str | None = None  # table with more fields
    on: str | None = None  # COLUMN of the table, or COLUMN=FIELD where the field of the json has another name
    keep: tuple[str, ...] = ()
    classes: str | None = None  # file with the names of the classes, one a line
    fractions: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_FRACTIONS))


def choose_reading(tars: Sequence[str], options: ReadingOptions) -> tuple[Reading, Joined | None, dict[str, str]]:
    """How samples are read, rows of the joined table by the value that tells them apart, and the choices in words.

    Raises SourceError for a field that the first tar with samples does not have, or tars without images.
    """
    if (options.join is None) != (options.on is None):
        raise ConfigError("--join TABLE and --on COLUMN go together: which table, and which column belongs to which sample.")
    place, contents = _first(tars)
    fields = set(common_fields(list(contents.samples.values())))
    of_json = fields - {CLS, TXT}
    joined, columns, on = _join(options) if options.join else (None, set(), "")
    known = fields | {KEY} | columns
    if on and on not in of_json | {KEY}:
        raise _unknown(place, on, "--on", of_json | {KEY})
    for names, option in ((options.captions, "--captions"), (options.keep, "--keep")):
        for name in names:
            if name not in known or name in (KEY, CLS):
                raise _unknown(place, name, option, known)
    check_kept(options.keep)
    ids, object_id = _ids(options, known, place)
    split = options.split or ("split" if "split" in known else "")
    if split and split not in known:
        raise _unknown(place, split, "--split", known)
    classes = tuple(_without_end(read_lines(options.classes, SourceError))) if options.classes else ()
    _check_captions(options, known, classes, place)
    reading = Reading(ids, object_id, options.captions, split, options.keep, classes, on, known >= IMG2DATASET, options.fractions)
    return reading, joined, _words(reading, known)


def _first(tars: Sequence[str]) -> tuple[str, TarContents]:
    """The first tar with images, and what it holds."""
    contents = TarContents()
    for place in tars:
        try:
            with Tar(place) as tar:
                contents = read_tar(tar, hashed=False)
        except OSError as error:
            raise SourceError(f"{told(place)} cannot be read: {said(error)}.") from None
        if any(sample.image for sample in contents.samples.values()):
            return place, contents
    found = ", ".join(contents.passed_over) or ("texts alone" if contents.samples else "nothing that can be read")
    raise SourceError(
        f"{len(tars)} tars hold no image (found: {found}). A sample is a .jpg, .png or .webp and texts of the same name: "
        "000.jpg, 000.txt, 000.json."
    )


def _unknown(place: str, name: str, option: str, known: Iterable[str]) -> SourceError:
    near = difflib.get_close_matches(name, sorted(known), 1, 0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return SourceError(f"{option} {name}: no sample of {told(place)} has such a field, only {', '.join(sorted(known))}.{hint}")


def _ids(options: ReadingOptions, known: set[str], place: str) -> tuple[Literal["field", "image", "duplicate"], str]:
    if options.ids is not None:
        return options.ids, ""
    name = options.object_id or next((name for name in ("object_id", CLS) if name in known), "")
    if name and (name not in known or name == TXT):
        raise _unknown(place, name, "--object-id", known)
    return ("field", name) if name else ("image", "")


def _check_captions(options: ReadingOptions, known: set[str], classes: tuple[str, ...], place: str) -> None:
    if options.captions or classes or known & {*CAPTION_FIELDS, TXT}:
        return
    hint = "give the names of the classes with --classes FILE, one a line" if CLS in known else "name its fields with --captions"
    raise SourceError(f"{told(place)}: no sample has a caption (.txt, or `caption` or `captions` in .json): {hint}. It has: "
                      f"{', '.join(sorted(known - {KEY})) or 'images alone'}.")  # fmt: skip


def _without_end(lines: list[str]) -> list[str]:
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _join(options: ReadingOptions) -> tuple[Joined, set[str], str]:
    """Rows of the table by the value that belongs to a sample, the columns that are taken, and the field of that value."""
    assert options.join is not None and options.on is not None
    column, _, of_sample = options.on.partition("=")
    table = read_table(options.join)
    table.require({column: "--on"})
    asked = (options.object_id or "object_id", options.split or "split", *options.keep, *(options.captions or CAPTION_FIELDS))
    columns = [name for name in dict.fromkeys(asked) if name in table.names]
    if not columns:
        raise SourceError(
            f"{options.join} has none of the fields that are asked for ({', '.join(asked)}), only {', '.join(table.names)}. Name "
            "its columns with --object-id, --captions, --split or --keep."
        )
    found: Joined = {}
    for row in table.rows(list(dict.fromkeys([column, *columns]))):
        try:
            value, cells = row.needed(column), {name: row.cell(name) for name in columns}
        except SampleError as error:
            raise SourceError(f"{options.join}, row {row.number}: {error}.") from None
        if value in found:
            raise SourceError(f"{options.join}, row {row.number}: {value!r} is in {column} twice: a sample has one row.")
        found[value] = {name: cell for name, cell in cells.items() if cell is not None}
    return found, set(columns), of_sample or column


def _words(reading: Reading, known: set[str]) -> dict[str, str]:
    """What was chosen, for the user and the manifest."""
    ids = {
        "image": "each image is an object of its own (other ids: --object-id FIELD, --ids duplicate, --join TABLE --on COLUMN)",
        "duplicate": "images of equal bytes are one object",
        "field": "the number of the class, in .cls" if reading.object_id == CLS else f"field {reading.object_id!r}",
    }[reading.ids]
    in_turn = [*(repr(name) for name in CAPTION_FIELDS if name in known), *([TXT] if TXT in known else [])]
    captions = ", ".join(reading.captions) or ", else ".join([*in_turn, *(["the class's name"] if reading.classes else [])])
    shares = ", ".join(f"{name} {share:g}" for name, share in reading.fractions.items())
    split = f"field {reading.split!r}" if reading.split else f"by a hash of the object's id: {shares}"
    layout = "img2dataset" if reading.img2dataset else "WebDataset"
    return {"layout": layout, "objects": ids, "captions": captions, "splits": split}
