"""Evaluation inside training, by all workers: on val, and on test where that was asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmref.config import Config
from mmref.data.shard_set import ShardSet, open_reader
from mmref.evaluate.choose import choose_on_val, gain_by_value, trained_space
from mmref.evaluate.features import Encoder, Floats, ahead, read_pixels, read_queries
from mmref.evaluate.metrics import METRIC_NAMES, evaluate_features, summarize
from mmref.evaluate.shares import QueryShare
from mmref.train import collectives
from mmref.train.bank import ReferenceBank

RANKED_AT_ONCE = 256  # queries in a chunk, of which each rank has an equal number


def score_of(metrics: dict[str, Any], metric: str) -> float:
    """The number that picks checkpoints and refinement: mAP, R@1 or their sum; refined, where refinement was searched."""
    return sum(metrics.get(f"refined_{m}", metrics[m]) for m in metric.split("+"))


class Validation:
    """Scores a model on a split. Every rank encodes an equal share, as ZeRO-3 needs equal numbers of forwards, and ranks one.

    Attributes:
        encode_seconds, rank_seconds: what the last call took to encode and to rank, refinement included.
    """

    def __init__(self, config: Config, split: str = "val") -> None:
        self.config = config
        self.refines = config.eval.refine_in_training and split == "val"  # refinement is never chosen on test
        index = ShardSet.open(config.data.root).index(split)
        self.objects = np.asarray(index.object_row).astype(np.int64)
        self.reader = open_reader(config, index)
        # Each rank reads a share: they may lie on object storage, and images between them.
        share = np.array_split(np.arange(len(index)), collectives.world_size())[collectives.rank()]
        parts = collectives.gather_objects(list(self.reader.read_metas(share.tolist())))
        self.queries = read_queries(index, records=(record for part in parts for record in part))
        self.encode_seconds = self.rank_seconds = 0.0

    def __call__(self, encoder: Encoder, bank: ReferenceBank) -> dict[str, Any]:
        """Metrics in percent, text to image, the same on every rank (collective).

        On val, with `eval.refine_in_training`, also the metrics under the best refinement (refined_R@1, ...) and its settings
        (refine_kind, refine_weight, refine_top_r, refine_tau), and what each value of a setting gains (refine_gain, of
        `gain_by_value`).
        """
        began = time.perf_counter()
        with encoder:
            image = self._encode(len(self.objects), lambda parts: self._images(encoder, parts), encoder.device)
            text = self._encode(len(self.queries.texts), lambda parts: self._texts(encoder, parts), encoder.device)
        encoded = time.perf_counter()
        usable = image.any(1)  # as in the evaluation at the end, images that cannot be read are left out
        image, objects = image[usable], self.objects[usable]
        queries, share = self.queries, share_of(encoder.device)
        per_query = evaluate_features(text[queries.text], image, queries.objects, objects, RANKED_AT_ONCE, share=share)
        metrics: dict[str, Any] = summarize(per_query)
        if self.refines:
            references = bank.fetch(bank.everyone).detach().float().cpu().numpy()
            metrics |= self._refined(references, text, image, objects, share)
        self.encode_seconds, self.rank_seconds = encoded - began, time.perf_counter() - encoded
        return metrics

    def _refined(self, references: Floats, text: Floats, image: Floats, objects: np.ndarray, share: QueryShare) -> dict[str, Any]:
        """The best of the refinement's grid on these features. Takes no training: every setting is scored exactly."""
        space = trained_space(self.config, references)
        best, tried = choose_on_val(self.config, space, text, self.queries, image, objects, RANKED_AT_ONCE, share)
        if not tried:
            return {"refine_weight": 0.0}
        result = max(tried, key=lambda row: row["objective"])
        settings = {f"refine_{k}": getattr(best, k) for k in ("kind", "weight", "top_r", "tau")}
        refined = {f"refined_{m}": result[m] for m in METRIC_NAMES}
        return {**settings, **refined, "refine_gain": gain_by_value(tried)}

    def _images(self, encoder: Encoder, parts: list[list[int]]) -> Iterator[Floats]:
        """Features (n, d) of some rows at a time, zeros where an image cannot be read."""
        for pixels, bad in ahead(parts, lambda rows: read_pixels(self.reader, rows, self.config.data)):
            yield encoder.images(pixels) * np.array([not problem for problem in bad], np.float32)[:, None]

    def _texts(self, encoder: Encoder, parts: list[list[int]]) -> Iterator[Floats]:
        for rows in parts:
            yield encoder.texts([self.queries.texts[i] for i in rows])

    def _encode(self, count: int, encode: Callable[[list[list[int]]], Iterator[Floats]], device: torch.device) -> Floats:
        """Features of items 0 .. count - 1, each rank a contiguous share padded to the same size."""
        world, rank, batch = collectives.world_size(), collectives.rank(), self.config.eval.batch
        share = -(-count // world)
        mine = [min(i, count - 1) for i in range(rank * share, (rank + 1) * share)]
        own = np.concatenate(list(encode([mine[i : i + batch] for i in range(0, share, batch)])))
        return _gathered(own, device)[:count]


def share_of(device: torch.device) -> QueryShare:
    """This rank's share of the queries: scored and ranked on its GPU, where it has one."""

    def gather(rows: NDArray[Any]) -> NDArray[Any]:
        return _gathered(rows, device)

    on = None if device.type == "cpu" else device
    return QueryShare(collectives.rank(), collectives.world_size(), gather, on)


def _gathered(rows: NDArray[Any], device: torch.device) -> NDArray[Any]:
    return collectives.gather(torch.from_numpy(rows).to(device)).cpu().numpy()
