"""What a run will need, before it is started: memory of a worker, object store, bytes and FLOPs of a step.

    mmref sizing --workers 8 64 512 --batch 64 --objects 10000000 --config configs/clip_vit_b16.yaml

Parameters, activations and FLOPs are counted on the model itself, run on tensors without memory; the rest is arithmetic
(docs/scaling.md has the formulas). Towers named by hub id cost their config file, no weights.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mmref.config import Config, from_dict, to_dict
from mmref.config.packages import trust_own
from mmref.sizing.live_bytes import LiveBytes

FP32, INT64 = 4, 8
GB = 1e9
BUCKET = 50_000_000  # elements of DeepSpeed's buckets, as in mmref/train/engine.py
MAX_LIVE = 1_000_000_000  # parameters that stage 3 keeps gathered, as there
TASKS_PER_READER = 2  # Ray Data gives an actor one task to work on and one to wait
PREFETCHED_STEPS = 2  # mmref/data/stream.py


@dataclass(frozen=True)
class ModelSize:
    """Counts of the model with one micro-batch."""

    parameters: int
    trained: int
    embed_dim: int
    activations: int  # bytes at the peak of the forward pass: what it keeps for the backward pass, and what it works on
    features_flops: int  # forward to the features alone, without heads: what gradient caching does twice
    flops: int  # forward and backward
    left_out: int = 0  # parameters below LoRA's adapters, which checkpoints leave out


@dataclass(frozen=True)
class Sizing:
    """Bytes and FLOPs of one worker, except where it says otherwise."""

    workers: int
    global_batch: int
    batch: int  # pairs of one worker in a step
    # memory of the device
    weights: float  # at stage 3 its share, and what it has gathered of the others'
    gradients: float
    optimizer: float  # Adam's moments, the average of the weights, and the fp32 copy that a sharded optimizer updates
    buckets: float
    activations: float  # of a micro-batch
    references: float  # the rows it owns, with their optimizer state, where they lie on the device
    contrast: float  # gathered features and references, logits and their gradients
    # host
    host_references: float  # the same where they lie in host memory
    object_store: float  # samples on their way from its readers
    checkpoint: float  # of the whole run
    # what it sends in a step
    send_features: float
    send_gradients: float
    send_references: float
    # what its readers deliver, and what it computes, in a step
    samples: float
    flops: float

    @property
    def device(self) -> float:
        """Bytes of device memory in all."""
        return (self.weights + self.gradients + self.optimizer + self.buckets + self.activations + self.references
                + self.contrast)  # fmt: skip

    @property
    def sent(self) -> float:
        return self.send_features + self.send_gradients + self.send_references


def measure_model(config: Config, micro_batch: int, objects: int = 0) -> ModelSize:
    """Run a forward and a backward pass of a micro-batch on tensors that have shapes and no memory. Raises ModelError.

    Args:
        objects: of training, which the classifier of `loss.w_id` has a row for.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from mmref.model.backbone import try_towers, without_weights
    from mmref.model.flops import flop_counter
    from mmref.model.lora import below_adapters
    from mmref.model.mmref import Masked, build_model

    trust_own(config.model)
    try_towers(config.model, (config.data.image_height, config.data.image_width))
    config = dataclasses.replace(config, model=without_weights(config.model))
    flops = flop_counter()
    with torch.device("meta"):
        model = build_model(config, 0, objects)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        pixels = torch.zeros(micro_batch, 3, config.data.image_height, config.data.image_width)
        ids = torch.zeros(micro_batch, config.data.max_tokens, dtype=torch.long)
        masked = None
        if config.loss.masks_words:
            words = round(config.loss.mask_rate * ids.numel())
            at = torch.zeros(words, dtype=torch.long)  # where they are does not matter, how many does
            masked = Masked(ids, at, at, torch.zeros(micro_batch, config.reference.per_object, model.embed_dim))
        with LiveBytes() as memory, flops:
            out = model(pixels, ids, torch.ones_like(ids), masked, torch.zeros(micro_batch, dtype=torch.long))
        forward = flops.get_total_flops()
        with flops, torch.no_grad():
            model(pixels, ids, torch.ones_like(ids))
        features = flops.get_total_flops()
        assert out.image is not None and out.text is not None
        heads = [part for part in (out.rec_sum, out.mlm_sum, out.id_sum) if part is not None]
        loss = sum(heads, out.image.sum() + out.text.sum())
        with flops:
            loss.backward()
    parameters, left_out = list(model.parameters()), below_adapters(model)
    return ModelSize(
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
        model.embed_dim,
        memory.peak,
        features,
        forward + flops.get_total_flops(),
        sum(p.numel() for name, p in model.named_parameters() if name in left_out),
    )


def flops_of_a_pair(config: Config, tokens: int, objects: int = 0) -> float:
    """FLOPs that one image and its caption of so many tokens need in a step: forward and backward of towers and heads.

    What a step does beside that does not count, so that it shows as a lower utilization: padding, the second forward of
    gradient caching, recomputed activations. Nor do the products with the global batch and the references, which are below
    a hundredth at the size of a ViT-B. Raises ModelError.

    Args:
        objects: of training, which the classifier of `loss.w_id` has a row for.
    """
    pairs = 2  # the words masked in a single short caption may round to none
    needed = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, max_tokens=tokens),
        train=dataclasses.replace(config.train, gradient_checkpointing=False),
    )
    return measure_model(needed, pairs, objects).flops / pairs


def compute_sizing(config: Config, objects: int, model: ModelSize | None = None) -> Sizing:
    """Sizing of a run on `train.workers` workers with that many objects (formulas: docs/scaling.md)."""
    t, r = config.train, config.reference
    world, stage = t.workers, t.zero_stage
    batch, micro = t.global_batch // world, config.micro_batch
    model = model or measure_model(config, micro, objects)
    weights, trained, dim = FP32 * model.parameters, FP32 * model.trained, model.embed_dim
    bucket = FP32 * min(BUCKET, model.trained)
    shards = world if stage else 1  # over how many workers the optimizer is sharded

    row = FP32 * r.per_object * dim
    stored = row // 2 if r.row_dtype == "bf16" else row  # on its way a row is fp32
    state = row + FP32 * r.per_object + INT64 if r.update == "gradient" else 0  # moments and visits: mmref/train/bank.py
    references = -(-objects // world) * (stored + state)
    in_batch = min(objects, config.objects_per_step)
    contrasted = {"all": objects, "batch": in_batch, "sampled": min(objects, in_batch + r.sampled_negatives)}[r.negatives]
    rows = contrasted * row
    uses_references = config.loss.uses_references
    features = 2 * FP32 * t.global_batch * dim  # of the global batch: images and texts
    align = 2 * FP32 * batch * t.global_batch  # logits of both directions
    against_rows = FP32 * 2 * batch * contrasted * r.per_object
    contrast = 2 * features + 3 * align  # logits, their softmax, the gradient
    if uses_references:
        contrast += rows * (2 if r.update == "gradient" else 1) + 3 * against_rows

    passes = 3 * t.accumulation if t.accumulation > 1 else 2  # forward and backward, and a forward before under caching
    sent = trained / 2 if t.gradient_dtype == "bf16" else trained  # the gradients, once
    send_gradients = {
        0: _reduced(world, sent),
        1: _gathered(world, sent) + _gathered(world, trained),  # to their owners, and the updated weights back
        2: t.accumulation * _gathered(world, sent) + _gathered(world, trained),  # reduced after every micro-batch
        3: t.accumulation * _gathered(world, sent) + passes * _gathered(world, weights),
    }[stage]
    send_references = 0.0
    if uses_references:
        send_references = _gathered(world, rows) if r.negatives == "all" else _reduced(world, rows)
        if r.update == "gradient":
            send_references += _reduced(world, rows)
        else:  # the batch's rows and their features' sums
            send_references += 2 * _reduced(world, in_batch * row)

    samples = batch * (3 * config.data.image_height * config.data.image_width + 2 * 4 * config.data.max_tokens + 5 * INT64)
    blocks = config.data.readers * TASKS_PER_READER + 1  # in work, waiting, and the one that is being taken from
    extra_pass = t.accumulation * model.features_flops if t.accumulation > 1 else 0
    return Sizing(
        workers=world,
        global_batch=t.global_batch,
        batch=batch,
        weights=weights / world + FP32 * min(MAX_LIVE, model.parameters) if stage == 3 else weights,
        gradients=trained / (world if stage >= 2 else 1),
        optimizer=(2 + bool(t.ema)) * trained / shards + (trained / shards if stage else 0),
        buckets=(bucket * (2 if t.on_gpu else 1) + bucket) if stage else 0,
        activations=model.activations,
        references=0 if r.rows_on == "host" else references,
        contrast=contrast,
        host_references=references if r.rows_on == "host" else 0,
        object_store=blocks * config.data.steps_per_task * samples + PREFETCHED_STEPS * samples,
        checkpoint=weights - FP32 * model.left_out + (2 + bool(t.ema)) * trained + world * references,
        send_features=_gathered(world, features) + _reduced(world, features),
        send_gradients=send_gradients,
        send_references=send_references,
        samples=samples,
        flops=t.accumulation * model.flops + extra_pass,
    )


def _gathered(world: int, size: float) -> float:
    """Bytes a worker sends when `size` bytes, spread over all, are gathered or reduced to their owners (ring)."""
    return size * (world - 1) / world


def _reduced(world: int, size: float) -> float:
    """Bytes a worker sends when `size` bytes are summed over all workers on all of them (ring)."""
    return 2 * _gathered(world, size)


ROWS = [  # (heading, field, unit, divisor)
    ("memory of a worker's device", "device", "GB", GB),
    ("  weights", "weights", "GB", GB),
    ("  gradients", "gradients", "GB", GB),
    ("  optimizer", "optimizer", "GB", GB),
    ("  DeepSpeed's buckets", "buckets", "GB", GB),
    ("  activations of a micro-batch", "activations", "GB", GB),
    ("  references it owns", "references", "GB", GB),
    ("  contrast: features, rows, logits", "contrast", "GB", GB),
    ("references it owns in host memory", "host_references", "GB", GB),
    ("object store for a worker's samples", "object_store", "GB", GB),
    ("checkpoint of the run", "checkpoint", "GB", GB),
    ("sent by a worker in a step", "sent", "MB", 1e6),
    ("  features", "send_features", "MB", 1e6),
    ("  gradients and weights", "send_gradients", "MB", 1e6),
    ("  references", "send_references", "MB", 1e6),
    ("samples read for a worker's step", "samples", "MB", 1e6),
    ("computed by a worker in a step", "flops", "TFLOP", 1e12),
]


def format_table(sizings: list[Sizing]) -> str:
    """A column for each number of workers."""
    lines = [f"{'workers':<44}" + "".join(f"{s.workers:>12,}" for s in sizings)]
    lines += [f"{'global batch':<44}" + "".join(f"{s.global_batch:>12,}" for s in sizings)]
    for heading, field, unit, divisor in ROWS:
        values = "".join(f"{getattr(s, field) / divisor:>12,.2f}" for s in sizings)
        lines.append(f"{heading + ', ' + unit:<44}{values}")
    return "\n".join(lines)


def scaled(config: Config, workers: int, batch: int) -> Config:
    """The run on some workers with `batch` pairs each. Raises ConfigError."""
    values = to_dict(config)
    # With how few workers the run would go on changes nothing of what it needs with these, which may be fewer still.
    values["train"] |= {"workers": workers, "min_workers": 0, "global_batch": workers * batch}
    return from_dict(values)
