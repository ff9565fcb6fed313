"""Where every image of a split lies in its tars, and the reader that takes one of them by its byte range."""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from mmref.data.columns import Strings, read_columns
from mmref.errors import SampleError, ShardSetError, StorageError
from mmref.storage.cache import ShardCache
from mmref.storage.locations import file_system, is_url, read_bytes
from mmref.storage.retries import retry

MAX_OPEN_FILES = 64  # a process may hold readers of several splits; stay far below the usual limit of 1024
OPEN_ATTEMPTS = 3  # of a cached shard
INDEX_ARRAYS = {  # column of <split>.index.parquet -> dtype in SplitIndex
    "object_row": np.int32,
    "shard": np.int32,
    "image_offset": np.int64,
    "image_size": np.int64,
    "json_offset": np.int64,
    "json_size": np.int64,
    "n_captions": np.int32,
}
_known_digests: dict[str, tuple[tuple[int, int, int], dict[str, str]]] = {}  # manifest -> its stamp, and what it says


@dataclass(frozen=True)
class RawSample:
    """One image as it lies in its tar: encoded bytes, file ending without the dot, and the sample's json."""

    image_bytes: bytes
    image_ext: str
    meta: dict[str, Any]


@dataclass(frozen=True)
class SplitIndex:
    """Where every image of a split lies. Arrays have one entry per image, in tar order, an object's images adjacent.

    `object_start` has n_objects + 1 entries: the images of object row r are object_start[r] .. object_start[r + 1] - 1.
    `object_ids` has one entry per object row; `shard_paths` one per shard; `shard` indexes it.
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

    def __len__(self) -> int:
        return len(self.object_row)

    @property
    def n_objects(self) -> int:
        return len(self.object_ids)

    @classmethod
    def from_parquet(cls, path: str, split: str, shard_paths: list[str], most_rows: int | None = None) -> SplitIndex:
        """Raises ShardSetError when columns are missing or object rows are not 0..n-1 in order, OSError or ValueError for a file
        that is no parquet or has more than `most_rows`."""
        try:
            with _open(path) as file:
                strings = ["object_id", "image_id", "key", "image_ext"]
                columns = read_columns(file, _stamp(path), INDEX_ARRAYS, strings, most_rows)
        except KeyError as error:
            raise ShardSetError(f"{path}: {error.args[0]}. Build the shard set again.") from None
        rows = columns["object_row"]
        steps = np.diff(rows)
        # An object's images are adjacent and rows are contiguous exactly when rows start at 0 and rise by 0 or 1.
        if len(rows) and (rows[0] != 0 or steps.min(initial=0) < 0 or steps.max(initial=0) > 1):
            raise ShardSetError(f"{path}: object rows are not 0, 1, 2, ... in order. Build the shard set again.")
        first = np.append(0, np.flatnonzero(steps) + 1) if len(rows) else np.zeros(0, np.int64)
        return cls(
            split=split,
            shard_paths=shard_paths,
            object_ids=Strings(columns.pop("object_id").column.take(pa.array(first))),
            image_ids=columns.pop("image_id"),
            keys=columns.pop("key"),
            image_ext=columns.pop("image_ext"),
            object_start=np.append(first, len(rows)).astype(np.int64),
            **columns,
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
        )


class SampleReader:
    """Reads single samples of a split by byte range, out of the node's cache for shards of object storage where there is one.

    Picklable: open files stay behind and are opened again on use.
    """

    def __init__(self, index: SplitIndex, cache: ShardCache | None = None) -> None:
        self.index, self.cache = index, cache
        self._files: OrderedDict[int, int] = OrderedDict()  # shard -> file descriptor, least recently used first
        self._lock = threading.Lock()  # of _files: evaluation reads with several threads

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleReader, (self.index, self.cache)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Closes the cached files. The reader stays usable."""
        while getattr(self, "_files", None):
            os.close(self._files.popitem()[1])

    @contextlib.contextmanager
    def _opened(self, shard: int) -> Iterator[int]:
        """A descriptor of the caller's own: another thread may close the one that is held."""
        if shard not in self._files:
            self._local_path(shard)  # threads fetch side by side
        with self._lock:
            own = os.dup(self._held(shard))
        try:
            yield own
        finally:
            os.close(own)

    def _held(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        if len(self._files) >= MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        for attempt in range(OPEN_ATTEMPTS):
            try:
                file = os.open(self._local_path(shard), os.O_RDONLY)
                break
            except FileNotFoundError:  # another process of the node may make room in the cache between the two
                if self.cache is None or attempt == OPEN_ATTEMPTS - 1:
                    self._check_unreplaced(shard, found=False)
                    raise
        try:
            self._check_unreplaced(shard)
        except ShardSetError:
            os.close(file)
            raise
        self._files[shard] = file
        return file

    def _check_unreplaced(self, shard: int, found: bool = True) -> None:
        """Raise ShardSetError where another set has taken the place of this one since its index was read: offsets of the one say
        nothing of the other. To be called when a file is open: the manifest goes first and comes last."""
        path, digests = self.index.shard_paths[shard], self.index.shard_sha256
        if not digests or is_url(path):
            return
        root, name = os.path.dirname(os.path.dirname(path)), "/".join(path.split(os.sep)[-2:])
        listed = _digests(os.path.join(root, "manifest.json"))
        if (listed or found) and listed.get(name) != digests[shard]:
            raise ShardSetError(
                f"{root} was replaced by another shard set while it was read: {name} is no longer what it was. Start the same "
                "command again; a run takes the set that it began with alone."
            )

    def _local_path(self, shard: int) -> str:
        """Where a shard lies on this node, fetched into the cache where it lies on object storage."""
        path, digests = self.index.shard_paths[shard], self.index.shard_sha256
        if self.cache is None or not is_url(path):
            return path
        return self.cache.path(path, digests[shard] if digests else "")

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        try:
            with self._opened(shard) as file:
                return os.pread(file, size, offset)
        except OSError:  # what is held may be what has gone stale, or what there is too much of
            with self._lock:
                self.close()
            raise

    def _range(self, shard: int, offset: int, size: int, what: str) -> bytes:
        """Bytes of a shard. Raises SampleError, or StorageError where storage does not answer or permit it: that says nothing
        of the sample, and another in its place would change the run."""
        path = self.index.shard_paths[shard]
        try:
            if is_url(path) and self.cache is None:
                data = read_bytes(path, offset, size)
            else:
                data = retry(f"read {path}", lambda: self._pread(shard, offset, size))
        except OSError as error:  # no such file any more, no permission: so do credentials that have run out
            raise StorageError(f"cannot read {path}: {error}. Mend it, then start the same command: it resumes.") from error
        if len(data) != size:
            raise SampleError(f"{path}: {what} at byte {offset} is short: {len(data)} of {size} bytes.")
        return data

    def read_meta(self, i: int) -> dict[str, Any]:
        """The json of image i: captions and ids, without reading the image. Raises SampleError, StorageError, ShardSetError."""
        index, shard = self.index, int(self.index.shard[i])
        data = self._range(shard, int(index.json_offset[i]), int(index.json_size[i]), "json")
        try:
            meta = json.loads(data)
        except ValueError as error:  # covers broken UTF-8 as well
            where = f"{index.shard_paths[shard]}: json of {index.keys[i]!r} at byte {index.json_offset[i]}"
            raise SampleError(f"{where} is broken: {error}") from error
        if not isinstance(meta, dict) or not isinstance(meta.get("captions"), list):
            where = f"{index.shard_paths[shard]}: json of {index.keys[i]!r} at byte {index.json_offset[i]}"
            raise SampleError(f"{where} has no list `captions`.")
        return meta

    def read(self, i: int) -> RawSample:
        """Image i of the split. Raises SampleError (file, offset, what) when bytes are short or the json is broken, StorageError
        when storage does not answer, ShardSetError when another set has taken the place of this one."""
        index = self.index
        image = self._range(int(index.shard[i]), int(index.image_offset[i]), int(index.image_size[i]), "image")
        return RawSample(image, index.image_ext[i], self.read_meta(i))


def _open(path: str) -> Any:
    """Binary file, local or URL. Raises OSError, StorageError."""
    return io.BytesIO(read_bytes(path)) if is_url(path) else open(path, "rb")


def _stamp(path: str) -> str:
    """Changes when the file does."""
    if is_url(path):
        fs, inner = file_system(path)
        return f"{path} {fs.ukey(inner)}"
    stat = os.stat(path)
    return f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"


def _digests(manifest: str) -> dict[str, str]:
    """SHA-256 of the shards that a local manifest names now; {} where there is none."""
    try:
        stat = os.stat(manifest)
        stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = _known_digests.get(manifest)
        if known is None or known[0] != stamp:
            splits = json.loads(read_bytes(manifest))["splits"]
            found = {shard["file"]: shard["sha256"] for split in splits.values() for shard in split["shards"]}
            _known_digests[manifest] = known = stamp, found
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return {}
    return known[1]
