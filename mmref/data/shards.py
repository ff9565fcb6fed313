"""Reader of shard sets: WebDataset tars with an index of byte offsets beside them, so any sample can be read alone.

Layout (written by `data_shards/build.py`): `manifest.json` last, so a set with a manifest is complete;
`objects.parquet` (train objects and their rows); per split the tars and `<split>.index.parquet`, one row per image, an
object's images side by side. A set may travel packed (`.tar.gz` for every tar): `ShardSet.open` unpacks it once.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import tarfile
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmref.data.cache import ShardCache
from mmref.data.columns import Strings, read_columns
from mmref.data.manifest import read_manifest
from mmref.errors import SampleError, ShardSetError, StorageError
from mmref.locations import absolute, file_system, folder_name, is_url, join, read_bytes, size_of
from mmref.storage import retry

if TYPE_CHECKING:
    from mmref.config import Config

MAX_OPEN_FILES = 64  # a process may hold readers of several splits; stay far below the usual limit of 1024
SMALLEST_SAMPLE = 1024  # bytes in a tar: the headers of an image and its json
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


def _sizes(folder: str) -> dict[str, int]:
    """Bytes of the files in a folder of object storage, by name."""
    fs, inner = file_system(folder)
    found = retry(f"list {folder}", lambda: fs.find(inner, detail=True))
    return {name.rsplit("/", 1)[-1]: int(entry["size"]) for name, entry in found.items()}


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


def sha256_of(path: str) -> str:
    """Hex digest of a local file or URL, read in 1 MiB pieces."""
    if is_url(path):
        return hashlib.sha256(read_bytes(path)).hexdigest()

    def digest() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retry(f"read {path}", digest)


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
            raise StorageError(
                f"cannot read {path}: {error}. Mend it, then start the same command: it resumes."
            ) from error
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


class ShardSet:
    """A complete shard set. `root` is a folder or a URL; `manifest` the parsed manifest.json."""

    def __init__(self, root: str, manifest: dict[str, Any]) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: str) -> ShardSet:
        """Raises ShardSetError when the set is missing, incomplete or of an unknown version."""
        root = absolute(root)
        found = cls(root, read_manifest(root))
        found._unpack()
        return found

    @property
    def splits(self) -> list[str]:
        return list(self.manifest["splits"])

    @property
    def fingerprint(self) -> str:
        """12 hex digits of the shards' contents, split by split, wherever the set lies."""
        contents = {name: [s["sha256"] for s in split["shards"]] for name, split in self.manifest["splits"].items()}
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:12]

    def _unpack(self) -> None:
        """Unpacks what travels as .tar.gz. Safe beside other processes: each moves its own file into place."""
        for shard in (s for split in self.manifest["splits"].values() for s in split["shards"]):
            path = join(self.root, shard["file"])
            packed = join(self.root, shard["packed"]) if "packed" in shard else None
            if packed is None or is_url(self.root) or not os.path.exists(packed):
                continue  # a shard that is missing altogether is reported by index() and verify()
            if os.path.exists(path) and os.path.getmtime(path) >= os.path.getmtime(packed):
                continue  # an older one was unpacked from another version of the set
            try:
                self._unpack_one(packed, path, shard)
            except (OSError, EOFError, zlib.error) as error:  # EOFError: the packed file ends early
                raise ShardSetError(
                    f"Cannot unpack {packed}: {error}. The folder must be writable the first time; else copy the shard "
                    "set somewhere writable. If the file is damaged, fetch it again."
                ) from error

    @staticmethod
    def _unpack_one(packed: str, path: str, shard: dict[str, Any]) -> None:
        handle, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".unpack-")
        try:
            with gzip.open(packed, "rb") as source, os.fdopen(handle, "wb") as target:
                left = shard["bytes"] + 1  # a small file may unpack to one without end
                while left and (piece := source.read(min(left, 1 << 20))):
                    left -= target.write(piece)
            if not left or sha256_of(temporary) != shard["sha256"]:
                raise ShardSetError(f"{packed} does not hold the shard that the manifest names. Fetch it again.")
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    def _split(self, split: str) -> dict[str, Any]:
        if split not in self.manifest["splits"]:
            raise ShardSetError(f"{self.root} has no split {split!r}. It has: {', '.join(self.splits)}.")
        return self.manifest["splits"][split]

    def shard_paths(self, split: str) -> list[str]:
        return [join(self.root, shard["file"]) for shard in self._split(split)["shards"]]

    def index(self, split: str) -> SplitIndex:
        """Loads the index of a split. Raises ShardSetError for an unknown split, or shards unlike the manifest."""
        entry = self._split(split)
        sizes = _sizes(join(self.root, split)) if is_url(self.root) else None  # one listing, not a request a shard
        for path, shard in zip(self.shard_paths(split), entry["shards"], strict=True):
            size = size_of(path) if sizes is None else sizes.get(path.rsplit("/", 1)[-1])
            if problem := _size_problem(path, size, shard["bytes"]):
                raise ShardSetError(f"{problem}. Copy or build the set again; `mmref shards verify` says more.")
        index = self._load_index(split)
        ends = np.array([shard["bytes"] for shard in entry["shards"]])
        for what in ("image", "json"):
            start, size = getattr(index, f"{what}_offset"), getattr(index, f"{what}_size")
            inside = (index.shard >= 0) & (index.shard < len(ends))
            if not np.all(inside & (start >= 0) & (size >= 0) & (size <= ends[index.shard * inside] - start)):
                raise ShardSetError(
                    f"{self.root}: the index of {split} points outside its shards. Build the set again."
                )
        if (len(index), index.n_objects) != (entry["images"], entry["objects"]):
            raise ShardSetError(
                f"{self.root}: the index of {split} has {len(index)} images of {index.n_objects} objects, the manifest "
                f"says {entry['images']} of {entry['objects']}. Files of two builds are mixed: build the set again."
            )
        return index

    def _load_index(self, split: str) -> SplitIndex:
        path = join(self.root, split, f"{split}.index.parquet")
        room = sum(shard["bytes"] for shard in self._split(split)["shards"]) // SMALLEST_SAMPLE
        try:
            index = SplitIndex.from_parquet(path, split, self.shard_paths(split), room)
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these two
            raise ShardSetError(f"{path} cannot be read ({error}). Build the shard set again.") from error
        return replace(index, shard_sha256=tuple(shard["sha256"] for shard in self._split(split)["shards"]))

    def train_object_ids(self) -> list[str]:
        """Ids of the training objects by row. Raises ShardSetError when objects.parquet is missing or out of order."""
        path = join(self.root, "objects.parquet")
        try:
            # pq.read_table leaves threads behind that abort a process which ends right after
            table = pq.ParquetFile(io.BytesIO(read_bytes(path))).read(["object_id", "row"], use_threads=False)
            ids, rows = table["object_id"].to_pylist(), table["row"].to_numpy()
        except (OSError, ValueError, KeyError) as error:
            raise ShardSetError(f"{path} cannot be read ({error}). Build the shard set again.") from error
        if not np.array_equal(rows, np.arange(len(rows))):
            raise ShardSetError(f"{path}: rows are not 0, 1, 2, ... Build the shard set again.")
        return ids

    def verify(self, checksums: bool = True) -> list[str]:
        """Every problem found, one line each, starting with its name; an empty list means the set is sound.

        Names: missing_shard, wrong_size, wrong_checksum, broken_tar, wrong_count, wrong_offset, broken_index,
        wrong_objects, split_overlap. `checksums=False` leaves out reading every byte for the sha256.
        """
        problems: list[str] = []
        owners: dict[str, str] = {}
        for split in self.splits:
            try:
                index = self._load_index(split)
            except ShardSetError as error:
                problems.append(f"broken_index: {error}")
                continue
            problems += self._verify_counts(split, index)
            for number, shard in enumerate(self.manifest["splits"][split]["shards"]):
                problems += self._verify_shard(index, number, shard, checksums)
            shared = [i for i in index.object_ids if owners.setdefault(i, split) != split]
            if shared:
                problems.append(f"split_overlap: {len(shared)} objects of {split} are elsewhere too, e.g. {shared[:3]}")
            if split == "train":
                problems += self._verify_objects(index)
        return problems

    def _verify_counts(self, split: str, index: SplitIndex) -> list[str]:
        entry = self.manifest["splits"][split]
        found = {"objects": index.n_objects, "images": len(index), "captions": int(index.n_captions.sum())}
        found["samples in shards"] = sum(shard["samples"] for shard in entry["shards"])
        expected = {**entry, "samples in shards": entry["images"]}
        return [
            f"wrong_count: {split}: {found[name]} {name} found, the manifest says {expected[name]}"
            for name in found
            if found[name] != expected[name]
        ]

    def _verify_objects(self, index: SplitIndex) -> list[str]:
        try:
            same = self.train_object_ids() == index.object_ids
        except ShardSetError as error:
            return [f"wrong_objects: {error}"]
        return [] if same else ["wrong_objects: objects.parquet and the train index list different objects"]

    def _verify_shard(self, index: SplitIndex, number: int, shard: dict[str, Any], checksums: bool) -> list[str]:
        path = index.shard_paths[number]
        problem = _size_problem(path, size_of(path), shard["bytes"])
        problems = [problem] if problem else []
        if problem and problem.startswith("missing_shard"):
            return problems
        if checksums and sha256_of(path) != shard["sha256"]:
            problems.append(f"wrong_checksum: {path}: its sha256 is not the one in the manifest")
        try:
            with tarfile.open(fileobj=io.BytesIO(read_bytes(path)) if is_url(path) else open(path, "rb")) as tar:
                members = {member.name: (member.offset_data, member.size) for member in tar}
        except (tarfile.TarError, EOFError) as error:
            return [*problems, f"broken_tar: {path}: {error}"]
        rows = np.flatnonzero(index.shard == number)
        if len(rows) != shard["samples"] or len(members) != 2 * shard["samples"]:
            problems.append(
                f"wrong_count: {path}: {len(members)} members and {len(rows)} index rows, "
                f"the manifest says {shard['samples']} samples of 2 members"
            )
        wrong = [index.keys[i] for i in rows.tolist() if not _row_matches(index, i, members)]
        if wrong:
            problems.append(f"wrong_offset: {path}: {len(wrong)} index rows miss their members, e.g. {wrong[:3]}")
        return problems


def train_index(config: Config) -> SplitIndex:
    """The training samples of a run: `data.root`'s, and those of `data.mix` after them. Raises ShardSetError."""
    parts, names = [], []
    roots = (config.data.root, *config.data.mix)
    for root in roots:
        shards = ShardSet.open(root)
        if "train" not in shards.splits:
            raise ShardSetError(f"{root} has no train split, only {shards.splits}.")
        parts.append(shards.index("train"))
        names.append(str(shards.manifest.get("name") or folder_name(root)))
    added = names[1:]  # a name that several have says nothing: every set built of a table is called `table`
    prefixes = [folder_name(root) if added.count(name) > 1 else name for root, name in zip(roots[1:], added)]
    if len(set(prefixes)) < len(prefixes):
        raise ShardSetError(
            f"`data.mix` has two sets of one name, {', '.join(prefixes)}, by which their objects are told apart: rename the "
            "folder of one."
        )
    names[1:] = prefixes
    return parts[0] if len(parts) == 1 else SplitIndex.merge(parts, names)


def data_fingerprint(config: Config) -> str:
    """Of the contents of the shard sets that a config trains on: the config itself knows them by their folders' names."""
    roots = [config.data.root, *config.data.mix]
    return " ".join(ShardSet.open(root).fingerprint for root in roots)


def open_reader(config: Config, index: SplitIndex) -> SampleReader:
    """Reader with the node's cache of the config, for sets on object storage."""
    data = config.data
    return SampleReader(index, ShardCache(data.cache_dir, int(data.cache_gb * 1e9)) if data.cache_gb else None)


def _row_matches(index: SplitIndex, i: int, members: dict[str, tuple[int, int]]) -> bool:
    image = members.get(f"{index.keys[i]}.{index.image_ext[i]}")
    meta = members.get(f"{index.keys[i]}.json")
    return image == (index.image_offset[i], index.image_size[i]) and meta == (index.json_offset[i], index.json_size[i])


def _size_problem(path: str, size: int | None, expected: int) -> str | None:
    if size is None:
        return f"missing_shard: {path} does not exist"
    return None if size == expected else f"wrong_size: {path} has {size} bytes, the manifest says {expected}"
