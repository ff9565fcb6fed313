"""manifest.json of a shard set, read as somebody else may have written it: it names files, and they stay inside the set.

The exception are tars that a set has not written but indexed where they lie. Such a shard has `in_place`, and its `file` is a
whole path or URL of a tar:

    stamp       size and time of the tar, or its tag on a storage, as `mmref.storage.tars.tar_stamp` gives it
    headers     hash of the headers of its members
    json        the file of the set that holds the json of each of its samples
    json_bytes, json_sha256

Its `sha256` is that of what the split takes from it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from mmref.errors import ShardSetError
from mmref.storage.locations import below, endless, is_url, join, read_bytes

VERSION = 1
BUNDLED = "data_shards/emoji"
AGAIN = "Build the shard set again."
SHARD_FIELDS: dict[str, type] = {"file": str, "samples": int, "bytes": int, "sha256": str}
IN_PLACE_FIELDS: dict[str, type] = {"stamp": str, "headers": str, "json": str, "json_bytes": int, "json_sha256": str}
OF_ANYTHING = ("table", "dataset", "folder")  # sources whose name, as that of a set, tells it from no other
COUNTS = ("objects", "images", "captions")
STORAGES = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs")  # URLs of tars that are indexed in place


def read_manifest(root: str) -> dict[str, Any]:
    """The manifest of the set in a folder or behind a URL.

    Raises:
        ShardSetError: the set is missing, incomplete or of an unknown version; or its manifest is no manifest, or names
            files that lie elsewhere.
    """
    path = join(root, "manifest.json")
    if not is_url(path) and (why := endless(path)):
        raise ShardSetError(f"{why}. Copy the shard set again.")
    try:
        manifest = json.loads(read_bytes(path))
    except (PermissionError, IsADirectoryError) as error:
        raise ShardSetError(f"{path} cannot be read: {error}.") from error
    except OSError as error:
        raise ShardSetError(
            f"No complete shard set in {root}: manifest.json is missing, so its build did not finish or the path "
            f"is wrong. {_how_to_get_it(root)}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ShardSetError(f"{path} is not JSON ({error}). {AGAIN}") from error
    if not isinstance(manifest, dict):
        found = type(manifest).__name__
        raise ShardSetError(f"{path} is not JSON of a manifest (expected an object, found {found}). {AGAIN}")
    if manifest.get("version") != VERSION:
        raise ShardSetError(
            f"{path} has version {manifest.get('version')!r}, this program reads version {VERSION}. "
            "Build the shard set again, or use the program version that wrote it."
        )
    if not isinstance(manifest.get("splits"), dict) or not manifest["splits"]:
        raise ShardSetError(f"{path} names no splits. {AGAIN}")
    for split, entry in manifest["splits"].items():
        if problem := _problem(root, split, entry):
            raise ShardSetError(f"{path}, split {split!r}: {problem}. {AGAIN}")
    return manifest


def tar_of(root: str, shard: dict[str, Any]) -> str:
    """Path or URL of the tar that a manifest's entry names."""
    return str(shard["file"]) if "in_place" in shard else join(root, shard["file"])


def json_of(root: str, shard: dict[str, Any]) -> str:
    """Path or URL of the file with the json of a tar that was indexed in place; "" where it lies in the tar."""
    return join(root, shard["in_place"]["json"]) if "in_place" in shard else ""


def outside(place: str) -> str:
    """Why a manifest may not name this place as that of a tar outside of its set; "" where it may.

    Whoever wrote it may want another file of this machine read: it must be called a tar, and whoever opens it holds size and
    time of it against the manifest.
    """
    if not place.partition("?")[0].endswith(".tar"):
        return f"{place!r:.200} is not called a tar"
    if is_url(place):
        scheme = place.partition("://")[0].lower()
        return "" if scheme in STORAGES and "::" not in place else f"tars are not read from {scheme}:// ({place!r:.200})"
    if not os.path.isabs(place) or os.path.normpath(place) != place or "\0" in place:
        return f"{place!r:.200} is no whole path"
    return endless(place)


def _how_to_get_it(root: str) -> str:
    if root.endswith(BUNDLED):  # as configs of ours name it, which a wheel has, and the set it has not
        return (
            "The emoji come with a checkout of mmref. Without one, build them from their packages: `pip install "
            f"'mmref[emoji]'`, then `mmref shards build emoji --out {BUNDLED}`; or name a set of yours with `--data.root`."
        )
    return "Build one with `mmref shards build SOURCE --out DIR`."


def _problem(root: str, split: str, entry: Any) -> str:
    """What is wrong with the entry of a split; "" where nothing is."""
    if "/" in split:
        return "it names no folder of the set"
    if not isinstance(entry, dict) or not isinstance(entry.get("shards"), list):
        return "it has no list of shards"
    if wrong := [name for name in COUNTS if not _is_count(entry.get(name))]:
        return f"its number of {wrong[0]} is {entry.get(wrong[0])!r:.100}"
    try:
        below(root, "objects.parquet")
        below(root, f"{split}/{split}.index.parquet")
        for shard in entry["shards"]:
            if not isinstance(shard, dict):
                return f"a shard is {shard!r:.100}"
            for name, kind in SHARD_FIELDS.items():
                if not (_is_count(shard.get(name)) if kind is int else isinstance(shard.get(name), str)):
                    return f"`{name}` of a shard is {shard.get(name)!r:.100}"
            if "in_place" in shard:
                if problem := _problem_in_place(root, shard):
                    return problem
                continue
            below(root, shard["file"])
            if "packed" in shard:
                below(root, shard["packed"])
    except ValueError as error:
        return str(error)
    return ""


def _problem_in_place(root: str, shard: dict[str, Any]) -> str:
    found = shard["in_place"]
    if not isinstance(found, dict) or "packed" in shard:
        return f"`in_place` of a shard is {found!r:.100}"
    for name, kind in IN_PLACE_FIELDS.items():
        if not (_is_count(found.get(name)) if kind is int else isinstance(found.get(name), str)):
            return f"`in_place.{name}` of a shard is {found.get(name)!r:.100}"
    below(root, found["json"])
    return outside(shard["file"])


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
