"""What the types and bounds of single fields cannot say: which values go together."""

from __future__ import annotations

import math

from mmref.config.option import options
from mmref.config.tree import Config, TrainConfig
from mmref.errors import BatchArithmeticError, ConfigError


def check_config(config: Config) -> Config:
    """Check bounds and combinations; returns the config. Raises ConfigError."""
    t, m = config.train, config.model
    for name, option, value in options(config):
        option.check(name, value)
    mix = config.data.mix
    if any(not 0.001 <= share < 1 for share in mix.values()) or sum(mix.values()) >= 1:
        raise ConfigError(
            f"`data.mix` gives each further shard set a share of the steps, from 0.001 up and below 1 in all (`data.root` "
            f"has the rest), found {mix}."
        )
    _check_groups(config)
    if t.epochs and t.max_steps not in (0, TrainConfig.max_steps):
        raise ConfigError(
            f"the length of training is given twice: `train.max_steps` {t.max_steps} and `train.epochs` {t.epochs:g}. Leave one "
            "out; over a config that has steps, `--train.max_steps 0` takes them back."
        )
    if not t.epochs and not t.max_steps:
        raise ConfigError("`train.max_steps` must be at least 1, found 0, or give `train.epochs` in its place.")
    if t.cpus_per_worker > 1 and t.cpus_per_worker % 1:
        raise ConfigError(
            f"`train.cpus_per_worker` is a whole number, or a share of one CPU, as Ray gives them; found {t.cpus_per_worker}."
        )
    if config.loss.guide_full < config.loss.guide_from:
        raise ConfigError(
            f"`loss.guide_full` ({config.loss.guide_full}) comes before `loss.guide_from` ({config.loss.guide_from})."
        )
    if config.loss.align == "rde" and config.loss.learn_tau:
        raise ConfigError(
            "`loss.learn_tau` has no temperature to learn under `loss.align: rde`, whose own is `loss.rde_tau`: leave it out."
        )
    if not t.start_from:  # else what it starts from may have references
        check_taught(config)
    if config.reference.assign == "modality" and config.reference.per_object % 2:
        raise ConfigError("`reference.assign: modality` needs an even `reference.per_object` (image and text references).")
    check_batch(t.global_batch, t.workers, t.accumulation, t.images_per_object)
    if t.compile and t.zero_stage == 3:
        raise ConfigError(
            "`train.compile` works at ZeRO stages 0 to 2: at stage 3 DeepSpeed gathers every layer's parameters in between, "
            "which leaves nothing to compile. Lower `train.zero_stage`, or leave `train.compile` off."
        )
    if not 0 <= t.min_workers <= t.workers:
        raise ConfigError(f"`train.min_workers` must be between 0 and `train.workers` {t.workers}, found {t.min_workers}.")
    if t.min_workers and t.global_batch % t.min_workers:
        counts = [n for n in range(1, t.workers + 1) if t.global_batch % n == 0]
        raise BatchArithmeticError(
            f"train.global_batch {t.global_batch} does not divide over train.min_workers {t.min_workers} "
            f"({t.global_batch} / {t.min_workers} = {t.global_batch / t.min_workers:.2f}); it does over {counts}."
        )
    duals = bool(m.dual) + bool(m.dual_config)
    pair = bool(m.vision or m.vision_config), bool(m.text or m.text_config)
    if m.dual and all(pair):
        raise ConfigError(
            f"the model is `model.dual` {m.dual} and a pair of towers as well: for the pair over a config that names the other, "
            "add `--model.dual ''`."
        )
    if duals + any(pair) != 1 or (any(pair) and not all(pair)):
        raise ConfigError(
            "the model needs either one of `model.dual` / `model.dual_config`, or both a vision tower "
            "(`model.vision` / `model.vision_config`) and a text tower (`model.text` / `model.text_config`); "
            "`--config emoji` and `--config clip_vit_b16` show both. `--model.dual NAME` begins with the weights of a pretrained "
            "model by itself."
        )
    _check_towers(config)
    return config


def check_taught(config: Config) -> None:
    """Raise ConfigError where random references that no loss teaches would be used."""
    loss, reference = config.loss, config.reference
    if reference.update != "gradient" or reference.init != "random" or loss.w_fuse or loss.w_rec:
        return
    used = [what for what, weight in (("guidance", loss.w_guide), ("caption weights", loss.caption_weight)) if weight > 0]
    if used:
        raise ConfigError(
            f"`reference.update: gradient` learns references by fusion, and `loss.w_fuse` is 0: {' and '.join(used)} would "
            "follow random references. Set `loss.w_fuse` to 1, `reference.init: mean` or `reference.update: moving_average`."
        )


def _check_groups(config: Config) -> None:
    """Raise ConfigError for groups of neighbors that cannot be drawn."""
    data = config.data
    if not data.neighbors or not data.hard_share:
        return
    if data.window_shards:
        raise ConfigError(
            f"`data.neighbors` brings objects of all shards together, and `data.window_shards` {data.window_shards} would have a "
            "step read a few of them only: set `data.window_shards: 0`, or leave `data.neighbors` out."
        )
    if data.hard_share * config.objects_per_step < data.group_size / 2 or config.objects_per_step < data.group_size:
        raise ConfigError(
            f"`data.hard_share` {data.hard_share:g} of the {config.objects_per_step} objects of a step (train.global_batch / "
            f"train.images_per_object) has no place for a group of `data.group_size` {data.group_size}: raise the share or the "
            "batch, or lower the group's size."
        )


def _check_towers(config: Config) -> None:
    """Raise ConfigError for adapters or a feature cache where they cannot work."""
    m, d, t = config.model, config.data, config.train
    if (m.adapter_layers or m.feature_cache) and (m.dual or m.dual_config):
        raise ConfigError(
            "`model.adapter_layers` and `model.feature_cache` are for a pair of towers (`model.vision`, `model.text`); a dual "
            "encoder (`model.dual`) brings its own projections."
        )
    for part, rank, locked in (("image", m.lora_image, t.lock_image), ("text", m.lora_text, t.lock_text)):
        if rank and (m.freeze_backbone or locked == "all"):
            raise ConfigError(
                f"`model.lora_{part}` trains adapters inside the tower that `model.freeze_backbone` or `train.lock_{part}: all` "
                "locks: leave one of them out."
            )
    if t.start_from and (m.lora_image or m.lora_text):
        raise ConfigError(
            "`model.lora_image` and `model.lora_text` train adapters of the model that the config names, and `train.start_from` "
            "would give it other weights, which no checkpoint would hold. Export that run, and name the folder `transformers` of "
            "the export as the model."
        )
    if not m.feature_cache:
        return
    images, texts = (m.freeze_backbone or locked == "all" for locked in (t.lock_image, t.lock_text))
    if not (images or texts):
        raise ConfigError(
            "`model.feature_cache` needs `model.freeze_backbone: true`, or a tower that `train.lock_image` or `train.lock_text` "
            "locks with `all`: features of trained towers change."
        )
    if m.pool == "auto" and not m.adapter_layers:
        raise ConfigError(
            "`model.feature_cache` keeps tokens, and `model.pool: auto` would read a tower's own pooler: set `model.pool` to "
            "mean or first, or `model.adapter_layers` to 1 or more."
        )
    random = {"data.crop_padding": d.crop_padding, "data.erase": d.erase, "data.colour_jitter": d.colour_jitter}
    if images and (changing := {name: value for name, value in random.items() if value}):
        raise ConfigError(
            f"`model.feature_cache` cannot help while every image is new: set {', '.join(f'{n}: 0' for n in changing)} (found "
            f"{changing}); flips may stay, both sides of an image are kept."
        )
    if t.zero_stage == 3:
        raise ConfigError(
            "`model.feature_cache` works at ZeRO stages 0 to 2: at stage 3 all workers must run a tower together, and one may "
            "have to where another need not."
        )


def check_batch(global_batch: int, workers: int, accumulation: int, images_per_object: int) -> None:
    """Raise BatchArithmeticError, with the numbers, when the global batch does not divide."""
    parts = workers * accumulation
    unit = math.lcm(parts, images_per_object)
    near = max(1, round(global_batch / unit)) * unit  # divides in every way
    if global_batch % parts:
        raise BatchArithmeticError(
            f"train.global_batch {global_batch} does not divide over {workers} workers x {accumulation} accumulation "
            f"= {parts} micro-batches ({global_batch} / {parts} = {global_batch / parts:.2f}); the nearest that works: {near}."
        )
    if global_batch % images_per_object:
        raise BatchArithmeticError(
            f"train.global_batch {global_batch} is not a multiple of train.images_per_object {images_per_object}; "
            f"the nearest that works: {near}."
        )
