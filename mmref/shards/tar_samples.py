"""The samples of a WebDataset tar that somebody else wrote: which members belong together, and what they say.

Members of one key are a sample. A key is a name up to the first dot behind the last slash, as WebDataset has it; folders are
part of it. Texts are read on the way, of images only where they lie.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mmref.data.kinds import kind_of
from mmref.errors import SampleError, SourceError
from mmref.shards.samples import DEFAULT_FRACTIONS, cell_split, hash_split
from mmref.storage.cells import Row, line_texts
from mmref.storage.locations import to_text
from mmref.storage.tars import Member, Tar

TEXTS = ("txt", "json", "cls")
LARGEST_TEXT = 16_000_000  # bytes of a text of a sample
PREFERRED = ("jpg", "jpeg", "png", "webp")  # of several images of one sample
KEY, TXT, CLS = "__key__", ".txt", ".cls"  # in place of a field: the key, as WebDataset calls it, and members
NESTED = ("tar", "tgz", "zip", "gz", "bz2", "xz", "zst")
CAPTION_FIELDS = ("captions", "caption")
IMG2DATASET = {"url", "key", "status"}  # fields of the json that it writes


@dataclass(frozen=True)
class Reading:
    """How samples are understood, the same for all tars of a set."""

    ids: Literal["field", "image", "duplicate"] = "image"  # an object is what has one id, one image, or images of equal bytes
    object_id: str = ""  # field, or CLS
    captions: tuple[str, ...] = ()  # fields, or TXT; (): `captions`, else `caption`, else .txt, else the name of the class
    split: str = ""  # field; "": by a hash of the object id
    keep: tuple[str, ...] = ()  # fields that go into the set
    classes: tuple[str, ...] = ()  # names of the classes, by number
    on: str = ""  # field by whose value a row of the joined table belongs to a sample
    img2dataset: bool = False  # whether the tars are of its layout
    fractions: Mapping[str, float] = field(default_factory=lambda: dict(DEFAULT_FRACTIONS))


@dataclass
class TarSample:
    """Members of one key."""

    key: str
    image: Member | None = None
    ext: str = ""  # of the image, as in its name
    plain: int = 0  # images with nothing between the key and the ending: a.jpg
    dotted: int = 0  # others, as a.mask.png and a.front.png
    texts: dict[str, bytes] = field(default_factory=dict)
    content: str = ""  # hash of the image's bytes, where objects are told by it
    fault: str = ""

    @property
    def aside(self) -> int:
        """Images that are as much the sample's as the one that was taken. What lies beside a.jpg, as a.mask.png, is no such."""
        return max(0, (self.plain or self.dotted) - 1)


@dataclass
class TarContents:
    """What a tar holds, besides samples that are sound."""

    samples: dict[str, TarSample] = field(default_factory=dict)  # by key, in the order of the tar
    skipped: list[str] = field(default_factory=list)  # "name: reason"
    passed_over: Counter[str] = field(default_factory=Counter)  # members that are neither images nor texts, by ending


def read_tar(tar: Tar, hashed: bool) -> TarContents:
    """The samples of an open tar. `hashed`: also the hash of every image, for which all bytes are read.

    Raises SourceError for a tar of archives.
    """
    found = TarContents()
    seen: set[str] = set()
    for member in tar.members():
        if member.is_folder:
            continue
        folder, slash, base = member.name.rpartition("/")
        stem, dot, ext = base.partition(".")
        if base.startswith(".") or (base.startswith("__") and base.endswith("__")):  # of a Mac; WebDataset's own
            continue
        if not member.is_file or not dot or member.name in seen:
            why = (
                "no plain file" if not member.is_file else "a name without an ending" if not dot else "a second one of that name"
            )
            found.skipped.append(f"{to_text(member.name)}: {why}")
            continue
        seen.add(member.name)
        _take(tar, found, f"{folder}{slash}{stem}", ext, member, hashed)
    return found


def _take(tar: Tar, found: TarContents, key: str, ext: str, member: Member, hashed: bool) -> None:
    """Add a member to its sample."""
    kind = ext.lower()
    last = kind.rpartition(".")[2]
    if kind in TEXTS:
        sample = found.samples.setdefault(key, TarSample(key))
        if member.size > LARGEST_TEXT:
            sample.fault = f"its .{kind} has {member.size:,} bytes"
        else:
            sample.texts[kind] = tar.read(member.offset, member.size)
    elif kind_of(f".{last}") == "picture":
        sample = found.samples.setdefault(key, TarSample(key))
        if kind == last:
            sample.plain += 1
        else:
            sample.dotted += 1
        if sample.image is None or _rank(kind) < _rank(sample.ext.lower()):
            sample.image, sample.ext = member, ext
            if hashed:
                sample.content = hashlib.sha256(tar.read(member.offset, member.size)).hexdigest()[:32]
    elif last in NESTED:
        raise SourceError(
            f"{tar.place} holds {to_text(member.name)}, an archive, whose samples cannot be read alone: unpack it, and name the "
            "tars that come out."
        )
    else:
        found.passed_over[f".{kind}"] += 1


def _rank(kind: str) -> tuple[int, int]:
    """Which of several images of a sample is the one: a.jpg before a.png, and both before a.mask.png."""
    return kind.count("."), PREFERRED.index(kind) if kind in PREFERRED else len(PREFERRED)


def fields_of(sample: TarSample) -> dict[str, Any]:
    """The sample's json. Raises SampleError where it is none, or no object."""
    data = sample.texts.get("json")
    if data is None:
        return {}
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"its .json is broken: {error}") from None
    if not isinstance(fields, dict):
        raise SampleError(f"its .json is no object but {type(fields).__name__}")
    return fields


def text_of(sample: TarSample, kind: str) -> str:
    """A member that is a text, "" where there is none. Raises SampleError."""
    try:
        return sample.texts.get(kind, b"").decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SampleError(f"its .{kind} is no UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None


def interpret(
    sample: TarSample, label: str, reading: Reading, joined: Mapping[str, Mapping[str, Any]] | None
) -> tuple[dict[str, Any], str]:
    """The sample's json as a set has it, and its split. `joined`: rows of a table by the value of `reading.on`.

    Raises SampleError for what cannot be used.
    """
    if sample.image is None or not sample.image.size:
        raise SampleError("no image" if sample.image is None else f"its .{sample.ext} is empty")
    if sample.fault:
        raise SampleError(sample.fault)
    fields = fields_of(sample)
    if fields.keys() >= IMG2DATASET and fields["status"] != "success":
        raise SampleError(f"img2dataset's status is {fields['status']!r:.60}")
    image_id = to_text(f"{label}/{sample.key}")
    if joined is not None:
        value = to_text(sample.key) if reading.on == KEY else Row(0, fields).needed(reading.on)
        if value not in joined:
            raise SampleError(f"the table has no row for it ({reading.on} {value!r:.80})")
        fields = {**fields, **joined[value]}
    record = Row(0, fields)
    captions, kinds = _captions(sample, record, reading)
    if not captions:
        raise SampleError("no caption with text")
    if reading.ids == "field":
        object_id = _class_of(sample) if reading.object_id == CLS else record.needed(reading.object_id)
    else:
        object_id = image_id if reading.ids == "image" else sample.content
    meta: dict[str, Any] = {"object_id": object_id, "image_id": image_id, "captions": captions}
    if kinds is not None:
        meta["caption_kinds"] = kinds
    meta |= {name: record.value(name) for name in reading.keep if name not in meta}
    return meta, _split_of(record, reading, object_id)


def _captions(sample: TarSample, record: Row, reading: Reading) -> tuple[list[str], list[str] | None]:
    """Captions, with their kinds where several fields were named."""
    if reading.captions:
        found = {name: _lines(sample) if name == TXT else record.texts(name) for name in reading.captions}
        kinds = [name.lstrip(".") for name, texts in found.items() for _ in texts] if len(found) > 1 else None
        return [text for texts in found.values() for text in texts], kinds
    for name in CAPTION_FIELDS:
        if name in record.cells and (texts := record.texts(name)):
            return texts, None
    if (texts := _lines(sample)) or not reading.classes:
        return texts, None
    number = _class_of(sample)
    if not number.isdecimal() or int(number) >= len(reading.classes):
        raise SampleError(f"its .cls is {number!r:.40}, and --classes has {len(reading.classes)} names, from 0 on")
    return [reading.classes[int(number)]], None


def _lines(sample: TarSample) -> list[str]:
    with io.StringIO(text_of(sample, "txt"), newline=None) as text:  # breaks at line ends alone, whichever they are
        return line_texts(text, TXT)


def _class_of(sample: TarSample) -> str:
    if not (text := text_of(sample, "cls")):
        raise SampleError("no .cls")
    return text


def _split_of(record: Row, reading: Reading, object_id: str) -> str:
    if not reading.split:
        return hash_split(object_id, reading.fractions)
    return cell_split(record.needed(reading.split), reading.split)


def common_fields(samples: Sequence[TarSample]) -> Iterator[str]:
    """Names of the fields of samples' json, and CLS and TXT where a sample has such a member; each once."""
    seen: dict[str, None] = {}
    for sample in samples:
        try:
            seen |= dict.fromkeys(fields_of(sample))
        except SampleError:
            continue
        seen |= dict.fromkeys(f".{kind}" for kind in ("cls", "txt") if kind in sample.texts)
    return iter(seen)
