"""Where every image of a split lies in its tars, and the reader that takes some of them by their byte ranges.

The json of a sample lies beside its image, or, where tars are indexed in place, in a file of the set.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from mmref.data.columns import read_columns
from mmref.errors import SampleError, ShardSetError, StorageError
from mmref.storage.cache import ShardCache
from mmref.storage.locations import UNTOLD, file_system, is_url, read_bytes
from mmref.storage.ranges import Range, Request, requests
from mmref.storage.retries import retry
from mmref.storage.secrets import said, told
from mmref.storage.tars import size_in, stamp_of

T = TypeVar("T")
# Bytes between two ranges that are read as well: behind a URL they come sooner than another answer, elsewhere they are the
# headers between an image and its json.
FAR_GAP, NEAR_GAP = 128 << 10, 4 << 10
AT_ONCE = 16  # requests of this process over the network
METAS_AT_ONCE = 1024  # records that are asked for together, with up to FAR_GAP of each one's image
MAX_OPEN_FILES = 64  # a process may hold readers of several splits; stay far below the usual limit of 1024
OPEN_ATTEMPTS = 3  # of a cached shard
SMALLEST_SAMPLE = 1024  # bytes in a tar: a header and what it is of
INDEX_ARRAYS = {  # column of <split>.index.parquet -> dtype in SplitIndex
    "object_row": np.int32,
    "shard": np.int32,
    "image_offset": np.int64,
    "image_size": np.int64,
    "json_offset": np.int64,
    "json_size": np.int64,
    "n_captions": np.int32,
}
_network = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="mmref-read")  # its threads start when they are needed
_known_digests: dict[tuple[str, str], tuple[tuple[int, int, int], dict[str, str]]] = {}  # manifest, split -> stamp, what it says


@dataclass(frozen=True)
class RawSample:
    """One image as it lies in its tar: encoded bytes, file ending without the dot, and the sample's json."""

    image_bytes: bytes
    image_ext: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class Ends:
    """How many bytes the shards of a split have, and the files with their json: an index that points behind them is damaged."""

    of_images: np.ndarray | None = None  # (shards,) int64; None: nothing is checked
    of_json: np.ndarray | None = None  # (shards,) int64

    @property
    def rows(self) -> int | None:
        """The most images for which there is room."""
        return None if self.of_images is None else int(self.of_images.sum()) // SMALLEST_SAMPLE

    @property
    def digest(self) -> str:
        """Changes when they do."""
        return hashlib.sha256(b"".join(ends.tobytes() for ends in (self.of_images, self.of_json) if ends is not None)).hexdigest()

    def check(self, path: str, rows: dict[str, np.ndarray]) -> None:
        """Raise ShardSetError for rows of an index that point elsewhere."""
        shard = rows["shard"]
        for what, ends in (("image", self.of_images), ("json", self.of_json)):
            if ends is None:
                continue
            start, size = rows[f"{what}_offset"], rows[f"{what}_size"]
            inside = (shard >= 0) & (shard < len(ends))
            if not np.all(inside & (start >= 0) & (size >= 0) & (size <= ends[shard * inside] - start)):
                raise ShardSetError(f"{path} points outside its shards. Build the set again.")


@dataclass(frozen=True)
class SplitIndex:
    """Where every image of a split lies. Arrays have one entry per image, an object's images adjacent: in the order of the tars
    where the set was built, in any order where tars were indexed in place.

    `object_start` has n_objects + 1 entries: the images of object row r are object_start[r] .. object_start[r + 1] - 1.
    `object_ids` has one entry per object row; `shard_paths` one per shard; `shard` indexes it. `chosen` has the rows that the
    objects of a part have in the whole index.
    """

    split: str
    shard_paths: list[str]
    object_ids: Sequence[str]
    image_ids: Sequence[str]
    keys: Sequence[str]
    image_ext: Sequence[str]
    object_row: np.ndarray  # (images,) int32
    shard: np.ndarray  # (images,) int32
    image_offset: np.ndarray  # (images,) int64, bytes
    image_size: np.ndarray  # (images,) int64, bytes
    json_offset: np.ndarray  # (images,) int64, bytes
    json_size: np.ndarray  # (images,) int64, bytes
    n_captions: np.ndarray  # (images,) int32
    object_start: np.ndarray = field(repr=False)  # (objects + 1,) int64
    first_objects: tuple[int, ...] = (0,)  # first object row of each shard set; more than one after `merge`
    shard_sha256: tuple[str, ...] = ()  # of each shard, as the manifests have it
    json_paths: tuple[str, ...] = ()  # of each shard the file with its samples' json; "" (or no entry) where that is the tar
    chosen: np.ndarray | None = field(default=None, repr=False)  # object rows of the whole that these are, None: all of them
    stamps: tuple[str, ...] = ()  # of each shard that lies outside of its set, as `storage.tars.tar_stamp`; else "" (or no entry)

    def __len__(self) -> int:
        return len(self.object_row)

    @property
    def n_objects(self) -> int:
        return len(self.object_ids)

    def json_path(self, shard: int) -> str:
        """Where the json of a shard's samples lies."""
        return (self.json_paths[shard] if self.json_paths else "") or self.shard_paths[shard]

    def stamp(self, shard: int) -> str:
        """What a shard must still be, where it lies outside of its set; else ""."""
        return self.stamps[shard] if self.stamps else ""

    @classmethod
    def from_parquet(cls, path: str, split: str, shard_paths: list[str], ends: Ends | None = None, **fields: Any) -> SplitIndex:
        """Raises ShardSetError when columns are missing, object rows are not 0..n-1 in order or an entry points outside of
        `ends`, OSError or ValueError for a file that is no parquet or has more rows than there is room for."""
        ends = ends or Ends()
        try:
            with _open(path) as file:
                columns = read_columns(
                    file, path, f"{_stamp(path)} {ends.digest}", INDEX_ARRAYS, ["image_id", "key", "image_ext"],
                    lambda rows: ends.check(path, rows), ends.rows,
                )  # fmt: skip
        except KeyError as error:
            raise ShardSetError(f"{path}: {error.args[0]}. Build the shard set again.") from None
        return cls(
            split=split,
            shard_paths=shard_paths,
            object_ids=columns.object_ids,
            image_ids=columns.strings["image_id"],
            keys=columns.strings["key"],
            image_ext=columns.strings["image_ext"],
            object_start=columns.object_start,
            **columns.numbers,
            **fields,
        )

    @staticmethod
    def merge(parts: Sequence[SplitIndex], names: Sequence[str]) -> SplitIndex:
        """One index over several shard sets: objects, images and shards numbered through, held in memory.

        Objects of the sets after the first are called `<its name of names>/<object id>`: the same id elsewhere is another
        object.
        """
        objects = np.cumsum([0, *(p.n_objects for p in parts)])
        images = np.cumsum([0, *(len(p) for p in parts)])
        shards = np.cumsum([0, *(len(p.shard_paths) for p in parts)])

        def joined(name: str) -> np.ndarray:
            return np.concatenate([getattr(p, name) for p in parts])

        def strings(name: str) -> list[str]:
            return [x for p in parts for x in getattr(p, name)]

        object_ids = [*parts[0].object_ids]
        for part, name in zip(parts[1:], names[1:]):
            object_ids += [f"{name}/{i}" for i in part.object_ids]
        return SplitIndex(
            split=parts[0].split,
            shard_paths=[path for p in parts for path in p.shard_paths],
            object_ids=object_ids,
            image_ids=strings("image_ids"),
            keys=strings("keys"),
            image_ext=strings("image_ext"),
            object_row=np.concatenate([p.object_row + o for p, o in zip(parts, objects)]).astype(np.int32),
            shard=np.concatenate([p.shard + s for p, s in zip(parts, shards)]).astype(np.int32),
            image_offset=joined("image_offset"),
            image_size=joined("image_size"),
            json_offset=joined("json_offset"),
            json_size=joined("json_size"),
            n_captions=joined("n_captions"),
            object_start=np.concatenate([*(p.object_start[:-1] + i for p, i in zip(parts, images)), images[-1:]]),
            first_objects=tuple(objects[:-1].tolist()),
            shard_sha256=tuple(digest for p in parts for digest in p.shard_sha256),
            json_paths=tuple(p.json_path(shard) for p in parts for shard in range(len(p.shard_paths))),
            stamps=tuple(p.stamp(shard) for p in parts for shard in range(len(p.shard_paths))),
        )

    def part(self, objects: np.ndarray, images: np.ndarray) -> SplitIndex:
        """The index of some objects and images alone, numbered anew and held in memory.

        Args:
            objects: (m,) rising object rows.
            images: (n,) rising image positions, one or more of each of these objects and none of others.
        """
        arrays: dict[str, Any] = {name: getattr(self, name)[images] for name in INDEX_ARRAYS if name != "object_row"}
        rows = np.searchsorted(objects, self.object_row[images])
        whole = objects if self.chosen is None else self.chosen[objects]
        return replace(
            self,
            object_ids=[self.object_ids[row] for row in objects.tolist()],
            image_ids=[self.image_ids[at] for at in images.tolist()],
            keys=[self.keys[at] for at in images.tolist()],
            image_ext=[self.image_ext[at] for at in images.tolist()],
            object_row=rows.astype(np.int32),
            object_start=np.searchsorted(rows, np.arange(len(objects) + 1)),
            first_objects=tuple(np.searchsorted(objects, self.first_objects).tolist()),
            chosen=None if self.chosen is None and len(objects) == self.n_objects else whole,
            **arrays,
        )


class SampleReader:
    """Reads samples of a split by byte range, out of the node's cache for shards of object storage where there is one.

    Picklable: open files stay behind and are opened again on use.
    """

    def __init__(self, index: SplitIndex, cache: ShardCache | None = None) -> None:
        self.index, self.cache = index, cache
        self._files: OrderedDict[str, int] = OrderedDict()  # path -> file descriptor, least recently used first
        self._lock = threading.Lock()  # of _files: evaluation reads with several threads
        weakref.finalize(self, _close_all, self._files).atexit = False  # `__del__` may find no `os` when Python ends

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleReader, (self.index, self.cache)

    def close(self) -> None:
        """Closes the cached files. The reader stays usable."""
        _close_all(self._files)

    @contextlib.contextmanager
    def _opened(self, shard: int, path: str) -> Iterator[int]:
        """A descriptor of the caller's own: another thread may close the one that is held."""
        if path not in self._files:
            self._local_path(shard, path)  # threads fetch side by side
        with self._lock:
            own = os.dup(self._held(shard, path))
        try:
            yield own
        finally:
            os.close(own)

    def _held(self, shard: int, path: str) -> int:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        if len(self._files) >= MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        for attempt in range(OPEN_ATTEMPTS):
            try:
                file = os.open(self._local_path(shard, path), os.O_RDONLY)
                break
            except FileNotFoundError:  # another process of the node may make room in the cache between the two
                if self.cache is None or attempt == OPEN_ATTEMPTS - 1:
                    self._check_unreplaced(shard, found=False)
                    raise
        try:
            self._check_unreplaced(shard)
            if path == self.index.shard_paths[shard]:
                self._check_in_place(shard, os.fstat(file))
        except ShardSetError:
            os.close(file)
            raise
        self._files[path] = file
        return file

    def _check_unreplaced(self, shard: int, found: bool = True) -> None:
        """Raise ShardSetError where another set has taken the place of this one since its index was read: offsets of the one say
        nothing of the other. To be called when a file is open: the manifest goes first and comes last."""
        index, path, digests = self.index, self.index.shard_paths[shard], self.index.shard_sha256
        own = index.json_path(shard)  # lies in the set wherever the tar lies
        if not digests or is_url(own):
            return
        root = os.path.dirname(os.path.dirname(own))
        name = path if index.stamp(shard) else "/".join(path.split(os.sep)[-2:])
        listed = _digests(os.path.join(root, "manifest.json"), index.split)
        if (listed or found) and listed.get(name) != digests[shard]:
            raise ShardSetError(
                f"{root} was replaced by another shard set while it was read: {name} is no longer what it was. Start the same "
                "command again; a run takes the set that it began with alone."
            )

    def _check_in_place(self, shard: int, found: os.stat_result) -> None:
        """Raise ShardSetError where a tar outside of its set is no longer the one that was indexed. Of one in the cache only the
        size is known: its tag is part of its name there."""
        path, stamp = self.index.shard_paths[shard], self.index.stamp(shard)
        same = size_in(stamp) in (found.st_size, UNTOLD) if is_url(path) else stamp_of(found) == stamp
        if stamp and not (same and stat.S_ISREG(found.st_mode)):
            raise changed_in_place(path, stamp_of(found), stamp)

    def _local_path(self, shard: int, path: str) -> str:
        """Where a file of a shard lies on this node, fetched into the cache where it lies on object storage."""
        index = self.index
        if self.cache is None or not is_url(path):
            return path
        content = index.shard_sha256[shard] if index.shard_sha256 else ""
        if path == index.shard_paths[shard]:
            content = index.stamp(shard) or content  # splits share a tar that was indexed in place
        return self.cache.path(path, content)

    def _pread(self, shard: int, path: str, offset: int, size: int) -> bytes:
        try:
            with self._opened(shard, path) as file:
                return os.pread(file, size, offset)
        except OSError:  # what is held may be what has gone stale, or what there is too much of
            with self._lock:
                self.close()
            raise

    def _bytes(self, shard: int, wanted: Range) -> bytes:
        """Bytes of a file of a shard, fewer where it ends before. Raises StorageError where storage does not answer or permit it:
        that says nothing of the sample, and another in its place would change the run."""
        path, size = wanted.place, wanted.size
        try:
            if is_url(path) and self.cache is None:
                data = read_bytes(path, wanted.start, size)
            else:
                data = retry(f"read {told(path)}", lambda: self._pread(shard, path, wanted.start, size))
        except OSError as error:  # no such file any more, no permission: so do credentials that have run out
            raise StorageError(
                f"cannot read {told(path)}: {said(error)}. Mend it, then start the same command: it resumes."
            ) from error
        if len(data) > size:
            raise StorageError(
                f"{told(path)} is only given as a whole, {len(data):,} bytes where {size:,} were asked for: set `data.cache_gb`, "
                "so that each node keeps it."
            )
        return data

    def _gap(self, path: str) -> int:
        return FAR_GAP if is_url(path) and self.cache is None else NEAR_GAP

    def _waits(self, path: str) -> bool:
        """Whether what is read of a file has to come over the network first."""
        return is_url(path) and path not in self._files

    def _read(self, wanted: Sequence[tuple[int, str, Range]]) -> list[bytes | SampleError]:
        """The bytes of each (shard, what it is, range), or why they are not whole. Near ranges come in one request, and requests
        that go over the network side by side. Raises StorageError, ShardSetError."""
        asked = requests([part[2] for part in wanted], self._gap)

        def bring(request: Request) -> bytes:
            return self._bytes(wanted[request.wanted[0]][0], request.whole)

        side_by_side = sum(self._waits(request.whole.place) for request in asked) > 1
        brought = _network.map(bring, asked) if side_by_side else map(bring, asked)
        found: list[bytes | SampleError] = [b""] * len(wanted)
        for request, data in zip(asked, brought):
            for number in request.wanted:
                _, what, part = wanted[number]
                own = data[part.start - request.whole.start :][: part.size]
                whole = len(own) == part.size
                found[number] = own if whole else SampleError(
                    f"{part.place}: {what} at byte {part.start} is short: {len(own)} of {part.size} bytes."
                )  # fmt: skip
        return found

    def _image(self, i: int) -> tuple[int, str, Range]:
        index, shard = self.index, int(self.index.shard[i])
        return shard, "image", Range(index.shard_paths[shard], int(index.image_offset[i]), int(index.image_size[i]))

    def _json(self, i: int) -> tuple[int, str, Range]:
        index, shard = self.index, int(self.index.shard[i])
        return shard, "json", Range(index.json_path(shard), int(index.json_offset[i]), int(index.json_size[i]))

    def _meta(self, i: int, data: bytes | SampleError) -> dict[str, Any] | SampleError:
        """The json of image i, or what is wrong with it."""
        if isinstance(data, SampleError):
            return data
        index = self.index
        where = f"{told(index.json_path(int(index.shard[i])))}: json of {index.keys[i]!r} at byte {index.json_offset[i]}"
        try:
            meta = json.loads(data)
        except ValueError as error:  # covers broken UTF-8 as well
            return SampleError(f"{where} is broken: {error}")
        if not isinstance(meta, dict) or not isinstance(meta.get("captions"), list):
            return SampleError(f"{where} has no list `captions`.")
        return meta

    def read_metas(self, rows: Sequence[int]) -> Iterator[dict[str, Any] | SampleError]:
        """The json of images: captions and ids; or what is wrong with it. Raises StorageError, ShardSetError."""
        for at in range(0, len(rows), METAS_AT_ONCE):
            some = rows[at : at + METAS_AT_ONCE]
            yield from map(self._meta, some, self._read([self._json(i) for i in some]))

    def read_all(self, rows: Sequence[int]) -> list[RawSample | SampleError]:
        """Images of the split with their json, or what is wrong with each: bytes are short or the json is broken. Raises
        StorageError when storage does not answer, ShardSetError when another set has taken the place of this one."""
        data = self._read([part for i in rows for part in (self._image(i), self._json(i))])
        found: list[RawSample | SampleError] = []
        for i, image, text in zip(rows, data[::2], data[1::2]):
            meta = self._meta(i, text)
            if isinstance(image, SampleError):
                found.append(image)
            else:
                found.append(meta if isinstance(meta, SampleError) else RawSample(image, self.index.image_ext[i], meta))
        return found

    def read_meta(self, i: int) -> dict[str, Any]:
        """As `read_metas`, of one image. Raises SampleError too."""
        return sound(next(self.read_metas([i])))

    def read(self, i: int) -> RawSample:
        """As `read_all`, of one image. Raises SampleError too."""
        return sound(self.read_all([i])[0])


def sound(found: T | SampleError) -> T:
    """What was read. Raises the SampleError that was found in its place."""
    if isinstance(found, SampleError):
        raise found
    return found


def _close_all(files: OrderedDict[str, int]) -> None:
    """Close what a reader holds open."""
    while files:
        os.close(files.popitem()[1])


def _open(path: str) -> Any:
    """Binary file, local or URL. Raises OSError, StorageError."""
    return io.BytesIO(read_bytes(path)) if is_url(path) else open(path, "rb")


def _stamp(path: str) -> str:
    """Changes when the file does."""
    if is_url(path):
        fs, inner = file_system(path)
        return f"{path} {fs.ukey(inner)}"
    found = os.stat(path)
    return f"{os.path.abspath(path)} {found.st_size} {found.st_mtime_ns}"


def changed_in_place(path: str, found: str, expected: str) -> ShardSetError:
    """The error for a tar outside of its set that is no longer the one that was indexed."""
    return ShardSetError(
        f"{told(path)} is not the tar that was indexed: size and time (or tag) are {found}, they were {expected}. Index the tars "
        "again with `mmref shards index`, or put the old one back."
    )


def _digests(manifest: str, split: str) -> dict[str, str]:
    """SHA-256 of the shards that a local manifest names now for a split; {} where there is none."""
    try:
        found = os.stat(manifest)
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
        known = _known_digests.get((manifest, split))
        if known is None or known[0] != stamp:
            shards = json.loads(read_bytes(manifest))["splits"].get(split, {"shards": []})["shards"]
            _known_digests[manifest, split] = known = stamp, {shard["file"]: shard["sha256"] for shard in shards}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return known[1]
