"""Features of whole splits: by Ray workers, each of which loads the model once, or in this process."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch

from mmref.cluster.answers import answer_of
from mmref.cluster.connection import connect
from mmref.cluster.resources import has_gpu, torch_threads, use_threads, workers_that_fit
from mmref.config import Config
from mmref.config.packages import trust_own
from mmref.data.decode import calm_opencv
from mmref.data.sample_reader import SampleReader, SplitIndex
from mmref.data.shard_set import ShardSet, open_reader
from mmref.data.tokens import load_tokens
from mmref.errors import EvaluationError, WorkerDiedError
from mmref.evaluate.features import Encoder, Floats, Queries, read_pixels, read_queries
from mmref.extras import missing
from mmref.model.device import chosen_device
from mmref.model.mmref import build_model
from mmref.run.checkpoints import CheckpointInfo, fetched, load_model
from mmref.run.directory import RunDir
from mmref.terminal.progress import Counter, say

RETRIES = 3  # of a portion whose worker dies: nodes go and memory runs short, but an image may be what ends a worker


@dataclass
class SplitFeatures:
    """A split as features; images that cannot be read are left out and listed."""

    index: SplitIndex
    queries: Queries
    image: Floats  # (n, d) normalised features of the usable images
    image_rows: np.ndarray  # (n,) their positions in the index
    text: Floats  # (t, d) normalised features of the distinct captions
    skipped: list[str]

    @property
    def image_objects(self) -> np.ndarray:
        return np.asarray(self.index.object_row)[self.image_rows].astype(np.int64)


@dataclass(frozen=True)
class Portion:
    """Some images or texts of a split, for one call of a worker."""

    split: str
    kind: str  # "image" or "text"
    start: int
    stop: int
    texts: list[str]  # of kind "text"

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.kind}s {self.start} to {self.stop - 1} of {self.split}"


class Embedder:
    """A worker, which encodes portions of splits, and reads the images of the next one meanwhile.

    The model is loaded at the first call, not as the worker is made: what Ray raises of a constructor has lost its name.
    """

    def __init__(self, run_dir: str, checkpoint: CheckpointInfo, config: Config, root: str) -> None:
        self.run_dir, self.checkpoint, self.config, self.root = run_dir, checkpoint, config, root
        self._encoder: Encoder | None = None
        self.readers: dict[str, SampleReader] = {}
        self._thread = ThreadPoolExecutor(1)
        self._ahead: tuple[Portion, Future[Any]] | None = None  # the portion that is being read

    def ready(self) -> None:
        """Answers once the model is loaded."""
        self._loaded()

    def _loaded(self) -> Encoder:
        if self._encoder is None:
            self._encoder = self._load()
        return self._encoder

    def _load(self) -> Encoder:
        config = self.config
        device = chosen_device()
        if config.eval.workers:
            calm_opencv()
        else:
            use_threads()
        if config.eval.workers and device.type == "cpu":
            torch.set_num_threads(torch_threads(config.train.threads, config.eval.workers))
        trust_own(config.model)  # whoever opened the run has checked it
        tokens = load_tokens(config)
        model = build_model(config, tokens.vocab_size)
        with fetched(RunDir(self.run_dir), self.checkpoint, "model") as folder:
            load_model(folder, model)
        return Encoder(model.to(device), model, config.data, tokens, device)

    def encode(self, portion: Portion, following: Portion | None = None) -> tuple[Floats, list[str]]:
        """Features (n, d) and, for each image, why it cannot be read, "" where it can.

        following: what the next call is about.
        """
        with self._loaded() as encoder:
            read = self._ahead[1].result() if self._ahead and self._ahead[0] == portion else self._read(portion)
            self._ahead = (following, self._thread.submit(self._read, following)) if following else None
            if read is None:
                return encoder.texts(portion.texts), [""] * len(portion)
            pixels, bad = read
            return encoder.images(pixels), bad

    def _read(self, portion: Portion) -> tuple[Any, list[str]] | None:
        """Pixels of a portion's images, and what is wrong with each; None for texts."""
        if portion.kind == "text":
            return None
        if portion.split not in self.readers:
            self.readers[portion.split] = open_reader(self.config, ShardSet.open(self.root).index(portion.split))
        return read_pixels(self.readers[portion.split], list(range(portion.start, portion.stop)), self.config.data)


def embed_splits(
    config: Config, run: RunDir, checkpoint: CheckpointInfo, root: str, splits: list[str]
) -> dict[str, SplitFeatures]:
    """Features of the splits of a shard set with a checkpoint's weights.

    By `eval.workers` Ray actors; by none, and where Ray is not installed, in this process.
    """
    config.eval.workers = 0 if missing("train", "ray") else workers_that_fit(config.eval.workers)
    shards = ShardSet.open(root)
    indices = {s: shards.index(s) for s in splits}
    queries = {s: read_queries(indices[s], open_reader(config, indices[s])) for s in splits}
    portions: list[Portion] = []
    for s in splits:
        if not queries[s].texts:
            first = f", the first: {queries[s].skipped[0]}" if queries[s].skipped else ""
            raise EvaluationError(f"{root}: no sample of {s} has a caption that can be used{first}.")
        for kind, count in (("image", len(indices[s])), ("text", len(queries[s].texts))):
            for start in range(0, count, config.eval.batch):
                stop = min(start + config.eval.batch, count)
                portions.append(Portion(s, kind, start, stop, queries[s].texts[start:stop] if kind == "text" else []))
    parts: dict[tuple[str, str], list[tuple[int, Floats, list[str]]]] = {}
    cluster = connect(config.eval.workers) if config.eval.workers else contextlib.nullcontext()
    what = f"encoding images and texts of {' and '.join(splits)}"
    with cluster, Counter(what, sum(map(len, portions)), "item") as progress:
        for portion, features, bad in _encoded(config, run, checkpoint, root, portions):
            parts.setdefault((portion.split, portion.kind), []).append((portion.start, features, bad))
            progress.add(len(portion))
    found = {s: collect(indices[s], queries[s], parts[s, "image"], parts[s, "text"]) for s in splits}
    for s, of_split in found.items():
        if not len(of_split.image):
            bad = of_split.skipped[len(queries[s].skipped) :]
            raise EvaluationError(f"{root}: none of the {len(bad):,} images of {s} can be used, the first: {bad[0]}.")
    return found


def _encoded(
    config: Config, run: RunDir, checkpoint: CheckpointInfo, root: str, portions: list[Portion]
) -> Iterator[tuple[Portion, Floats, list[str]]]:
    """Each portion with what `Embedder.encode` says of it, as they are done."""
    if config.eval.workers == 0:
        embedder = Embedder(run.path, checkpoint, config, root)
        for portion, following in zip_longest(portions, portions[1:]):
            yield portion, *embedder.encode(portion, following)
        return
    yield from _encoded_by_actors(_starter(config, run, checkpoint, root), portions, config.eval.workers)


def _starter(config: Config, run: RunDir, checkpoint: CheckpointInfo, root: str) -> Callable[[], Any]:
    """What starts a worker, which Ray starts again when it dies.

    These are actors of our own. Ray Data hands its actors references to objects, and Ray warns on the terminal of every actor
    that it is to start again from references. Arguments that travel with the actor are there as long as it is.
    """
    import ray

    gpu = has_gpu()  # whatever the run was trained on
    say(f"encoding on {'GPUs' if gpu else 'CPUs'}")
    actor: Any = ray.remote(num_cpus=1, num_gpus=int(gpu), max_restarts=-1, max_task_retries=RETRIES)(Embedder)
    return functools.partial(actor.remote, run.path, checkpoint, config, root)


def _encoded_by_actors(
    start: Callable[[], Any], portions: list[Portion], workers: int
) -> Iterator[tuple[Portion, Floats, list[str]]]:
    """Each portion with what `Embedder.encode` says of it, as they are done.

    Raises a worker's own error where it is one of ours, WorkerDiedError for a portion that ends every worker that has it.
    """
    import ray

    waiting, left = deque(portions), len(portions)
    # By what a worker will answer: the worker, its portion, and the one that it reads meanwhile. None while it starts: one that
    # finds no place gets none.
    working: dict[Any, tuple[Any, Portion | None, Portion | None]] = {}
    for _ in range(min(workers, left)):
        worker = start()
        working[worker.ready.remote()] = worker, None, None
    while left:
        (done, *_), _ = ray.wait(list(working), num_returns=1)
        worker, portion, following = working.pop(done)
        try:
            answer = answer_of(done)
        except ray.exceptions.RayActorError as error:
            what = "before it has loaded the model" if portion is None else f"of {portion}"
            raise WorkerDiedError(
                f"a worker of the evaluation dies {what}, {1 + RETRIES} times ({str(error).strip().splitlines()[0][:200]}): is "
                "there too little memory? Lower `--eval.batch` or `--eval.workers`. `mmref shards verify` finds broken images."
            ) from None
        if portion is not None:
            left -= 1
            yield portion, *answer
        if following is None and waiting:
            following = waiting.popleft()
        if following is not None:
            portion, following = following, waiting.popleft() if waiting else None
            working[worker.encode.remote(portion, following)] = worker, portion, following


def collect(index: SplitIndex, queries: Queries, images: list, texts: list) -> SplitFeatures:
    """A split of its parts (start, features, bad), which came in any order."""
    images, texts = (sorted(parts, key=lambda part: part[0]) for parts in (images, texts))
    features, text = (np.concatenate([part[1] for part in parts]) for parts in (images, texts))
    bad = [why for _, _, reasons in images for why in reasons]
    usable = np.array([not why for why in bad])
    return SplitFeatures(
        index, queries, features[usable], np.flatnonzero(usable), text, queries.skipped + [why for why in bad if why]
    )
