"""Fine-tuned weights mixed with those that training started from (WiSE-FT, Wortsman et al., CVPR 2022, arXiv:2109.01903).

A pretrained model knows more of the world than a fine-tuned one, which knows more of the set; in between lie models that are
often better than both. Which one is chosen on val: it costs an encoding of val for each share that is tried.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mmref.config import Config
from mmref.data.shard_set import ShardSet, open_reader
from mmref.data.tokens import Tokens
from mmref.errors import ExportError
from mmref.evaluate.choose import choose_on_val
from mmref.evaluate.evaluation import CAPTIONS, Evaluation
from mmref.evaluate.features import Encoder, read_pixels, read_queries
from mmref.evaluate.metrics import evaluate_features, summarize
from mmref.evaluate.protocols import Chosen, protocols
from mmref.evaluate.refinement import ReferenceSpace
from mmref.evaluate.split_features import SplitFeatures, collect
from mmref.model.mmref import MMRef, build_model
from mmref.run.checkpoints import BUFFER, TensorFolder, best_checkpoint, fetched, persistent_buffers
from mmref.run.directory import RunDir
from mmref.run.models import find_model, load_parts
from mmref.terminal.progress import say
from mmref.train.validation import score_of

SHARES = tuple(i / 10 for i in range(11))
"""Of the fine-tuned weights, that are tried: from none to all of them."""


@dataclasses.dataclass(frozen=True)
class Interpolation:
    """The share of the fine-tuned weights, what each share reaches on val, and what the mixture reaches with its refinement."""

    share: float
    val: dict[str, float]  # what it reaches on val, before refinement
    tried: list[dict[str, float]]  # the same of each share
    metrics: dict[str, Any]  # as metrics.json has them, of the reported split


def interpolate(
    module: MMRef, config: Config, shards: ShardSet, tokens: Tokens, space: ReferenceSpace | None, split: str
) -> Interpolation:
    """Mix a run's weights with those that it started from, in place, by the share that is best on val.

    Of equal shares the larger is taken. The refinement is chosen anew on val, and `split` scored with both.

    Raises:
        ExportError: the run started from random weights, or its set has no val split.
    """
    if "val" not in shards.splits:
        raise ExportError(f"{shards.root} has no val split to choose the share on: export without `--interpolate`.")
    tuned = {name: x.clone() for name, x in mixed_tensors(module).items()}
    start = start_weights(config, module, tokens)
    encoder = Encoder(module, module, config.data, tokens, torch.device("cpu"))
    tried: list[dict[str, float]] = []
    best: dict[str, float] = {}
    for share in SHARES:
        _mix(module, start, tuned, share)
        found = encode_split(encoder, config, shards, "val")
        scores = evaluate_features(found.text[found.queries.text], found.image, found.queries.objects, found.image_objects)
        tried.append({"share": share, **summarize(scores)})
        say(f"{share:.0%} of the fine-tuned weights: mAP {tried[-1]['mAP']:.2f} on val")
        if not best or score_of(tried[-1], config.eval.metric) >= score_of(best, config.eval.metric):
            best, val = tried[-1], found
    _mix(module, start, tuned, best["share"])
    settings, grid = choose_on_val(config, space, val.text, val.queries, val.image, val.image_objects)
    reported = val if split == "val" else encode_split(encoder, config, shards, split)
    chosen = {CAPTIONS: Chosen(settings, "val", grid)}
    chosen |= {name: protocol.choose(config, space, "val") for name, protocol in protocols(config, val).items()}
    metrics = {"split": split, **Evaluation(config, reported, space, chosen, val).metrics()}
    reached = {name: value for name, value in best.items() if name != "share"}
    return Interpolation(best["share"], reached, tried, metrics)


def start_weights(config: Config, module: MMRef, tokens: Tokens) -> dict[str, Tensor]:
    """The weights and statistics that a run started from, by name, without those drawn at random. Raises ExportError."""
    m = config.model
    plain = dataclasses.replace(config, model=dataclasses.replace(m, lora_image=0, lora_text=0))  # here adapters are merged
    pretrained = {"backbone.": m.dual, "backbone.vision_model.": m.vision, "backbone.text_model.": m.text}
    if config.train.start_from:
        found = find_model(config.train.start_from)
        if found.kind != "run":
            return _below(mixed_tensors(load_parts(found).module), "backbone.")
        run = RunDir(found.place)
        with fetched(run, best_checkpoint(run), "model") as folder:
            tensors = TensorFolder(folder, "model")
            names = _below(mixed_tensors(module), "backbone.")
            return {name: tensors.get(name if name in tensors.files else f"{BUFFER}{name}") for name in names}
    prefixes = tuple(prefix for prefix, name in pretrained.items() if name)
    if not prefixes:
        raise ExportError(
            "the run started from random weights (`model.*_config`, no `train.start_from`), which no mixture is to have a share "
            "of: export without `--interpolate`."
        )
    return _below(mixed_tensors(build_model(plain, tokens.vocab_size)), *prefixes)


def mixed_tensors(module: MMRef) -> dict[str, Tensor]:
    """What a mixture is made of, by name: weights, and the statistics of batch norm, which belong to the weights before them."""
    statistics = {name: buffer for name, buffer in persistent_buffers(module) if buffer.is_floating_point()}
    return {name: p.detach() for name, p in module.named_parameters()} | statistics


def _below(tensors: dict[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if name.startswith(prefixes)}


@torch.no_grad()
def _mix(module: MMRef, start: dict[str, Tensor], tuned: dict[str, Tensor], share: float) -> None:
    for name, x in mixed_tensors(module).items():
        if name in start:
            x.copy_(torch.lerp(start[name], tuned[name], share))


def encode_split(encoder: Encoder, config: Config, shards: ShardSet, split: str) -> SplitFeatures:
    """Features of a split, encoded in this process."""
    index, batch = shards.index(split), config.eval.batch
    reader = open_reader(config, index)
    queries = read_queries(index, reader)
    images: list[Any] = []
    texts: list[Any] = []
    with encoder:
        for first in range(0, len(index), batch):
            pixels, problems = read_pixels(reader, range(first, min(first + batch, len(index))), config.data)
            images.append((first, encoder.images(pixels), problems))
        for first in range(0, len(queries.texts), batch):
            texts.append((first, encoder.texts(queries.texts[first : first + batch]), []))
    return collect(index, queries, images, texts)
