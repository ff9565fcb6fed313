"""One typed tree for a whole run. The line under every field is its `--help`; unknown keys are errors.

`load_config(argv)` reads `--config FILE.yaml` first and flags (`--train.workers 2`) over it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Optional

import yaml

from mmref.errors import BatchArithmeticError, ConfigError
from mmref.locations import absolute, expanded, folder_name, in_utf8
from mmref.texts import parse_yaml, read_text

MIN_TAU = 0.01
"""Of the alignment, as in CLIP: training keeps a learned temperature above it."""
PLACES = ("run_dir", "data.root", "train.start_from")
"""Fields that hold a path or URL."""
PLACES_ON_NODES = ("data.cache_dir", "model.feature_cache")
"""Fields that hold a path of each node: `~` is the home directory there."""
NAMES_OR_PLACES = ("data.tokenizer", "model.dual", "model.vision", "model.text")
"""Fields that hold a path, URL, hub id or `package://` name."""


@dataclass
class DataConfig:
    """Where the samples come from and how they are read."""

    root: str = "data_shards/emoji"
    """Shard set: a directory or URL that holds manifest.json."""
    mix: dict[str, float] = field(default_factory=dict)
    """Further shard sets and the share of the steps that each gives: {"/data/flowers": 0.3}; `root` gives the rest."""
    window_shards: int = 0
    """Objects of a step come from a moving window of this many shards, for sets on object storage; 0: from the whole set."""
    cache_gb: float = 0.0
    """Disk on each node for shards of object storage, in GB; 0: none, byte ranges are read instead."""
    cache_dir: str = "~/.cache/mmref/shards"
    """Folder of these shards, on the node's own disk."""
    tokenizer: str = ""
    """Hub id or directory of the tokenizer; empty: the one of the backbone, or `tokenizer/` inside the shard set."""
    image_height: int = 64
    """Height in pixels that images are resized to."""
    image_width: int = 64
    """Width in pixels that images are resized to."""
    max_tokens: int = 24
    """Captions are cut to this many tokens, special tokens included."""
    image_mean: list[float] = field(default_factory=lambda: [0.481, 0.458, 0.408])
    """Mean of the red, green and blue channels (0 to 1), subtracted from images."""
    image_std: list[float] = field(default_factory=lambda: [0.269, 0.261, 0.276])
    """Standard deviation of the channels (0 to 1), that images are divided by."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    crop_padding: int = 4
    """Pixels of padding for the random shifted crop in training; 0: none."""
    erase: float = 0.0
    """Probability of erasing a random rectangle (2 to 40 % of the image) in training."""
    colour_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation in training; 0: none."""
    caption_noise: float = 0.0
    """Share of training captions (`swap`) or of their words (`drop`) that are spoilt, the same ones each time: robustness."""
    caption_noise_kind: Literal["swap", "drop"] = "swap"
    """`swap`: a caption is replaced by one of another object; `drop`: words are left out."""
    readers: int = 1
    """Ray Data actors (one CPU each) that read, decode and tokenise for one training worker."""
    steps_per_task: int = 4
    """Consecutive steps of one worker that a reader returns as one block: fewer is lower latency, more is less overhead."""
    max_bad_fraction: float = 0.001
    """Share of broken samples that is tolerated (each replaced, by another image of its object if there is one) before training
    stops."""


@dataclass
class ModelConfig:
    """Backbones and heads. Either `dual` (CLIP, SigLIP) or a pair `vision` + `text`."""

    dual: str = ""
    """Hub id or directory of a CLIP or SigLIP model."""
    dual_config: Optional[dict[str, Any]] = None
    """transformers config of a CLIP or SigLIP model to start from random weights: {model_type: clip, ...}."""
    vision: str = ""
    """Hub id or directory of the vision tower of a pair; package://NAME/path: a directory inside an installed package."""
    vision_config: Optional[dict[str, Any]] = None
    """Vision tower with random weights ({model_type: convnextv2, ...}) or by import path ({import: package.module:function})."""
    text: str = ""
    """Hub id or directory of the text tower of a pair; package://NAME/path: a directory inside an installed package."""
    text_config: Optional[dict[str, Any]] = None
    """Text tower with random weights ({model_type: bert, ...}) or by import path ({import: package.module:function, ...})."""
    embed_dim: int = 256
    """Width d of the shared space of a pair (a dual encoder brings its own)."""
    pool: Literal["auto", "first", "mean"] = "auto"
    """Global feature of a tower of a pair: `first` token, `mean` over tokens, or `auto` (the tower's own pooler, else mean)."""
    adapter_layers: int = 0
    """Transformer layers of width `embed_dim` trained on the tokens of each tower of a pair; 0: none."""
    freeze_backbone: bool = False
    """Train only projections, adapters and heads."""
    feature_cache: str = ""
    """Folder on a node's own disk that keeps the tokens of a frozen pair, so that each input is encoded once; empty: none."""
    feature_cache_gb: float = 10.0
    """Most that each tower's tokens may take of that disk; what does not fit is encoded every time."""


@dataclass
class ReferenceConfig:
    """The multi-modal references, `per_object` rows of width d for each training object."""

    per_object: int = 1
    """References K of one object."""
    update: Literal["moving_average", "gradient"] = "moving_average"
    """`moving_average`: references follow their object's features; `gradient`: global fusion as in the paper."""
    init: Literal["random", "mean"] = "random"
    """Start under `gradient`: random rows, or each object's moving average, which learning sets out from at `loss.guide_from`."""
    momentum: float = 0.8
    """Share of the old reference kept at each visit of its object (moving_average)."""
    assign: Literal["nearest", "modality"] = "nearest"
    """With K > 1 and moving_average: a feature updates its `nearest` reference, or images the even and texts the odd ones."""
    negatives: Literal["batch", "all", "sampled"] = "all"
    """Objects whose references are contrasted: those of the global batch, all, or the batch's plus `sampled_negatives`."""
    sampled_negatives: int = 4096
    """Random objects added to the batch's as negatives (negatives: sampled)."""
    score: Literal["max", "lme"] = "max"
    """With K > 1 an object's score is its best reference, or the log-mean-exp over them."""
    row_dtype: Literal["fp32", "bf16"] = "fp32"
    """How rows are stored (bf16: half the memory; arithmetic and optimizer state stay fp32)."""
    rows_on: Literal["device", "host"] = "device"
    """Where a worker's share of the rows lies: `host` keeps it in main memory, only a step's rows come to the GPU."""
    tau: float = 0.07
    """Temperature of fusion, of guidance where `loss.guide_tau` is 0, and of soft targets."""
    lr: float = 0.05
    """Learning rate of references under `gradient` (row-wise Adam on the owner)."""
    memory_tokens: int = 4
    """Keys and values that local reconstruction makes of each reference."""


@dataclass
class LossConfig:
    """L = align + w_fuse fuse + w_rec rec + w_guide guide + w_id id + w_mlm mlm (the last two: IRRA's objective)."""

    align: Literal["infonce", "sdm"] = "infonce"
    """Alignment of images and texts, every pair of the same object a positive: multi-positive InfoNCE, or SDM (IRRA)."""
    tau: float = 0.07
    """Temperature of the alignment."""
    learn_tau: bool = False
    """Learn the alignment's temperature, starting from `tau`."""
    w_fuse: float = 1.0
    """Weight of global fusion (trains references only). Under moving_average its size has no effect; above 0 it keeps references
    also where nothing else uses them."""
    w_rec: float = 0.0
    """Weight of local reconstruction (masked words from references)."""
    w_guide: float = 0.5
    """Weight of reference-guided learning (trains the encoders only)."""
    guide_on: Literal["both", "image", "text"] = "both"
    """Features that guidance acts on."""
    guide_tau: float = 0.0
    """Temperature of guidance; 0: `reference.tau`."""
    guide_soft: float = 0.0
    """Share of guidance's target that is spread over objects by the similarity of their references (ambiguous captions)."""
    guide_from: float = 0.2
    """Share of training after which guidance begins to ramp in."""
    guide_full: float = 0.4
    """Share of training at which it has its full weight."""
    caption_weight: float = 0.0
    """Captions weigh exp(this x the share of other objects whose references they resemble less) in alignment (in every pair they
    are in), in fusion and in guidance; ramped in with it. 0: alike; 20: a wrong one has a twentieth of the weight."""
    w_id: float = 0.0
    """Weight of identity classification of both features by one linear layer (IRRA); its size grows with the objects."""
    w_mlm: float = 0.0
    """Weight of masked words predicted from the tokens of the caption's own image (IRRA)."""
    mlm_layers: int = 4
    """Self-attention layers behind the cross-attention to the image in that prediction."""
    mask_rate: float = 0.15
    """Share of words masked for `w_rec` and `w_mlm` (80 % mask token, 10 % random, 10 % kept)."""
    rec_layers: int = 1
    """Blocks (self-attention, feed-forward, cross-attention to the references, feed-forward) of the reconstruction head."""
    rec_detach_text: bool = False
    """Stop the gradient of reconstruction into the text tower."""


@dataclass
class TrainConfig:
    """Optimisation and scale."""

    workers: int = 1
    """Ray Train workers (one GPU each where `gpu` is on)."""
    min_workers: int = 0
    """Fewest workers to go on with while nodes are missing, growing back to `workers`; 0: wait for replacements instead."""
    gpu: bool = False
    """Train on GPUs (NCCL); off: CPUs (gloo)."""
    cpus_per_worker: float = 1
    """CPUs reserved for each worker."""
    threads: int = 1
    """Torch threads of each worker on CPU."""
    global_batch: int = 192
    """Image-caption pairs of one step over all workers."""
    images_per_object: int = 2
    """Images Q of each object in a step; a step has P = global_batch / Q objects."""
    accumulation: int = 1
    """Micro-batches of a step on each worker: the same losses and gradients in less memory, about 1.4 x the time."""
    max_steps: int = 400
    """Length of training in steps."""
    seed: int = 0
    """Seed of the initial weights, the sample stream, masks and augmentation."""
    start_from: str = ""
    """Run directory whose best checkpoint gives the first weights, and the references of objects that both sets have."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage: what is sharded over workers (0 nothing, 1 optimizer, 2 + gradients, 3 + parameters)."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """`bf16`: matrix products and convolutions in bf16 (autocast), weights, norms and losses fp32; `auto`: where it is native."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (less memory, more time)."""
    compile: bool = False
    """Compile the towers with torch.compile: a slow first step (needs a C++ compiler), then faster ones; ZeRO stages 0 to 2."""
    lr: float = 1e-3
    """Peak learning rate of the backbone."""
    lr_new: float = 1.0
    """Learning rate of new modules (projections, heads) as a multiple of `lr`."""
    weight_decay: float = 0.05
    """AdamW weight decay (none on biases, norms and embeddings of positions)."""
    beta2: float = 0.98
    """AdamW beta2."""
    eps: float = 1e-6
    """AdamW epsilon."""
    warmup_steps: int = 50
    """Steps of linear warm-up; cosine to zero follows."""
    clip_norm: float = 1.0
    """Gradient norm is clipped to this; 0: no clipping."""
    log_every: int = 10
    """Steps between log lines (the only host synchronisation)."""
    eval_every: int = 0
    """Steps between evaluations on val (and checkpoints); 0: a tenth of training."""
    keep_checkpoints: int = 2
    """The best on val so many are kept, and the latest."""
    async_checkpoints: bool = True
    """Write checkpoints in the background: training stops for the copy to host memory only."""
    max_failures: int = 3
    """Worker failures that are recovered from before the run gives up."""
    storage_gb: float = 1.0
    """Size of Ray's object store when a local cluster is started, in GB."""

    @property
    def steps_between_evaluations(self) -> int:
        return self.eval_every or max(1, self.max_steps // 10)


@dataclass
class EvalConfig:
    """Evaluation: features, refinement, intervals."""

    batch: int = 128
    """Images or texts encoded at once."""
    workers: int = 1
    """Ray actors that compute features in `mmref evaluate`."""
    metric: Literal["mAP", "R@1", "R@1+mAP"] = "mAP"
    """What picks the best checkpoint and the refinement on val; mAP picks what lasts on new objects, of R@1 too."""
    class_protocol: bool = False
    """Also the protocol of sets whose objects are classes (CUB, Flowers): a class's mean text feature searches all images."""
    top_p: int = 1000
    """Candidates of the first pass that refinement re-scores; 0: all."""
    refine_kinds: list[Literal["sparse", "dense", "expansion"]] = field(default_factory=lambda: ["sparse", "dense"])
    """Codes that the search for the refinement tries, with every combination of the three below."""
    refine_weights: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.4, 0.8])
    """Weights of the reference-based similarity that it tries; no refinement always competes."""
    refine_top_rs: list[int] = field(default_factory=lambda: [16, 64, 256])
    """References in a sparse code or an expansion that it tries."""
    refine_taus: list[float] = field(default_factory=lambda: [0.02, 0.05, 0.1])
    """Temperatures of both that it tries."""
    refine_in_training: bool = False
    """Search the refinement at each evaluation on val too: checkpoints are then picked by their refined score."""
    test_in_training: bool = False
    """Score test at each evaluation too, to report the best of them beside the result, as papers that choose on test do."""
    bootstrap: int = 1000
    """Resamples of the 95 % intervals."""
    examples: int = 12
    """Queries shown in the report."""


@dataclass
class Config:
    """A training run."""

    run_dir: str = "runs/train"
    """Directory or URL for checkpoints, metrics and the report; the same directory again resumes the run."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def objects_per_step(self) -> int:
        return self.train.global_batch // self.train.images_per_object

    @property
    def micro_batch(self) -> int:
        return self.train.global_batch // (self.train.workers * self.train.accumulation)


def known_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of every field: ["run_dir", "data.root", ...]."""
    keys = []
    for f in dataclasses.fields(cls):
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            keys += known_keys(type(default), f"{prefix}{f.name}.")
        else:
            keys.append(prefix + f.name)
    return keys


def _check_keys(given: dict[str, Any], cls: type, where: str, prefix: str = "") -> None:
    """Raise ConfigError for the first key of a nested dict that is no field, naming the nearest one."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key, value in given.items():
        if key not in fields:
            raise unknown_key(prefix + str(key), where)
        factory: Any = fields[key].default_factory
        default = factory() if factory is not dataclasses.MISSING else None
        if dataclasses.is_dataclass(default):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: `{prefix}{key}` is a section and takes keys below it, found {value!r}.")
            _check_keys(value, type(default), where, f"{prefix}{key}.")


def unknown_key(key: str, where: str) -> ConfigError:
    """The error for a key that does not exist, with the nearest that does."""
    sections = [f.name for f in dataclasses.fields(Config) if f.name != "run_dir"]

    def alike(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    def closeness(known: str) -> tuple[float, bool, float]:
        """By the whole name or, where the section is wrong or missing, by the last part; most keys are of `train`."""
        whole, last = alike(key, known), alike(key.rsplit(".", 1)[-1], known.rsplit(".", 1)[-1])
        return max(whole, last), known.startswith("train."), whole

    near = max(known_keys() + sections, key=closeness)
    hint = f" Did you mean `{near}`?" if closeness(near)[0] >= 0.7 else " `mmref train --help` lists all keys."
    return ConfigError(f"{where}: unknown config key `{key}`.{hint}")


def build_parser() -> Any:
    """The jsonargparse parser of a run: `--config FILE` and a flag for every field."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="mmref train", exit_on_error=False, description="Train MMRef, evaluate it on val and test, write a report."
    )
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile, help="YAML file; flags after it win.")
    parser.add_class_arguments(Config, nested_key=None)
    return parser


def load_config(argv: list[str]) -> Config:
    """Config from flags (and the YAML files they name). Raises ConfigError; `--help` prints and exits."""
    import jsonargparse

    argv = _with_values(argv)
    for word in argv:
        name = word[2:].split("=")[0].removesuffix("+")
        if word.startswith("--") and name not in {"config", "help", "print_config"} and not _is_key(name):
            raise unknown_key(name, "command line")
    parser = build_parser()
    try:
        parsed = parser.parse_args(argv)
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise ConfigError(f"config: {error}") from None
    config = parser.instantiate_classes(parsed)
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(Config)}
    return check_config(with_places(Config(**values), lambda place: in_utf8(expanded(place))))


def _is_key(name: str) -> bool:
    keys = known_keys()
    return name in keys or any(name.startswith(k + ".") for k in keys if k.endswith("_config"))


class _Plain(yaml.SafeDumper):
    """YAML in ASCII with every text in quotation marks, so that none is read as a number."""


_Plain.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def _with_values(argv: list[str]) -> list[str]:
    """The command line with the values of its config files, their keys checked, in place of the names. Raises ConfigError.

    jsonargparse takes either, and would read a file in the encoding of the terminal.
    """
    import jsonargparse

    load, flag, words = jsonargparse.get_loader("yaml"), "--config=", []
    rest = iter(argv)
    for word in rest:
        path = next(rest, None) if word == "--config" else word.removeprefix(flag) if word.startswith(flag) else None
        if path is None:
            words.append(word)
            continue
        path = expanded(path)
        text = read_text(path, ConfigError)
        if not (values := parse_yaml(text, path, ConfigError)):
            raise ConfigError(f"{path} is empty: leave it out to train with the defaults.")
        _check_keys(values, Config, path)
        words.append(flag + yaml.dump(load(text), Dumper=_Plain, sort_keys=False))  # as it reads numbers itself
    return words


def read_yaml(path: str) -> dict[str, Any]:
    """Keys and values of a YAML file. Raises ConfigError that names the file, and the line where there is one."""
    return parse_yaml(read_text(path, ConfigError), path, ConfigError)


def check_config(config: Config) -> Config:
    """Check combinations that types cannot express; returns the config. Raises ConfigError."""
    t, m = config.train, config.model
    for name, value in (
        ("train.workers", t.workers),
        ("train.global_batch", t.global_batch),
        ("train.images_per_object", t.images_per_object),
        ("train.accumulation", t.accumulation),
        ("train.max_steps", t.max_steps),
        ("train.threads", t.threads),
        ("train.log_every", t.log_every),
        ("train.keep_checkpoints", t.keep_checkpoints),
        ("data.readers", config.data.readers),
        ("data.steps_per_task", config.data.steps_per_task),
        ("data.max_tokens", config.data.max_tokens),
        ("reference.per_object", config.reference.per_object),
        ("reference.memory_tokens", config.reference.memory_tokens),
        ("loss.mlm_layers", config.loss.mlm_layers),
        ("eval.batch", config.eval.batch),
        ("eval.workers", config.eval.workers),
        ("eval.bootstrap", config.eval.bootstrap),
    ):
        if value < 1:
            raise ConfigError(f"`{name}` must be at least 1, found {value}.")
    for name, share in (
        ("data.flip", config.data.flip),
        ("data.erase", config.data.erase),
        ("data.caption_noise", config.data.caption_noise),
        ("data.max_bad_fraction", config.data.max_bad_fraction),
        ("loss.mask_rate", config.loss.mask_rate),
        ("loss.guide_soft", config.loss.guide_soft),
        ("loss.guide_from", config.loss.guide_from),
        ("loss.guide_full", config.loss.guide_full),
        ("reference.momentum", config.reference.momentum),
        ("train.beta2", t.beta2),
    ):
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"`{name}` is a share between 0 and 1, found {share}.")
    for name, weight in (
        ("train.warmup_steps", t.warmup_steps),
        ("train.weight_decay", t.weight_decay),
        ("train.clip_norm", t.clip_norm),
        ("train.eval_every", t.eval_every),
        ("train.seed", t.seed),
        ("loss.w_fuse", config.loss.w_fuse),
        ("loss.w_rec", config.loss.w_rec),
        ("loss.w_guide", config.loss.w_guide),
        ("loss.guide_tau", config.loss.guide_tau),
        ("loss.caption_weight", config.loss.caption_weight),
        ("loss.w_id", config.loss.w_id),
        ("loss.w_mlm", config.loss.w_mlm),
        ("eval.examples", config.eval.examples),
        ("eval.top_p", config.eval.top_p),
    ):
        if not weight >= 0:
            raise ConfigError(f"`{name}` must be at least 0, found {weight}.")
    if config.data.window_shards < 0 or config.data.cache_gb < 0:
        raise ConfigError(
            f"`data.window_shards` and `data.cache_gb` must not be negative, found {config.data.window_shards} and "
            f"{config.data.cache_gb}."
        )
    mix = config.data.mix
    if any(not 0.001 <= share < 1 for share in mix.values()) or sum(mix.values()) >= 1:
        raise ConfigError(
            f"`data.mix` gives each further shard set a share of the steps, from 0.001 up and below 1 in all (`data.root` "
            f"has the rest), found {mix}."
        )
    for name, positive in (("reference.tau", config.reference.tau), ("train.lr", t.lr),
                           ("train.lr_new", t.lr_new), ("train.eps", t.eps),
                           ("train.storage_gb", t.storage_gb)):  # fmt: skip
        if not 0 < positive < math.inf:
            raise ConfigError(f"`{name}` must be above 0 and finite, found {positive}.")
    if not 0 <= t.cpus_per_worker < math.inf or (t.cpus_per_worker > 1 and t.cpus_per_worker % 1):
        raise ConfigError(
            f"`train.cpus_per_worker` is a whole number, or a share of one CPU, as Ray gives them; found {t.cpus_per_worker}."
        )
    if t.max_failures < -1:
        raise ConfigError(f"`train.max_failures` is a number of failures, or -1 for any; found {t.max_failures}.")
    if not config.loss.tau >= MIN_TAU:
        raise ConfigError(
            f"`loss.tau` must be at least {MIN_TAU} (CLIP's bound, learned or not), found {config.loss.tau}."
        )
    if config.loss.guide_full < config.loss.guide_from:
        raise ConfigError(
            f"`loss.guide_full` ({config.loss.guide_full}) comes before `loss.guide_from` ({config.loss.guide_from})."
        )
    loss, reference = config.loss, config.reference
    random = reference.update == "gradient" and reference.init == "random" and not t.start_from
    if random and loss.w_guide > 0 and not (loss.w_fuse or loss.w_rec):
        raise ConfigError(
            "`reference.update: gradient` learns references by fusion, and `loss.w_fuse` is 0: guidance would follow random "
            "references. Set `loss.w_fuse` to 1, `reference.init: mean` or `reference.update: moving_average`."
        )
    if config.reference.assign == "modality" and config.reference.per_object % 2:
        raise ConfigError(
            "`reference.assign: modality` needs an even `reference.per_object` (image and text references)."
        )
    check_batch(t.global_batch, t.workers, t.accumulation, t.images_per_object)
    if t.compile and t.zero_stage == 3:
        raise ConfigError(
            "`train.compile` works at ZeRO stages 0 to 2: at stage 3 DeepSpeed gathers every layer's parameters in between, "
            "which leaves nothing to compile. Lower `train.zero_stage`, or leave `train.compile` off."
        )
    if not 0 <= t.min_workers <= t.workers:
        raise ConfigError(
            f"`train.min_workers` must be between 0 and `train.workers` {t.workers}, found {t.min_workers}."
        )
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
            "configs/emoji.yaml and configs/clip_vit_b16.yaml show both."
        )
    _check_towers(config)
    return config


def _check_towers(config: Config) -> None:
    """Raise ConfigError for adapters or a feature cache where they cannot work."""
    m, d = config.model, config.data
    if m.adapter_layers < 0:
        raise ConfigError(f"`model.adapter_layers` must be at least 0, found {m.adapter_layers}.")
    if (m.adapter_layers or m.feature_cache) and (m.dual or m.dual_config):
        raise ConfigError(
            "`model.adapter_layers` and `model.feature_cache` are for a pair of towers (`model.vision`, `model.text`); a dual "
            "encoder (`model.dual`) brings its own projections."
        )
    if m.feature_cache_gb <= 0:
        raise ConfigError(f"`model.feature_cache_gb` must be above 0, found {m.feature_cache_gb}.")
    if not m.feature_cache:
        return
    if not m.freeze_backbone:
        raise ConfigError(
            "`model.feature_cache` needs `model.freeze_backbone: true`: features of trained towers change."
        )
    if m.pool == "auto" and not m.adapter_layers:
        raise ConfigError(
            "`model.feature_cache` keeps tokens, and `model.pool: auto` would read a tower's own pooler: set `model.pool` to "
            "mean or first, or `model.adapter_layers` to 1 or more."
        )
    random = {"data.crop_padding": d.crop_padding, "data.erase": d.erase, "data.colour_jitter": d.colour_jitter}
    if changing := {name: value for name, value in random.items() if value}:
        raise ConfigError(
            f"`model.feature_cache` cannot help while every image is new: set {', '.join(f'{n}: 0' for n in changing)} (found "
            f"{changing}); flips may stay, both sides of an image are kept."
        )
    if config.train.zero_stage == 3:
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


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict of a config."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], where: str = "config") -> Config:
    """Config from a nested dict, unknown keys refused. Raises ConfigError."""
    _check_keys(values, Config, where)
    config = Config()
    for key, value in values.items():
        section = getattr(config, key)
        if dataclasses.is_dataclass(section):
            setattr(config, key, dataclasses.replace(section, **value))  # type: ignore[type-var]
        else:
            setattr(config, key, value)
    return check_config(config)


def dump_yaml(config: Config) -> str:
    """The resolved tree as YAML, in field order."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def config_hash(config: Config) -> str:
    """12 hex digits of everything that changes results: not the run directory, scale or logging."""
    values = to_dict(config)
    values.pop("run_dir")
    values["data"]["root"] = folder_name(config.data.root)  # a set may be moved
    for key in ("workers", "min_workers", "gpu", "cpus_per_worker", "threads", "zero_stage", "accumulation", "log_every",
                "eval_every", "keep_checkpoints", "async_checkpoints", "max_failures", "storage_gb", "gradient_checkpointing",
                "compile"):  # fmt: skip
        values["train"].pop(key)
    if config.data.mix:  # in order, which numbers objects and images
        values["data"]["mix"] = [[folder_name(root), share] for root, share in config.data.mix.items()]
    values["data"]["max_bad_fraction"] = DataConfig.max_bad_fraction  # when a run ends, not what it learns
    values["train"]["start_from"] = absolute(config.train.start_from) if config.train.start_from else ""
    for name in NAMES_OR_PLACES:  # runs of older versions hold a folder's path as it was given
        section, key = name.split(".")
        values[section][key] = _name_or_place(values[section][key], absolute)
    for key in ("readers", "steps_per_task", "cache_gb", "cache_dir"):
        values["data"].pop(key)
    values["reference"].pop("rows_on")
    for key in ("feature_cache", "feature_cache_gb"):
        values["model"].pop(key)
    values.pop("eval")
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def with_absolute_paths(config: Config) -> Config:
    """A copy that means the same in another directory, as Ray's workers run in."""
    return with_places(config, lambda place: absolute(expanded(place)))


def with_places(config: Config, to: Callable[[str], str]) -> Config:
    """A checked copy in which every path has passed through `to`; hub ids and names of packages are left alone.

    Raises ConfigError where two shard sets of `data.mix` are one and the same.
    """
    values = to_dict(config)
    mix = values["data"]["mix"]
    values["data"]["mix"] = {to(root): share for root, share in mix.items()}
    if len(values["data"]["mix"]) < len(mix):
        raise ConfigError(f"`data.mix` names a shard set twice: {', '.join(mix)}.")
    for name in (*PLACES, *PLACES_ON_NODES, *NAMES_OR_PLACES):
        *section, key = name.split(".")
        at = values[section[0]] if section else values
        at[key] = placed(name, at[key], to)
    return from_dict(values)


def placed(name: str, value: str, to: Callable[[str], str]) -> str:
    """The value of a field through `to`, where it is a path that means the same on every node; any other as it is."""
    if not value and name not in ("run_dir", "data.root"):
        return value
    if name in PLACES:
        return to(value)
    if name in PLACES_ON_NODES:
        return value if to(value) and value.startswith("~") else to(value)
    return _name_or_place(value, to) if name in NAMES_OR_PLACES else value


def _name_or_place(value: str, to: Callable[[str], str]) -> str:
    """A path through `to`; a hub id as it is. Which of the two it is, transformers decides in the same way."""
    return to(value) if value.startswith(("/", "~", ".")) or os.path.isdir(value) else value


def ramp(step: int, max_steps: int, start: float, full: float) -> float:
    """Weight in [0, 1] of a loss that ramps in linearly between two shares of training."""
    done = step / max(max_steps, 1)
    if done >= full:
        return 1.0
    return 0.0 if done < start else (done - start) / (full - start)
