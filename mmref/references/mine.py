"""Which training objects a model confuses: the nearest ones of each, for batches of hard negatives; what `mmref mine` does."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmref.cluster.resources import workers_that_fit
from mmref.config import Config, config_hash
from mmref.data.neighbors import FILE, NONE, Neighbors, index_fingerprint
from mmref.data.sample_reader import SplitIndex
from mmref.data.shard_set import ShardSet, train_index
from mmref.errors import NeighborsError
from mmref.evaluate.evaluation import open_run
from mmref.evaluate.split_features import SplitFeatures, embed_splits
from mmref.run.checkpoints import CheckpointInfo, fetched, load_object_ids, load_references
from mmref.run.directory import RunDir
from mmref.storage.whole_folder import check_output, write_output
from mmref.terminal.progress import Counter

COSINES = 1 << 24  # held at a time, 64 MB


@dataclass(frozen=True)
class Mined:
    """What `mine` wrote."""

    place: str
    neighbors: Neighbors

    @property
    def unnamed(self) -> float:
        """Share of the objects that are nobody's neighbor."""
        named = np.unique(self.neighbors.rows[self.neighbors.rows != NONE])
        return 1 - len(named) / len(self.neighbors.rows)

    @property
    def alone(self) -> int:
        """Objects without a single neighbor: nothing is known of them."""
        return int((self.neighbors.rows == NONE).all(1).sum())


def mine(
    run_dir: str, out: str | None = None, count: int = 16, data: str | None = None, by: str = "auto", workers: int | None = None
) -> Mined:
    """Write the nearest training objects of each object as a file for `data.neighbors`.

    Args:
        run_dir: run directory of `mmref train`.
        out: the file; by default neighbors.parquet in the run directory.
        count: neighbors of each object.
        data: shard set whose train split is to be trained on; by default what the run was trained on, a mixture too.
        by: `references`, `features` (the mean of an object's image features plus the mean of its text features), or `auto`:
            references where the model has one of every object.
        workers: Ray actors that compute features, 0 for this process; by default as in `evaluate_run`.

    Raises:
        NeighborsError: `by` references, and some objects have none; or there is one object alone.
    """
    if out:
        check_output("--out", out)
    run, config, checkpoint = open_run(run_dir, data)
    index = ShardSet.open(data).index("train") if data else train_index(config)
    if min(np.diff([*index.first_objects, index.n_objects])) < 2:
        raise NeighborsError(f"{data or config.data.root} has one training object alone: it has no neighbors.")
    rows = None if by == "features" else _by_references(run, checkpoint, config, index)
    if rows is None and by == "references":
        raise NeighborsError(
            f"{run.path} has no references of some of the {index.n_objects} objects: `mmref references add` makes them, "
            "`--by features` does without."
        )
    found_by = "features" if rows is None else "references"
    if rows is None:
        roots = [data] if data else [config.data.root, *config.data.mix]
        rows = _by_features(run, checkpoint, config, roots, workers)
        rows = rows if index.chosen is None else rows[torch.from_numpy(index.chosen)]
    nearest, similarity = _within_sets(rows, index, count)
    made = f"{config_hash(config)} {checkpoint.folder}"
    neighbors = Neighbors(nearest, similarity, index_fingerprint(index), made, found_by)
    if out:
        write_output("--out", out, neighbors.to_bytes())
    else:
        run.write_bytes(FILE, neighbors.to_bytes())
    return Mined(out or run.join(FILE), neighbors)


def _by_references(run: RunDir, checkpoint: CheckpointInfo, config: Config, index: SplitIndex) -> Tensor | None:
    """References (m, K, d) of the objects of an index, None where the model has not one of every object."""
    if not config.loss.uses_references:
        return None
    with fetched(run, checkpoint, "references") as folder:
        rows, ids = load_references(folder, checkpoint.meta), load_object_ids(folder, checkpoint.meta)
    place = {name: i for i, name in enumerate(ids)}
    wanted = [place.get(name, -1) for name in index.object_ids]
    if min(wanted) < 0:
        return None
    rows = rows[wanted]
    return rows if bool((rows.abs().amax((1, 2)) > 0).all()) else None


def _by_features(run: RunDir, checkpoint: CheckpointInfo, config: Config, roots: list[str], workers: int | None) -> Tensor:
    """Features (m, 1, d) of the training objects of sets: zero where an object has no usable image and no caption."""
    if workers is not None:
        config.eval.workers = workers_that_fit(workers)
    parts = [embed_splits(config, run, checkpoint, root, ["train"])["train"] for root in roots]
    return torch.cat([object_features(part) for part in parts])[:, None]


def object_features(features: SplitFeatures) -> Tensor:
    """Of each object of a split the sum of its mean image and its mean text direction, (m, d); zero where it has neither."""
    count, q = features.index.n_objects, features.queries
    image = _means(torch.from_numpy(features.image), torch.from_numpy(features.image_objects), count)
    text = _means(torch.from_numpy(features.text[q.text]), torch.from_numpy(q.objects), count)
    return torch.nn.functional.normalize(image, dim=-1) + torch.nn.functional.normalize(text, dim=-1)


def _means(features: Tensor, objects: Tensor, count: int) -> Tensor:
    """Mean of the features (n, d) of each object, up to its length: (count, d)."""
    return torch.zeros(count, features.shape[1]).index_add_(0, objects, features)


def _within_sets(rows: Tensor, index: SplitIndex, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """`nearest_objects` of each shard set by itself, since a step's objects are of one set."""
    bounds = [*index.first_objects, index.n_objects]
    count = min(count, int(np.diff(bounds).max()) - 1)  # an object has no more
    nearest = np.full((index.n_objects, count), NONE, dtype=np.int32)
    similarity = np.zeros((index.n_objects, count), dtype=np.float32)
    with Counter("looking for neighbors", index.n_objects, "object") as progress:
        for first, last in itertools.pairwise(bounds):
            found, cosine = nearest_objects(rows[first:last], count, progress)
            nearest[first:last, : found.shape[1]] = np.where(found == NONE, NONE, found + first)
            similarity[first:last, : found.shape[1]] = cosine
    used = int((nearest != NONE).any(0).sum())
    return nearest[:, : max(1, used)], similarity[:, : max(1, used)]


def nearest_objects(rows: Tensor, count: int, progress: Counter | None = None) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The nearest other objects of each, nearest first, by exact search: m^2 K^2 d multiplications, on a GPU where there is one.

    Two objects are as near as the nearest two of their vectors.

    Args:
        rows: (m, K, d), in which a zero vector stands for none.
        count: how many are wanted; at most m - 1 are found.

    Returns:
        Objects (m, k) and their cosines; NONE and 0 where an object, or all others, have no vector.
    """
    m, per_object, _ = rows.shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unit = torch.nn.functional.normalize(rows.float().to(device), dim=-1)  # (m, K, d)
    missing = unit.abs().amax(-1) == 0  # (m, K)
    keep = min(count, m - 1)
    nearest, similarity = np.empty((m, keep), np.int32), np.empty((m, keep), np.float32)
    at_once = max(1, COSINES // (m * per_object**2))
    for start in range(0, m, at_once):
        part = slice(start, min(start + at_once, m))
        cosine = torch.einsum("akd,bld->abkl", unit[part], unit)  # (a, m, K, K)
        cosine = cosine.masked_fill(missing[part][:, None, :, None] | missing[None, :, None, :], -torch.inf).amax((2, 3))
        own = torch.arange(part.start, part.stop, device=device)
        cosine[own - start, own] = -torch.inf
        best, at = cosine.topk(keep, dim=1)
        at = at.masked_fill(best == -torch.inf, NONE)
        nearest[part], similarity[part] = at.cpu().numpy(), best.masked_fill(best == -torch.inf, 0.0).cpu().numpy()
        if progress:
            progress.add(part.stop - part.start)
    return nearest, similarity
