"""Images to features, codes and thumbnails, a chunk at a time: by Ray actors that load the model once, or in process.

A finished chunk is a file; after a kill only the missing ones are embedded.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmref.data.decode import decode_rgb, resize_rgb
from mmref.errors import SampleError, StorageError
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings
from mmref.retrieval.images import read_image_bytes
from mmref.storage import sync_files

THUMBNAIL_PX, THUMBNAIL_QUALITY = 256, 80
SMALLEST_CHUNK, LARGEST_CHUNK, CHUNKS = 32, 512, 200
READ_THREADS = 4
LISTING = "listing.parquet"
IDENTITY = ("id", "path", "offset", "length", "file_stamp")
Arrays = dict[str, NDArray[Any]]
Location = tuple[str, int, int]  # path, offset, length


def chunk_size(images: int) -> int:
    """Images of a chunk: about CHUNKS chunks, so that a kill costs little and files stay few."""
    return max(SMALLEST_CHUNK, min(LARGEST_CHUNK, images // CHUNKS))


def thumbnail(rgb: NDArray[np.uint8]) -> bytes:
    """WebP of an image (H, W, 3) whose longer side is at most THUMBNAIL_PX."""
    height, width = rgb.shape[:2]
    scale = min(1.0, THUMBNAIL_PX / max(height, width))
    small = resize_rgb(rgb, max(1, round(height * scale)), max(1, round(width * scale)))
    _, data = cv2.imencode(
        ".webp", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_WEBP_QUALITY, THUMBNAIL_QUALITY]
    )
    return data.tobytes()


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


def embed_chunk(model: Any, locations: list[Location]) -> Arrays:
    """Arrays of the readable images of a chunk: `position` in it, `features`, `size` (n, 2) height and width, codes,
    `thumbnails` (bytes end to end) with `thumbnail_bytes` (n,), and `problems` (JSON: position -> what is wrong)."""
    height, width = model.config.data.image_height, model.config.data.image_width

    def one(location: Location) -> tuple[NDArray[np.uint8], tuple[int, int], bytes] | str:
        try:
            rgb = decode_rgb(read_image_bytes(*location), location[0])
            return resize_rgb(rgb, height, width), (rgb.shape[0], rgb.shape[1]), thumbnail(rgb)
        except StorageError:  # says nothing of the image
            raise
        except SampleError as error:
            return str(error)
        except Exception as error:  # whatever a decoder raises costs this image alone
            return f"{location[0]}: {type(error).__name__}: {error}"

    with ThreadPoolExecutor(READ_THREADS) as pool:
        done = list(pool.map(one, locations))
    good = [(i, d) for i, d in enumerate(done) if not isinstance(d, str)]
    features = model.encode_images([d[0] for _, d in good])
    return {
        "position": np.array([i for i, _ in good], np.int64),
        "features": features,
        "size": np.array([d[1] for _, d in good], np.int32).reshape(-1, 2),
        "thumbnails": np.frombuffer(b"".join(d[2] for _, d in good), np.uint8),
        "thumbnail_bytes": np.array([len(d[2]) for _, d in good], np.int64),
        "problems": np.frombuffer(
            json.dumps({i: d for i, d in enumerate(done) if isinstance(d, str)}).encode(), np.uint8
        ),
        **(code_arrays(model.space, model.refinement, features) if good else {}),
    }


class ImageEmbedder:
    """Ray Data's actor: a row is a chunk's number and locations, the answer its arrays as one file, or why storage did not
    answer: an error of ours would come out of Ray as one of Ray's."""

    def __init__(self, model: str, gpu: bool, threads: int | None = None) -> None:
        from mmref.inference import load

        if threads:
            import torch

            torch.set_num_threads(threads)
        self.model = load(model, "cuda" if gpu else "cpu")

    def __call__(self, batch: dict[str, NDArray[Any]]) -> dict[str, Any]:
        chunks, failure = [], ""
        for locations in batch["locations"]:
            try:
                chunks.append(self.embed(json.loads(locations)))
            except StorageError as error:
                chunks.append(b"")
                failure = str(error)
        failures = np.array([failure] * len(chunks), dtype=object)
        return {"chunk": batch["chunk"], "data": np.array(chunks, dtype=object), "failure": failures}

    def embed(self, locations: list[Location]) -> bytes:
        """The chunk's arrays in NumPy's archive format."""
        file = io.BytesIO()
        np.savez(file, allow_pickle=False, **embed_chunk(self.model, [(p, o, n) for p, o, n in locations]))
        return file.getvalue()


class Chunks:
    """The chunks of a listing in a work folder: `chunks/<number>.npz`, written under a temporary name first, beside the items
    they were made of. Finished ones of an interrupted call are taken over, and their items come first: all of a chunk that
    are still listed, unchanged."""

    def __init__(self, work: Path, items: pa.Table) -> None:
        self.items, self.size, self.folder = items, chunk_size(len(items)), work / "chunks"
        row_of = {identity: row for row, identity in enumerate(_identities(items))}
        rows: list[int | None] = []  # of the items, as an interrupted call had them; None: not listed any more
        if (self.folder / LISTING).exists():
            before = pq.read_table(self.folder / LISTING)
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


def embed(chunks: Chunks, model: Path, workers: int) -> None:
    """Embed the chunks that are not finished. `workers` Ray actors, each on a GPU where the cluster has any; 0: here."""
    pending = chunks.pending()
    if not pending:
        return
    bar = _bar(len(chunks.items), len(chunks.items) - sum(len(chunks.rows(n)) for n in pending))
    with bar:
        for number, data in _embedded(chunks, pending, str(model), workers):
            chunks.write(number, data)
            bar.update(len(chunks.rows(number)))


def _embedded(chunks: Chunks, pending: list[int], model: str, workers: int) -> Iterator[tuple[int, bytes]]:
    if workers == 0:
        embedder = ImageEmbedder(model, gpu=False)
        for number in pending:
            yield number, embedder.embed(chunks.locations(number))
        return
    from mmref.cluster import connect, has_gpu

    with connect(workers):
        import ray
        import ray.data

        from mmref.data.stream import quiet_ray_data

        quiet_ray_data()
        gpu = has_gpu()
        jobs = [{"chunk": n, "locations": json.dumps(chunks.locations(n))} for n in pending]
        dataset = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map_batches(
            ImageEmbedder,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(jobs))),
            num_cpus=1,
            num_gpus=1 if gpu else 0,
            fn_constructor_args=(model, gpu, None if gpu else 1),
            max_restarts=-1,
            max_task_retries=-1,
        )
        for row in dataset.iter_rows():
            if row["failure"]:
                raise StorageError(row["failure"])
            yield int(row["chunk"]), row["data"]


def _bar(total: int, done: int) -> Any:
    from tqdm import tqdm

    quiet = not sys.stderr.isatty()
    return tqdm(total=total, initial=done, unit="image", desc="embedding", mininterval=10 if quiet else 0.1, ncols=80)
