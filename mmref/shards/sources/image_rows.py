"""Tables whose rows hold images themselves: Parquet and Arrow files, as `datasets` of Hugging Face and many others write them.

An image is a column of bytes, or of mappings with `bytes` and `path`. Its bytes are not read to list the rows.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from mmref.errors import SampleError, SourceError
from mmref.shards.samples import cell_split
from mmref.shards.sources.image_columns import ImageColumns, labels_of
from mmref.shards.sources.listed import ListedImage, ListedSource
from mmref.storage.cells import Row, python_values
from mmref.storage.fetch import locate_inside
from mmref.storage.image_places import BUFFER_BYTES, Place, read_place, row_place
from mmref.storage.locations import is_url
from mmref.storage.parquet import open_parquet, parquet_batches
from mmref.terminal.progress import Counter as Progress

LISTED_ROWS = 4096  # at a time
Locate = Callable[[str, str], str]  # a path that a row names, and the root -> the place
LARGE_GROUP = (
    32_000_000  # bytes of images in a group of rows: a jump into one takes some 10 ms, longer than an image takes to decode
)
WITH_BYTES_ROWS = 64  # where the bytes have to be read to list them


class ImageRow(NamedTuple):
    """A row with its image: where it lies, what it was called, and the other cells. place None: why there is none."""

    number: int  # from 1
    place: Place | None
    name: str
    cells: Mapping[str, Any]
    fault: str = ""


class Part(Protocol):
    """Some rows of one schema: a file, or a stream."""

    prefix: str  # of ids
    split: str | None
    schema: pa.Schema

    def rows(self, image: str, others: Sequence[str]) -> Iterator[ImageRow]:
        """Rows with some columns in order. Raises SourceError."""


def list_rows(
    parts: Iterable[Part], columns: ImageColumns, source: ListedSource, strict: bool, limit: int | None = None
) -> list[ListedImage]:
    """The images of some parts in order, of at most `limit` rows of each split. What cannot be used is left out of the source,
    and told. Raises SourceError.

    An image has the name that its row gives it where no other has that, else its part and the number of its row.

    Args:
        strict: an object id is needed where there is such a column, and rows with the same image are one with more captions.
    """
    found: list[ListedImage] = []
    names: list[str] = []
    read: Counter[str | None] = Counter()
    read_ids: set[str] = set()
    for part in parts:
        labels = labels_of(part.schema)
        keep = columns.kept(part.schema)
        left = None if limit is None else limit - read[part.split]
        for row in itertools.islice(part.rows(columns.image, columns.others(part.schema)), left):
            read[part.split] += 1
            name = f"{part.prefix}-{row.number}"
            try:
                if row.place is None:
                    raise SampleError(row.fault or "no image")
                cells = Row(row.number, {k: _labelled(k, v, labels) for k, v in row.cells.items()})
                own = name if columns.item_id is None else cells.needed(columns.item_id)
                if columns.item_id is not None and own in read_ids:
                    raise SampleError(f"the id {own!r} is that of an earlier row")
                found.append(_image(own, row.place, cells, columns, keep, part.split, strict))
                read_ids.add(own)
                names.append(row.name if columns.item_id is None else "")
            except SampleError as error:
                source.leave_out(f"{part.prefix}, row {row.number}", str(error))
    if strict and columns.item_id is None:
        found, names = _merged(found, names, source.warnings)
    counts = Counter(names)
    for image, name in zip(found, names):
        if name and counts[name] == 1 and name not in read_ids:
            image.image_id = name
    return found


def _merged(images: list[ListedImage], names: list[str], warnings: list[str]) -> tuple[list[ListedImage], list[str]]:
    """Images and their names with the rows of each image as one, the first with the captions of all. Many datasets have a row a
    caption: taken as images of their own, those would be on both sides of a split.

    Names tell images apart. Where several rows have one, or none, the bytes are compared; rows of other objects or splits stay.
    """
    counts = Counter(names)
    doubtful = sum(not name or counts[name] > 1 for name in names)
    firsts: dict[tuple[str | None, str | None, bytes], ListedImage] = {}
    kept, kept_names = [], []
    with Progress("comparing images", doubtful, "image") as progress:
        for image, name in zip(images, names):
            if not name or counts[name] > 1:
                progress.add(1)
                first = firsts.setdefault((image.split, image.object_id, _digest(image)), image)
                if first is not image:
                    first.captions += image.captions
                    if first.caption_kinds is not None and image.caption_kinds is not None:
                        first.caption_kinds += image.caption_kinds
                    continue
            kept.append(image)
            kept_names.append(name)
    if lost := len(images) - len(kept):
        warnings.append(f"{lost:,} rows hold the image of an earlier row, byte for byte: its captions are that image's")
    return kept, kept_names


def _digest(image: ListedImage) -> bytes:
    """Of an image's bytes; of one that cannot be read, which is told when it is loaded, of its id."""
    try:
        return hashlib.sha256(read_place(image.place)).digest()
    except (SampleError, OSError):
        return image.image_id.encode("utf-8", "surrogatepass")


def _labelled(column: str, value: Any, labels: Mapping[str, list[str]]) -> Any:
    names = labels.get(column)
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None  # -1: not labelled


def _image(
    name: str, place: Place, row: Row, columns: ImageColumns, keep: Sequence[str], split: str | None, needs_object: bool
) -> ListedImage:
    """Raises SampleError."""
    texts = {column: row.texts(column) for column in columns.captions}
    kinds = [column for column, found in texts.items() for _ in found] if len(texts) > 1 else None
    object_id = None
    if columns.object_id is not None:
        object_id = row.needed(columns.object_id) if needs_object else row.text(columns.object_id) or None
    if columns.split is not None:
        split = cell_split(row.needed(columns.split), f"column {columns.split!r}")
    captions = [text for found in texts.values() for text in found]
    extra = {column: columns.value(row, column) for column in keep}
    return ListedImage(name, place, captions, object_id, split, kinds, extra)


class Pack:
    """A file of this machine that takes images end to end."""

    def __init__(self, path: str) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self.path, self._file = path, open(path, "wb")

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, data: bytes) -> Place:
        """The place of an image that is written. Raises OSError."""
        place = Place(self.path, self._file.tell(), len(data))
        self._file.write(data)
        return place


class ParquetPart:
    """A Parquet file. Images are places of its rows; where a row holds a path in place of bytes, the file below `root`.

    Args:
        pack: a file for the images where they lie in large groups of rows, of which each jump would unpack one; "": none.
        told: further columns, with one value for all rows (`told_by_folders`).

    Raises SourceError where it cannot be read.
    """

    def __init__(
        self,
        path: str,
        prefix: str,
        split: str | None = None,
        root: str | None = None,
        locate: Locate = locate_inside,
        pack: str = "",
        told: Mapping[str, str | None] | None = None,
    ) -> None:
        self.path, self.prefix, self.split, self._pack = path, prefix, split, pack
        self.root, self._locate = os.path.dirname(path) if root is None else root, locate
        with _named(path):
            self._file = open_parquet(path, BUFFER_BYTES)
        self.schema: pa.Schema = self._file.schema_arrow
        self._told = {name: value for name, value in (told or {}).items() if name not in self.schema.names}
        for name in self._told:
            self.schema = self.schema.append(pa.field(name, pa.string()))

    def rows(self, image: str, others: Sequence[str]) -> Iterator[ImageRow]:
        """Rows in order. Raises SourceError where the file is damaged."""
        told = {name: self._told[name] for name in others if name in self._told}
        for row in self._own_rows(image, [name for name in others if name not in told]):
            yield row._replace(cells={**row.cells, **told}) if told else row

    def _own_rows(self, image: str, others: Sequence[str]) -> Iterator[ImageRow]:
        """Rows with columns of the file itself."""
        chunks = self._chunks(image)
        if self._pack and max((chunk.total_uncompressed_size for chunk in chunks), default=0) > LARGE_GROUP:
            with Pack(self._pack) as pack:
                yield from self._with_bytes(image, others, pack)
            return
        kind = self.schema.field(image).type
        leaves = [f"{image}.path"] if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0 else []
        # Else only the bytes tell how many rows there are, and which are empty.
        if (others or leaves) and all(chunk.statistics is not None and chunk.statistics.null_count == 0 for chunk in chunks):
            yield from self._without_bytes(image, others, leaves)
        else:
            yield from self._with_bytes(image, others, None)

    def _without_bytes(self, image: str, others: Sequence[str], leaves: Sequence[str]) -> Iterator[ImageRow]:
        number = 0
        with _named(self.path):
            for batch in parquet_batches(self._file, [*others, *leaves], LISTED_ROWS):
                paths = _paths(batch.column(image) if leaves else None, batch.num_rows)
                for path, row in zip(paths, _cells(batch, others)):
                    number += 1
                    yield image_row(number, row_place(self.path, image, number - 1), path, row, self.root, self._locate)

    def _with_bytes(self, image: str, others: Sequence[str], pack: Pack | None) -> Iterator[ImageRow]:
        number = 0
        with _named(self.path):
            for batch in parquet_batches(self._file, [*others, image], WITH_BYTES_ROWS):
                column = batch.column(image)
                values = column.flatten()[column.type.get_field_index("bytes")] if pa.types.is_struct(column.type) else column
                for path, value, row in zip(_paths(column, batch.num_rows), values, _cells(batch, others)):
                    number += 1
                    inside = row_place(self.path, image, number - 1) if value.is_valid else None
                    if inside is not None and pack is not None:
                        inside = pack.add(value.as_py())
                    yield image_row(number, inside, path, row, self.root, self._locate)

    def _chunks(self, image: str) -> list[Any]:
        """The descriptions of the column's bytes, a group of rows each."""
        leaf = f"{image}.bytes" if pa.types.is_struct(self.schema.field(image).type) else image
        groups = map(self._file.metadata.row_group, range(self._file.metadata.num_row_groups))
        return [next(c for c in map(g.column, range(g.num_columns)) if c.path_in_schema == leaf) for g in groups]


def first_value(part: ParquetPart, column: str) -> bytes | None:
    """The first of a column of bytes that is not null. Raises SourceError."""
    with _named(part.path):
        for batch in parquet_batches(open_parquet(part.path, BUFFER_BYTES), [column], 1):
            if (value := batch.column(0)[0].as_py()) is not None:
                return value
    return None


class ArrowPart:
    """A file of `datasets`: an Arrow stream that is not compressed, so that an image is a range of its bytes.

    Args:
        root: what paths in place of bytes lie below.

    Raises SourceError where it cannot be read.
    """

    def __init__(
        self, path: str, prefix: str, split: str | None, root: str, first: int = 0, locate: Locate = locate_inside
    ) -> None:
        self.path, self.prefix, self.split, self.root, self._locate = path, prefix, split, root, locate
        self._first = first  # number of the rows of this split in files before
        with _named(path):
            self._bytes = pa.memory_map(path).read_buffer()
            self.schema: pa.Schema = pa.ipc.open_stream(pa.BufferReader(self._bytes)).schema

    def rows(self, image: str, others: Sequence[str]) -> Iterator[ImageRow]:
        """Rows in order. Raises SourceError where the file is damaged, or compressed."""
        number = self._first
        with _named(self.path):
            for batch in pa.ipc.open_stream(pa.BufferReader(self._bytes)):
                column = batch.column(image)
                paths, spans = _paths(column, len(column)), self._spans(column)
                for (start, size), path, row in zip(spans, paths, _cells(batch, others)):
                    number += 1
                    inside = Place(self.path, start, size) if size > 0 else None
                    yield image_row(number, inside, path, row, self.root, self._locate)

    def _spans(self, column: pa.Array) -> list[tuple[int, int]]:
        """Where the bytes of each row lie in the file, and how many they are; 0 for none."""
        values = column.flatten()[column.type.get_field_index("bytes")] if pa.types.is_struct(column.type) else column
        _, offsets, data = values.buffers()
        if data is None or not data.size:
            return [(0, 0)] * len(values)
        start = data.address - self._bytes.address
        if not 0 <= start <= self._bytes.size - data.size:
            raise SourceError(f"{self.path} is compressed, so that its images cannot be read alone: save it with `save_to_disk`.")
        wide = np.int64 if pa.types.is_large_binary(values.type) else np.int32
        edges = np.frombuffer(offsets, wide)[values.offset : values.offset + len(values) + 1].astype(np.int64)
        sizes = np.where(values.is_valid().to_numpy(zero_copy_only=False), np.diff(edges), 0)
        return list(zip((start + edges[:-1]).tolist(), sizes.tolist()))


def image_row(
    number: int, inside: Place | None, path: str | None, cells: Mapping[str, Any], root: str, locate: Locate = locate_inside
) -> ImageRow:
    """A row whose image lies in its table, or else is the file that it names below `root`."""
    name = "" if path is None else path.rsplit("/", 1)[-1] if os.path.isabs(path) or is_url(path) else path
    if inside is not None or not path:
        return ImageRow(number, inside, name, cells)
    try:
        return ImageRow(number, Place(locate(path, root)), name, cells)
    except (SampleError, ValueError) as error:  # a path that no file can have
        return ImageRow(number, None, name, cells, str(error))


def _paths(column: pa.Array | None, count: int) -> list[str | None]:
    if column is None or not pa.types.is_struct(column.type) or (at := column.type.get_field_index("path")) < 0:
        return [None] * count
    return column.flatten()[at].to_pylist()


def _cells(batch: pa.RecordBatch, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of each row."""
    values = [python_values(batch.column(name)) for name in names]
    for i in range(batch.num_rows):
        yield {name: column[i] for name, column in zip(names, values)}


class _named:
    """Errors of Arrow as SourceError, with the file's name."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        if isinstance(error, (pa.ArrowException, OSError, ValueError)):
            raise SourceError(f"{self.path} cannot be read: {error}.") from None
