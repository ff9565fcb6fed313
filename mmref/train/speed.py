"""How fast a worker computes, for the log line: TFLOP/s, and their share of what its GPU can do at most (MFU)."""

from __future__ import annotations

import logging

import torch

from mmref.config import Config
from mmref.data.reader import Batch
from mmref.sizing.estimate import flops_of_a_pair
from mmref.sizing.peaks import TERA, multiplied_in, peak_flops

log = logging.getLogger("mmref")


class Speed:
    """What one worker makes of its time. Before `learn`, and where FLOPs cannot be counted, it says nothing."""

    def __init__(self, config: Config, device: torch.device, bf16: bool, trims_texts: bool, objects: int) -> None:
        """
        Args:
            bf16: whether the towers compute in bf16.
            trims_texts: whether captions cost their own tokens alone, and not their padding.
            objects: of training.
        """
        self.config, self.trims_texts, self.objects = config, trims_texts, objects
        self.on_gpu = device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(device), multiplied_in(bf16)) if self.on_gpu else None
        self.flops: float | None = None  # of a pair

    def learn(self, batch: Batch) -> None:
        """Count the FLOPs of a pair, once, with captions as long as those of a batch on average: takes seconds.

        Tokens of frozen towers that `model.feature_cache` holds are not computed, and nobody knows how many: no count.
        """
        if self.config.model.feature_cache:
            return
        tokens = self.config.data.max_tokens
        if self.trims_texts:
            tokens = max(1, round(float(batch["mask"].sum(1).mean())))
        try:
            self.flops = flops_of_a_pair(self.config, tokens, self.objects)
        except Exception as error:  # a tower from an import path may do what tensors without memory cannot: no run ends by that
            log.warning("the log will not say TFLOP/s, since FLOPs of these towers cannot be counted: %s", error)

    def __call__(self, pairs_per_second: float) -> dict[str, float | None]:
        """Fields of a log line for the pairs that this worker trains on in a second."""
        if self.flops is None:
            return {}
        achieved = pairs_per_second * self.flops
        mfu = {"mfu": None if self.peak is None else achieved / self.peak} if self.on_gpu else {}
        return {"tflops_per_worker": achieved / TERA, **mfu}
