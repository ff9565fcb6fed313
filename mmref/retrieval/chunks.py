"""Images to features, codes and thumbnails, a chunk at a time: by Ray actors that load the model once, or in process.

A finished chunk is a file; after a kill only the missing ones are embedded. An image that ends the process which decodes it
(a decoder's crash, too little memory) costs itself alone, once it has done so twice (see `journal.py` and `workers.py`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmref.data.decode import calm_opencv, decoded, webp
from mmref.data.fit import Fit, Fitted
from mmref.errors import ClusterTooSmallError, SampleError, StorageError
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings
from mmref.retrieval.images import read_image_bytes
from mmref.retrieval.journal import KILLED, Journal, Watch
from mmref.storage.disk import sync_files
from mmref.storage.fetch import unsigned
from mmref.storage.parquet import read_parquet
from mmref.storage.secrets import told
from mmref.terminal.progress import Counter, say

THUMBNAIL_PX, THUMBNAIL_QUALITY = 256, 80
SMALLEST_CHUNK, LARGEST_CHUNK, CHUNKS = 32, 512, 200
READ_THREADS = 4
LISTING, JOURNAL = "listing.parquet", "decoding"
PLACE = ("path", "offset", "length", "file_stamp")
IDENTITY = ("id", *PLACE)
Arrays = dict[str, NDArray[Any]]
Location = tuple[str, int, int]  # path, offset, length


def chunk_size(images: int) -> int:
    """Images of a chunk: about CHUNKS chunks, so that a kill costs little and files stay few."""
    return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, images // CHUNKS))


def thumbnail(rgb: NDArray[np.uint8]) -> bytes:
    """WebP of an image (H, W, 3) whose longer side is at most THUMBNAIL_PX."""
    return webp(rgb, THUMBNAIL_PX, THUMBNAIL_QUALITY)


def code_arrays(space: ReferenceSpace | None, refinement: RefinementSettings, features: NDArray[np.float32]) -> Arrays:
    """Sparse codes as `near` (n, r) int32 object rows and `weights` (n, r) float32; {} where there are none to store.

    Codes of other kinds follow from the features: a search computes those of its candidates.
    """
    if space is None or refinement.kind != "sparse":
        return {}
    codes: Any = space.encode(features, refinement)
    r = codes.indices.size // max(len(features), 1)
    return {
        "near": codes.indices.reshape(-1, r).astype(np.int32),
        "weights": codes.data.reshape(-1, r).astype(np.float32),
    }


def embed_chunk(model: Any, locations: list[Location], watch: Watch) -> Arrays:
    """Arrays of the readable images of a chunk: `position` in it, `features`, `size` (n, 2) height and width, codes, `sha256`
    (n, 32) of their bytes, `thumbnails` (bytes end to end) with `thumbnail_bytes` (n,), and `problems` (JSON: position -> what
    is wrong)."""
    fit = Fit.of(model.config.data)

    def one(position: int) -> tuple[NDArray[np.uint8], tuple[int, int], bytes, bytes] | str:
        if position in watch.passed_over:
            return KILLED
        path = told(locations[position][0])
        try:
            data = read_image_bytes(*locations[position])
            with watch.decoding(position), decoded(data, path) as rgb:
                return fit(rgb), (rgb.shape[0], rgb.shape[1]), thumbnail(rgb), hashlib.sha256(data).digest()
        except StorageError:  # says nothing of the image
            raise
        except SampleError as error:
            return str(error)
        except Exception as error:  # whatever a decoder raises costs this image alone
            return f"{path}: {type(error).__name__}: {error}"

    done = {position: one(position) for position in watch.suspects}
    rest = [position for position in range(len(locations)) if position not in done]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        done |= zip(rest, pool.map(one, rest))
    good = [(i, d) for i, d in sorted(done.items()) if not isinstance(d, str)]
    features = model.encode_images([Fitted(d[0]) for _, d in good])
    return {
        "position": np.array([i for i, _ in good], np.int64),
        "features": features,
        "size": np.array([d[1] for _, d in good], np.int32).reshape(-1, 2),
        "sha256": np.frombuffer(b"".join(d[3] for _, d in good), np.uint8).reshape(-1, 32),
        "thumbnails": np.frombuffer(b"".join(d[2] for _, d in good), np.uint8),
        "thumbnail_bytes": np.array([len(d[2]) for _, d in good], np.int64),
        "problems": np.frombuffer(json.dumps({i: d for i, d in sorted(done.items()) if isinstance(d, str)}).encode(), np.uint8),
        **(code_arrays(model.space, model.refinement, features) if good else {}),
    }


class ImageEmbedder:
    """Embeds chunks; the model is loaded once. The node's cores are shared by `processes` of its kind; None: in this process.

    device: as of `chosen_device`.
    """

    def __init__(self, model: str, device: str, processes: int | None = None) -> None:
        import torch

        from mmref.cluster.resources import torch_threads, use_threads
        from mmref.export.model import load
        from mmref.model.device import chosen_device

        if processes is None:
            use_threads()
        else:
            calm_opencv()
            torch.set_num_threads(torch_threads("auto", processes))
        self.model = load(model, chosen_device(device))

    def embed(self, locations: list[Location], watch: Watch) -> bytes:
        """The chunk's arrays in NumPy's archive format. Raises StorageError."""
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **embed_chunk(self.model, locations, watch))
        return file.getvalue()

    def look_at(self, location: Location) -> None:
        """Decode an image, and do nothing with it: whether the process outlives that is what is to be known."""
        with contextlib.suppress(Exception), decoded(read_image_bytes(*location), location[0]) as rgb:
            thumbnail(rgb)


class Chunks:
    """The chunks of a listing in a work folder: `chunks/<number>.npz`, written under a temporary name first, beside the items
    they were made of. Finished ones of an interrupted call are taken over, and their items come first: all of a chunk that
    are still listed, unchanged."""

    def __init__(self, work: Path, items: pa.Table) -> None:
        self.items, self.size, self.folder = items, chunk_size(len(items)), work / "chunks"
        row_of = {identity: row for row, identity in enumerate(_identities(items))}
        rows: list[int | None] = []  # of the items, as an interrupted call had them; None: not listed any more
        if (self.folder / LISTING).exists():
            before = read_parquet(self.folder / LISTING)
            self.size = int(before.schema.metadata[b"chunk_size"])
            rows = [row_of.get(identity) for identity in _identities(before)]
        if rows and len(rows) == len(items) and None not in rows:
            self.items = items.take(pa.array(rows, pa.int64()))
        else:
            self._begin(rows)
        self.count = -(-len(items) // self.size)

    def _begin(self, rows: list[int | None]) -> None:
        """Make the folder of the listing as it is now, with the chunks of the one before that still hold."""
        fresh, done = self.folder.with_name(f"{self.folder.name}.new"), list[int]()
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for start in range(0, len(rows) - self.size + 1, self.size):
            file, chosen = self.path(start // self.size), rows[start : start + self.size]
            if file.exists() and None not in chosen:
                os.rename(file, fresh / self.path(len(done) // self.size).name)
                done += [row for row in chosen if row is not None]
        rest = sorted(set(range(len(self.items))) - set(done))
        self.items = self.items.take(pa.array([*done, *rest], pa.int64()))
        listing = self.items.select(list(IDENTITY)).replace_schema_metadata({"chunk_size": str(self.size)})
        pq.write_table(listing, fresh / LISTING)
        sync_files(fresh)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.rename(fresh, self.folder)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def pending(self) -> list[int]:
        """Numbers of chunks that are not finished."""
        return [n for n in range(self.count) if not self.path(n).exists()]

    def rows(self, number: int) -> pa.Table:
        return self.items.slice(number * self.size, self.size)

    def locations(self, number: int) -> list[Location]:
        rows = self.rows(number)
        return list(zip(rows["path"].to_pylist(), rows["offset"].to_pylist(), rows["length"].to_pylist()))

    def identities(self, number: int) -> list[str]:
        """What tells its images from others, a line of text each."""
        return [identity(row) for row in self.rows(number).select(list(PLACE)).to_pylist()]

    def write(self, number: int, data: bytes) -> None:
        temporary = self.folder / f".{number:06d}.tmp"
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path(number))

    def read(self) -> Iterator[tuple[pa.Table, Arrays]]:
        """(rows of the listing, arrays) of every chunk in order."""
        for number in range(self.count):
            with np.load(self.path(number), allow_pickle=False) as arrays:
                yield self.rows(number), dict(arrays)


def _identities(items: pa.Table) -> list[tuple[Any, ...]]:
    """What tells whether an item is the one that was embedded."""
    return list(zip(*(items[name].to_pylist() for name in IDENTITY)))


def identity(row: Mapping[str, Any]) -> str:
    """Where an image lies and what changes with it, of a row of a listing: a changed one is another, and is tried again. Of a URL
    `skipped.jsonl` tells no keys."""
    return json.dumps([unsigned(row[name]) if name == "path" else row[name] for name in PLACE])


def embed(chunks: Chunks, model: Path, workers: int, killers: Collection[str] = (), device: str = "auto") -> None:
    """Embed the chunks that are not finished, by `workers` Ray actors; 0: here.

    Args:
        device: auto, cpu or cuda; auto: each on a GPU where the cluster, or this machine, has any.
        killers: identities of images that ended processes before: they are not decoded.

    Raises:
        StorageError: it does not answer. WorkerDiedError: workers die whatever they are given.
    """
    pending = chunks.pending()
    if not pending:
        return
    done = len(chunks.items) - sum(len(chunks.rows(n)) for n in pending)
    with Counter("embedding", len(chunks.items), "image", done) as progress:
        for number, data in _embedded(chunks, pending, str(model), workers, killers, device):
            chunks.write(number, data)
            progress.add(len(chunks.rows(number)))


def _embedded(
    chunks: Chunks, pending: list[int], model: str, workers: int, killers: Collection[str], device: str
) -> Iterator[tuple[int, bytes]]:
    if workers == 0:
        from mmref.model.device import described

        embedder = ImageEmbedder(model, device)
        say(f"embedding on {described(embedder.model.device)}, in this process")
        with Journal(chunks.folder.with_name(JOURNAL), killers) as journal:
            for number in pending:
                yield number, embedder.embed(chunks.locations(number), journal.watch(chunks.identities(number)))
                journal.forget()  # the chunk is on the disk
        return
    from mmref.cluster.connection import connect
    from mmref.cluster.resources import has_gpu
    from mmref.retrieval.workers import Job, Workers

    with connect(workers):
        gpu = device != "cpu" and has_gpu()
        if device == "cuda" and not gpu:
            raise ClusterTooSmallError("the cluster has no GPU to embed on: leave `--device cuda` out, or add a node with one.")
        jobs = [
            Job(n, chunks.locations(n), [i for i, what in enumerate(chunks.identities(n)) if what in killers]) for n in pending
        ]
        count = min(workers, len(jobs))
        say(f"embedding on {'GPUs' if gpu else 'CPUs'}, workers: {count}")
        make = functools.partial(ImageEmbedder, model, "cuda" if gpu else "cpu", count)
        yield from Workers(make, gpu, count).answers(jobs)
