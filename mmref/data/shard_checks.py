"""Whether the shards of a set are those of its manifest: quickly when a set is opened, completely by `mmref shards verify`.

A set of ten thousand shards takes minutes to look at on mounted storage, and every reader of every start would. So what was
found is remembered on the node, together with what the manifest said.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mmref.data.manifest import json_of, tar_of
from mmref.data.sample_reader import SplitIndex, changed_in_place
from mmref.errors import ShardSetError, SourceError
from mmref.storage.fetch import is_web
from mmref.storage.locations import (
    UNTOLD,
    cache_folder,
    file_system,
    is_url,
    join,
    opened,
    read_bytes,
    sha256_of,
    size_of,
    size_told,
    to_text,
)
from mmref.storage.retries import retry
from mmref.storage.secrets import said, told
from mmref.storage.tars import Tar, tar_stamp
from mmref.storage.whole_folder import write_whole

MANY = 64  # shards of a split; fewer are looked at each time
THREADS = 16  # that wait for storage
NAMED_FOLDERS = 3

log = logging.getLogger("mmref")


def check_shards(root: str, split: str, shards: list[dict[str, Any]]) -> None:
    """Hold the shards of a split, entries of a manifest, against what lies there. Raises ShardSetError for the first that is
    missing or another one.

    Where tars lie outside of the set, that is said when a set is first opened on a node.
    """
    known = _is_remembered(root, split, shards)
    if known and len(shards) > MANY:
        return
    if problem := next(_problems(root, shards), None):
        raise ShardSetError(f"{problem}. Copy or build the set again; `mmref shards verify` says more.")
    outside = [tar_of(root, shard) for shard in shards if "in_place" in shard]
    if outside and not known:
        folders = sorted({os.path.dirname(told(place)) for place in outside})
        more = f" and {len(folders) - NAMED_FOLDERS} more" if len(folders) > NAMED_FOLDERS else ""
        named = ", ".join(folders[:NAMED_FOLDERS])
        log.warning("%s: the images of %s lie outside of it, in %d tars below %s%s", root, split, len(outside), named, more)
    if outside or len(shards) > MANY:
        remember(root, split, shards)


def remember(root: str, split: str, shards: list[dict[str, Any]]) -> None:
    """Keep on this node that the shards of a split are what the manifest names."""
    memory = _memory(root, split)
    with contextlib.suppress(OSError):  # then they are looked at again
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memory, _said(shards))


def _is_remembered(root: str, split: str, shards: list[dict[str, Any]]) -> bool:
    try:
        return _memory(root, split).read_text("utf-8") == _said(shards)
    except (OSError, ValueError):
        return False


def _memory(root: str, split: str) -> Path:
    return Path(cache_folder("checked")) / hashlib.sha256(f"{root}\0{split}".encode()).hexdigest()[:32]


def _said(shards: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(shards, sort_keys=True).encode()).hexdigest()


def _problems(root: str, shards: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with shards, one line for each that is missing or another one."""
    own = {tar_of(root, shard): shard["bytes"] for shard in shards if "in_place" not in shard}
    own |= {json_of(root, shard): shard["in_place"]["json_bytes"] for shard in shards if "in_place" in shard}
    # Not a request a shard, but of web servers, whose lists of files are pages for people.
    sizes = _listed({os.path.dirname(path) for path in own}) if is_url(root) and not is_web(root) else None
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(size_of, own) if sizes is None else map(sizes.get, own)
        yield from (problem for path, size in zip(own, found) if (problem := size_problem(path, size, own[path])))
        yield from filter(None, pool.map(_stamp_problem, [shard for shard in shards if "in_place" in shard]))


def _listed(folders: set[str]) -> dict[str, int]:
    """Bytes of the files in folders of object storage, by URL."""
    sizes: dict[str, int] = {}
    for folder in folders:
        fs, inner = file_system(folder)
        found = retry(f"list {folder}", functools.partial(fs.find, inner, detail=True))
        sizes |= {f"{folder}/{name.rsplit('/', 1)[-1]}": size_told(entry["size"]) for name, entry in found.items()}
    return sizes


def size_problem(path: str, size: int | None, expected: int) -> str | None:
    """What is wrong with the size of a file of a set, None where nothing is."""
    if size is None:
        return f"missing_shard: {told(path)} does not exist"
    return None if size in (expected, UNTOLD) else f"wrong_size: {told(path)} has {size} bytes, the manifest says {expected}"


def _stamp_problem(shard: dict[str, Any]) -> str | None:
    """The same of a tar that was indexed in place."""
    path, expected = shard["file"], shard["in_place"]["stamp"]
    try:
        found = tar_stamp(path)
    except FileNotFoundError:
        return f"missing_shard: {told(path)} does not exist"
    except OSError as error:
        return f"missing_shard: {told(path)} cannot be read: {said(error)}"
    return None if found == expected else f"changed_tar: {str(changed_in_place(path, found, expected)).rstrip('.')}"


def unpacked(file: Any, most: int) -> Iterator[bytes]:
    """What an open .tar.gz holds, in pieces: at most one byte more than `most`, since a small file may unpack to one without end.

    Raises:
        OSError, EOFError or zlib.error: it is damaged or ends early.
    """
    left = most + 1
    with gzip.open(file, "rb") as source:
        while left and (piece := source.read(min(left, 1 << 20))):
            left -= len(piece)
            yield piece


def packed_problems(root: str, shards: list[dict[str, Any]], checksums: bool) -> list[str]:
    """What is wrong with the .tar.gz of a set, by name as `ShardSet.verify` lists them: one is missing, or unpacks to another
    shard. A set from which all were removed is whole without them.

    Args:
        checksums: unpack each and compare; else only whether it is there.
    """
    packed = {join(root, shard["packed"]): shard for shard in shards if "packed" in shard}
    there = {path for path in packed if size_of(path) is not None}
    problems = [f"missing_shard: {told(path)} does not exist" for path in packed if there and path not in there]
    return problems + [found for path in packed if checksums and path in there and (found := _packed_problem(path, packed[path]))]


def _packed_problem(path: str, shard: dict[str, Any]) -> str | None:
    digest = hashlib.sha256()
    try:
        with opened(path) as file:
            for piece in unpacked(file, shard["bytes"]):
                digest.update(piece)
    except (OSError, EOFError, zlib.error) as error:  # no retries: gzip's own errors look like those of a storage
        return f"wrong_checksum: {told(path)} cannot be unpacked: {said(error)}"
    same = digest.hexdigest() == shard["sha256"]
    return None if same else f"wrong_checksum: {told(path)} does not hold the shard that the manifest names"


def verify_shard(root: str, index: SplitIndex, number: int, shard: dict[str, Any], checksums: bool) -> list[str]:
    """Every problem of one shard of a split, by name as `ShardSet.verify` lists them."""
    path, in_place = index.shard_paths[number], "in_place" in shard
    name = told(path)
    problem = _stamp_problem(shard) if in_place else size_problem(path, size_of(path), shard["bytes"])
    problems = [problem] if problem else []
    if problem and problem.startswith("missing_shard"):
        return problems
    if in_place:
        problems += _json_problems(root, shard, checksums)
    elif checksums and sha256_of(path) != shard["sha256"]:
        problems.append(f"wrong_checksum: {name}: its sha256 is not the one in the manifest")
    try:
        members, headers = _members_in_place(path) if in_place else (_members(path), "")
    except (tarfile.TarError, EOFError, SourceError) as error:
        return [*problems, f"broken_tar: {name}: {error}"]
    if in_place and headers != shard["in_place"]["headers"]:
        problems.append(f"wrong_checksum: {name}: its members are not those that were indexed")
    rows = np.flatnonzero(index.shard == number)
    if len(rows) != shard["samples"] or (not in_place and len(members) != 2 * shard["samples"]):
        problems.append(
            f"wrong_count: {name}: {len(members)} members and {len(rows)} index rows, "
            f"the manifest says {shard['samples']} samples"
        )
    wrong = [index.keys[i] for i in rows.tolist() if not _row_matches(index, i, members, in_place)]
    if wrong:
        problems.append(f"wrong_offset: {name}: {len(wrong)} index rows miss their members, e.g. {wrong[:3]}")
    if checksums and not problems:  # else the bytes that an index row would be held against are others
        problems += _row_problems(index, number, rows)
    return problems


def _row_problems(index: SplitIndex, number: int, rows: NDArray[np.int64]) -> list[str]:
    """What index rows say of their samples, held against the json of these, of which the manifest has a checksum."""
    ordered = rows[np.argsort(index.json_offset[rows], kind="stable")].tolist()
    place = index.json_path(number)

    def unlike() -> list[str]:
        with _whole_file(place) as file:
            return [index.keys[i] for i in ordered if not _says(index, i, file)]

    wrong = retry(f"read {told(place)}", unlike)
    if not wrong:
        return []
    name = told(index.shard_paths[number])
    return [f"wrong_row: {name}: {len(wrong)} index rows say another object, image or number of captions, e.g. {wrong[:3]}"]


def _says(index: SplitIndex, i: int, file: BinaryIO) -> bool:
    """Whether the json of a sample, in an open file, says what its index row does."""
    file.seek(int(index.json_offset[i]))
    data = file.read(int(index.json_size[i]))
    try:
        meta = json.loads(data)
        found = meta["object_id"], meta["image_id"], len(meta["captions"])
    except (ValueError, RecursionError, TypeError, KeyError):
        return False
    return found == (index.object_ids[index.object_row[i]], index.image_ids[i], index.n_captions[i])


def _whole_file(path: str) -> BinaryIO:
    """A file to look about in: of a URL all of it, since a server may give no parts."""
    return io.BytesIO(read_bytes(path)) if is_url(path) else open(path, "rb")


def _json_problems(root: str, shard: dict[str, Any], checksums: bool) -> list[str]:
    path, expected = json_of(root, shard), shard["in_place"]
    if problem := size_problem(path, size_of(path), expected["json_bytes"]):
        return [problem]
    if checksums and sha256_of(path) != expected["json_sha256"]:
        return [f"wrong_checksum: {told(path)}: its sha256 is not the one in the manifest"]
    return []


def _members(path: str) -> dict[str, tuple[int, int]]:
    with _whole_file(path) as file, tarfile.open(fileobj=file) as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def _members_in_place(path: str) -> tuple[dict[str, tuple[int, int]], str]:
    """Members of a tar that somebody else wrote, the first of each name, and the hash of their headers."""
    found: dict[str, tuple[int, int]] = {}
    with Tar(path) as tar:
        for member in tar.members():
            found.setdefault(to_text(member.name), (member.offset, member.size))
        return found, tar.headers


def _row_matches(index: SplitIndex, i: int, members: dict[str, tuple[int, int]], in_place: bool) -> bool:
    image = members.get(f"{index.keys[i]}.{index.image_ext[i]}") == (index.image_offset[i], index.image_size[i])
    return image and (in_place or members.get(f"{index.keys[i]}.json") == (index.json_offset[i], index.json_size[i]))
