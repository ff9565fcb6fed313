"""Shard sets: WebDataset tars with an index of byte offsets, so that any sample can be read alone.

Layout (written by `mmref/shards/build.py`): `manifest.json` last, so a set with a manifest is complete;
`objects.parquet` (train objects and their rows); per split the tars and `<split>.index.parquet`, one row per image, an
object's images side by side. A set may travel packed (`.tar.gz` for every tar): `ShardSet.open` unpacks it once. A set that
`mmref/shards/in_place.py` wrote has no tars of its own: its manifest names them where they lie.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmref.data.columns import Strings, texts
from mmref.data.manifest import OF_ANYTHING, json_of, read_manifest, tar_of
from mmref.data.sample_reader import Ends, SampleReader, SplitIndex
from mmref.data.shard_checks import check_shards, packed_problems, unpacked, verify_shard
from mmref.errors import NeighborsError, ShardSetError
from mmref.randomness import RandomStream, draw
from mmref.storage.cache import ShardCache
from mmref.storage.locations import absolute, cache_folder, folder_name, is_url, join, read_bytes, sha256_of
from mmref.storage.parquet import read_parquet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmref.config import Config


LONGEST_NAME = 100  # characters of a set's name that are taken into names of files


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
    def name(self) -> str:
        """What the set is called where it stands beside others, and in names of files: as its manifest says, or as its folder
        where that is the name of many sets, or could not be that of a file."""
        given = self.manifest.get("name")
        if not isinstance(given, str) or not given.strip() or given in OF_ANYTHING:
            return folder_name(self.root)
        return folder_name(self.root) if set(given) & {"/", "\0"} or len(given) > LONGEST_NAME else given

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
            if _is_unpacked(path, packed, shard):
                continue
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
            with os.fdopen(handle, "wb") as target, open(packed, "rb") as source:
                target.writelines(unpacked(source, shard["bytes"]))
            if sha256_of(temporary) != shard["sha256"]:
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
        return [tar_of(self.root, shard) for shard in self._split(split)["shards"]]

    def index(self, split: str) -> SplitIndex:
        """Loads the index of a split. Raises ShardSetError for an unknown split, or shards unlike the manifest."""
        entry = self._split(split)
        check_shards(self.root, split, entry["shards"])
        index = self._load_index(split)
        if (len(index), index.n_objects) != (entry["images"], entry["objects"]):
            raise ShardSetError(
                f"{self.root}: the index of {split} has {len(index)} images of {index.n_objects} objects, the manifest "
                f"says {entry['images']} of {entry['objects']}. Files of two builds are mixed: build the set again."
            )
        return index

    def _load_index(self, split: str) -> SplitIndex:
        path, shards = join(self.root, split, f"{split}.index.parquet"), self._split(split)["shards"]
        try:
            index = load_index(self.root, split, shards)
        except (OSError, ValueError) as error:  # pyarrow's errors derive from these two
            raise ShardSetError(f"{path} cannot be read ({error}). Build the shard set again.") from error
        return replace(index, shard_sha256=tuple(shard["sha256"] for shard in shards))

    def train_object_ids(self) -> Sequence[str]:
        """Ids of the training objects by row. Raises ShardSetError when objects.parquet is missing or out of order."""
        path = join(self.root, "objects.parquet")
        try:
            table = read_parquet(io.BytesIO(read_bytes(path)), ["object_id", "row"])
            ids, rows = Strings(texts(table["object_id"])), table["row"].to_numpy()
        except (OSError, ValueError, KeyError) as error:
            raise ShardSetError(f"{path} cannot be read ({error}). Build the shard set again.") from error
        if not np.array_equal(rows, np.arange(len(rows))):
            raise ShardSetError(f"{path}: rows are not 0, 1, 2, ... Build the shard set again.")
        return ids

    def verify(self, checksums: bool = True) -> list[str]:
        """Every problem found, one line each, starting with its name; an empty list means the set is sound.

        Names: missing_shard, wrong_size, changed_tar, wrong_checksum, broken_tar, wrong_count, wrong_offset, wrong_row,
        broken_index, wrong_objects, split_overlap. `checksums=False` leaves out reading every byte for the sha256, and with it
        what travels packed and what each sample says of itself. Images in tars that were indexed in place have no sha256: of
        them size, time and headers are compared.
        """
        shards = [shard for split in self.manifest["splits"].values() for shard in split["shards"]]
        problems = packed_problems(self.root, shards, checksums)
        owners: dict[str, str] = {}
        for split in self.splits:
            try:
                index = self._load_index(split)
            except ShardSetError as error:
                problems.append(f"broken_index: {error}")
                continue
            problems += self._verify_counts(split, index)
            for number, shard in enumerate(self.manifest["splits"][split]["shards"]):
                problems += verify_shard(self.root, index, number, shard, checksums)
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


def load_index(root: str, split: str, shards: list[dict[str, Any]]) -> SplitIndex:
    """The index of a split whose manifest has these shards; the manifest need not be on the disk yet. Raises ShardSetError, and
    OSError or ValueError for a file that is no index."""
    in_place = [shard.get("in_place") for shard in shards]
    image_ends = [shard["bytes"] for shard in shards]
    json_ends = [found["json_bytes"] if found else size for found, size in zip(in_place, image_ends)]
    outside: dict[str, tuple[str, ...]] = {}
    if any(in_place):
        outside["json_paths"] = tuple(json_of(root, shard) for shard in shards)
        outside["stamps"] = tuple(found["stamp"] if found else "" for found in in_place)
    return SplitIndex.from_parquet(
        join(root, split, f"{split}.index.parquet"),
        split,
        [tar_of(root, shard) for shard in shards],
        Ends(np.array(image_ends, np.int64), np.array(json_ends, np.int64)),
        **outside,
    )


def train_index(config: Config) -> SplitIndex:
    """The training samples of a run: `data.root`'s, and those of `data.mix` after them, or the part of both that
    `data.max_objects` and `data.max_images` leave. Raises ShardSetError."""
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
    return drawn_part(parts[0] if len(parts) == 1 else SplitIndex.merge(parts, names), config)


def drawn_part(index: SplitIndex, config: Config) -> SplitIndex:
    """`data.max_objects` objects of an index, with `data.max_images` images of each; itself where neither says anything.

    With one seed more objects or images are those of fewer and others beside them, so that a curve over their number compares
    like with like. Raises ShardSetError where there are not as many objects.
    """
    wanted, most, seed = config.data.max_objects, config.data.max_images, config.train.seed
    if not wanted and not most:
        return index
    if wanted > index.n_objects:
        raise ShardSetError(
            f"`data.max_objects` is {wanted:,}, but there are {index.n_objects:,} objects of training: give at most as many, or "
            "0 for all."
        )
    objects = np.arange(index.n_objects)
    if wanted:
        by_draw = np.argsort(draw(RandomStream.CHOSEN_OBJECTS, seed, 0, objects), kind="stable")
        objects = np.sort(by_draw[:wanted])
    images = np.flatnonzero(np.isin(index.object_row, objects))
    if most:
        of = index.object_row[images]
        by_draw = np.lexsort((draw(RandomStream.CHOSEN_IMAGES, seed, 0, images), of))
        place = np.arange(len(images)) - np.searchsorted(of, of)  # among the images of its object, in the order of the draws
        images = np.sort(images[by_draw][place < most])
    return index.part(objects, images)


def _is_unpacked(path: str, packed: str, shard: dict[str, Any]) -> bool:
    """Whether a shard is there that the manifest names: an older one may have been unpacked from another version of the set, or
    copied without its time."""
    if not os.path.exists(path) or os.path.getsize(path) != shard["bytes"]:
        return False
    if os.path.getmtime(path) >= os.path.getmtime(packed):
        return True
    if sha256_of(path) != shard["sha256"]:
        return False
    with contextlib.suppress(OSError):  # may not be written: it is looked at each time
        os.utime(path)
    return True


def data_fingerprint(config: Config) -> str:
    """Of the contents of the shard sets that a config trains on, and of its file of neighbors where there is one: the config
    itself knows them by their names."""
    roots = [config.data.root, *config.data.mix]
    found = [ShardSet.open(root).fingerprint for root in roots]
    if config.data.neighbors:
        try:
            found.append(f"neighbors:{sha256_of(config.data.neighbors)[:12]}")
        except OSError as error:
            raise NeighborsError(f"`data.neighbors`: {config.data.neighbors} cannot be read: {error}.") from None
    return " ".join(found)


def open_reader(config: Config, index: SplitIndex) -> SampleReader:
    """Reader with the node's cache of the config, for sets on object storage."""
    data = config.data
    folder = data.cache_dir or cache_folder("shards")
    return SampleReader(index, ShardCache(folder, int(data.cache_gb * 1e9)) if data.cache_gb else None)
