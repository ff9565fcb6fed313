"""The typed tree of a run. The line under every field is its `--help`; the field says its own bounds, its unit, and whether it is
part of the run's identity."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Optional, Union

from mmref.config.option import Option, option

# `auto` stands in a config until `mmref.config.inputs.settled` has put a number in its place: what computes sees numbers.
if TYPE_CHECKING:
    AutoInt = int
    AutoFloats = list[float]
    AutoBool = bool
else:
    AutoInt = Union[Literal["auto"], int]
    AutoFloats = Union[Literal["auto"], list[float]]
    AutoBool = Union[Literal["auto"], bool]
AUTO = "auto"

SEEDS = 2**63
"""Seeds lie below it: of a larger one a draw would not see every bit."""
MIN_TAU = 0.01
"""Of the alignment, as in CLIP: training keeps a learned temperature above it."""


@dataclass
class DataConfig:
    """Where the samples come from and how they are read."""

    root: str = "data_shards/emoji"
    """Shard set: a directory or URL that holds manifest.json."""
    mix: dict[str, float] = field(default_factory=dict)
    """Further shard sets and the share of the steps that each gives: {"/data/flowers": 0.3}; `root` gives the rest."""
    max_objects: int = option(0, at_least=0, unit="objects", added=True)
    """Train on this many objects, drawn by the seed: what would fewer of them give? 0: all."""
    max_images: int = option(0, at_least=0, unit="images", added=True)
    """Train on this many images of an object at most, drawn by the seed; 0: all."""
    window_shards: int = option(0, at_least=0, unit="shards")
    """Objects of a step come from a moving window of this many shards, for sets on object storage; 0: from the whole set."""
    neighbors: str = option("", added=True)
    """File of `mmref mine` that says which objects are easily confused, path or URL; empty: the objects of a step are drawn
    uniformly."""
    hard_share: float = option(0.5, share=True, added=True)
    """Share of a step's objects that are drawn in groups of such neighbors; the others uniformly. Works with `neighbors`."""
    group_size: int = option(4, at_least=2, unit="objects", added=True)
    """Objects of one such group: one, and others drawn from its neighbors."""
    cache_gb: float = option(0.0, at_least=0, unit="GB", identity=False)
    """Disk on each node for shards of object storage, in GB; 0: none, byte ranges are read instead."""
    cache_dir: str = option("", identity=False)
    """Folder of these shards, on the node's own disk; empty: `shards` below MMREF_CACHE, by default ~/.cache/mmref."""
    tokenizer: str = ""
    """Hub id or directory of the tokenizer; empty: the one of the backbone, or `tokenizer/` inside the shard set."""
    image_height: AutoInt = option(AUTO, at_least=1, unit="px", words=(AUTO,))
    """Height in pixels that images are resized to; `auto`: that of `model.dual`, 64 without it."""
    image_width: AutoInt = option(AUTO, at_least=1, unit="px", words=(AUTO,))
    """Width in pixels that images are resized to; `auto`: that of `model.dual`, 64 without it."""
    resize: Literal["auto", "area", "stretch", "crop"] = "auto"
    """`area`: to height x width, averaged when it shrinks, bicubic when it grows; `stretch`: to height x width by `resample`;
    `crop`: the shorter side to `resize_edge` by `resample`, then the center; `auto`: as `model.dual` has it at its own size,
    else `area`."""
    resample: Literal["auto", "nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "auto"
    """Pillow's filter for `stretch` and `crop`; `auto`: that of `model.dual`, else bicubic."""
    resize_edge: AutoInt = option(AUTO, at_least=1, unit="px", words=(AUTO,))
    """Shorter side in pixels that `crop` resizes to; `auto`: that of `model.dual`, else the longer one of height and width."""
    max_tokens: AutoInt = option(AUTO, at_least=1, unit="tokens", words=(AUTO,))
    """Captions are cut to this many tokens, special tokens included; `auto`: as many as `model.dual` reads, 24 without it."""
    padding: Literal["auto", "right", "left"] = "auto"
    """Side on which captions are padded; `auto`: that of the tokenizer where `model.dual` reads padding (SigLIP), else right."""
    image_mean: AutoFloats = option(AUTO, length=3, words=(AUTO,))
    """Mean of the red, green and blue channels (0 to 1), subtracted from images; `auto`: that of `model.dual`, else CLIP's."""
    image_std: AutoFloats = option(AUTO, above=0, length=3, words=(AUTO,))
    """Standard deviation of the channels (0 to 1), that images are divided by; `auto`: that of `model.dual`, else CLIP's."""
    flip: float = option(0.5, share=True)
    """Probability of a horizontal flip in training."""
    crop_padding: int = option(4, at_least=0, unit="px")
    """Pixels of padding for the random shifted crop in training; 0: none."""
    erase: float = option(0.0, share=True)
    """Probability of erasing a random rectangle (2 to 40 % of the image) in training."""
    colour_jitter: float = option(0.0, at_least=0)
    """Strength of random brightness, contrast and saturation in training; 0: none."""
    caption_noise: float = option(0.0, share=True)
    """Share of training captions (`swap`) or of their words (`drop`) that are spoilt, the same ones each time: robustness."""
    caption_noise_kind: Literal["swap", "drop"] = "swap"
    """`swap`: a caption is replaced by one of another object; `drop`: words are left out."""
    readers: int = option(1, at_least=1, identity=False)
    """Ray Data actors (one CPU each) that read, decode and tokenise for one training worker."""
    steps_per_task: int = option(4, at_least=1, unit="steps", identity=False)
    """Consecutive steps of one worker that a reader returns as one block: fewer is lower latency, more is less overhead."""
    max_bad_fraction: float = option(0.001, share=True, identity=False)
    """Share of broken samples that is tolerated (each replaced, by another image of its object if there is one) before training
    stops."""


@dataclass
class ModelConfig:
    """Backbones and heads. Either `dual` (CLIP, SigLIP) or a pair `vision` + `text`."""

    dual: str = ""
    """Hub id or directory of a dual encoder: CLIP, SigLIP, Chinese-CLIP, VisionTextDualEncoder."""
    dual_config: Optional[dict[str, Any]] = None
    """transformers config of such a model to start from random weights: {model_type: clip, ...}."""
    vision: str = ""
    """Hub id or directory of the vision tower of a pair; package://NAME/path: a directory inside an installed package."""
    vision_config: Optional[dict[str, Any]] = None
    """Vision tower with random weights ({model_type: convnextv2, ...}) or by import path ({import: package.module:function})."""
    text: str = ""
    """Hub id or directory of the text tower of a pair; package://NAME/path: a directory inside an installed package."""
    text_config: Optional[dict[str, Any]] = None
    """Text tower with random weights ({model_type: bert, ...}) or by import path ({import: package.module:function, ...})."""
    embed_dim: int = option(256, at_least=1)
    """Width d of the shared space of a pair (a dual encoder brings its own)."""
    pool: Literal["auto", "first", "mean"] = "auto"
    """Global feature of a tower of a pair: `first` token, `mean` over tokens, or `auto` (the tower's own pooler, else mean)."""
    adapter_layers: int = option(0, at_least=0)
    """Transformer layers of width `embed_dim` trained on the tokens of each tower of a pair; 0: none."""
    lora_image: int = option(0, at_least=0, added=True)
    """Rank of LoRA's adapters on the linear layers of the image tower, of which nothing else is trained; 0: none."""
    lora_text: int = option(0, at_least=0, added=True)
    """The same of the text tower."""
    lora_alpha: float = option(16.0, above=0, added=True)
    """Strength of these adapters: what they add counts alpha / rank."""
    freeze_backbone: bool = False
    """Train only projections, adapters and heads."""
    feature_cache: str = option("", identity=False)
    """Folder on a node's own disk that keeps the tokens of a pair's frozen towers, so that each input is encoded once; empty:
    none."""
    feature_cache_gb: float = option(10.0, above=0, unit="GB", identity=False)
    """Most that each tower's tokens may take of that disk; what does not fit is encoded every time."""


@dataclass
class ReferenceConfig:
    """The multi-modal references, `per_object` rows of width d for each training object."""

    per_object: int = option(1, at_least=1)
    """References K of one object."""
    update: Literal["moving_average", "gradient"] = "moving_average"
    """`moving_average`: references follow their object's features; `gradient`: global fusion as in the paper."""
    init: Literal["random", "mean"] = "random"
    """Start under `gradient`: random rows, or each object's moving average, which learning sets out from at `loss.guide_from`."""
    momentum: float = option(0.8, share=True)
    """Share of the old reference kept at each visit of its object (moving_average)."""
    assign: Literal["nearest", "modality"] = "nearest"
    """With K > 1 and moving_average: a feature updates its `nearest` reference, or images the even and texts the odd ones."""
    negatives: Literal["batch", "all", "sampled"] = "all"
    """Objects whose references are contrasted: those of the global batch, all, or the batch's plus `sampled_negatives`."""
    sampled_negatives: int = option(4096, at_least=0)
    """Random objects added to the batch's as negatives (negatives: sampled)."""
    score: Literal["max", "lme"] = "max"
    """With K > 1 an object's score is its best reference, or the log-mean-exp over them."""
    row_dtype: Literal["fp32", "bf16"] = "fp32"
    """How rows are stored (bf16: half the memory; arithmetic and optimizer state stay fp32)."""
    rows_on: Literal["device", "host"] = option("device", identity=False)
    """Where a worker's share of the rows lies: `host` keeps it in main memory, only a step's rows come to the GPU."""
    tau: float = option(0.07, above=0)
    """Temperature of fusion, of guidance where `loss.guide_tau` is 0, and of soft targets."""
    margin: float = option(0.0, at_least=0, below=2, added=True)
    """What is taken off the cosine with the references of the own object in fusion and guidance (CosFace); 0: nothing."""
    lr: float = option(0.05, above=0)
    """Learning rate of references under `gradient` (row-wise Adam on the owner)."""
    memory_tokens: int = option(4, at_least=1)
    """Keys and values that local reconstruction makes of each reference."""


@dataclass
class LossConfig:
    """L = align + w_fuse fuse + w_rec rec + w_guide guide + w_id id + w_mlm mlm (the last two: IRRA's objective)."""

    align: Literal["infonce", "sdm", "sigmoid", "rde"] = "infonce"
    """Alignment of images and texts, every pair of the same object a positive: multi-positive InfoNCE, SDM (IRRA), SigLIP's
    sigmoid loss of each pair by itself, or RDE's triplets, of which pairs that it takes for wrong are left out."""
    tau: float = option(0.07, at_least=MIN_TAU)
    """Temperature of the alignment."""
    learn_tau: bool = False
    """Learn the alignment's temperature, starting from `tau`."""
    bias: float = option(-10.0, at_least=-100, added=True)
    """Start of the bias that `align: sigmoid` adds to its logits and learns."""
    rde_tau: float = option(0.015, at_least=MIN_TAU, added=True)
    """Temperature of the soft maximum over negatives under `align: rde`."""
    rde_margin: float = option(0.1, at_least=0, added=True)
    """What a positive's cosine is to be above that maximum under `align: rde`."""
    rde_from: float = option(0.0, share=True, added=True)
    """Share of training after which `align: rde` takes over from InfoNCE, and first divides pairs into clean and wrong ones."""
    w_fuse: float = option(1.0, at_least=0)
    """Weight of global fusion (trains references only). Under moving_average its size has no effect; above 0 it keeps references
    also where nothing else uses them."""
    w_rec: float = option(0.0, at_least=0)
    """Weight of local reconstruction (masked words from references)."""
    w_guide: float = option(0.5, at_least=0)
    """Weight of reference-guided learning (trains the encoders only)."""
    guide_on: Literal["both", "image", "text"] = "both"
    """Features that guidance acts on."""
    guide_tau: float = option(0.0, at_least=0)
    """Temperature of guidance; 0: `reference.tau`."""
    guide_soft: float = option(0.0, share=True)
    """Share of guidance's target that is spread over objects by the similarity of their references (ambiguous captions)."""
    guide_from: float = option(0.2, share=True)
    """Share of training after which guidance begins to ramp in."""
    guide_full: float = option(0.4, share=True)
    """Share of training at which it has its full weight."""
    caption_weight: float = option(0.0, at_least=0)
    """Captions weigh exp(this x the share of other objects whose references they resemble less) in alignment (in every pair they
    are in), in fusion and in guidance; ramped in with it. 0: alike; 20: a wrong one has a twentieth of the weight."""
    w_id: float = option(0.0, at_least=0)
    """Weight of identity classification of both features by one linear layer (IRRA); its size grows with the objects."""
    w_mlm: float = option(0.0, at_least=0)
    """Weight of masked words predicted from the tokens of the caption's own image (IRRA)."""
    mlm_layers: int = option(4, at_least=1)
    """Self-attention layers behind the cross-attention to the image in that prediction."""
    mask_rate: float = option(0.15, share=True)
    """Share of words masked for `w_rec` and `w_mlm` (80 % mask token, 10 % random, 10 % kept)."""
    rec_layers: int = option(1, at_least=1)
    """Blocks (self-attention, feed-forward, cross-attention to the references, feed-forward) of the reconstruction head."""
    rec_detach_text: bool = False
    """Stop the gradient of reconstruction into the text tower."""

    @property
    def uses_references(self) -> bool:
        """Whether anything in training needs references: then they are kept, set and refined with."""
        return max(self.w_guide, self.w_fuse, self.w_rec, self.caption_weight) > 0

    @property
    def masks_words(self) -> bool:
        """Whether training predicts masked words: then every caption is masked, and passes through its tower once more."""
        return max(self.w_rec, self.w_mlm) > 0


@dataclass
class TrainConfig:
    """Optimisation and scale."""

    workers: int = option(1, at_least=1, identity=False)
    """Ray Train workers (one GPU each where `gpu` is on)."""
    min_workers: int = option(0, at_least=0, identity=False)
    """Fewest workers to go on with while nodes are missing, growing back to `workers`; 0: wait for replacements instead."""
    gpu: AutoBool = option(AUTO, words=(AUTO,), identity=False)
    """Train on GPUs (NCCL); false: CPUs (gloo); `auto`: on GPUs where the cluster has one for each worker."""
    cpus_per_worker: float = option(1, at_least=0, unit="CPUs", identity=False)
    """CPUs reserved for each worker."""
    threads: Union[Literal["auto"], int] = option("auto", at_least=1, words=("auto",), identity=False)
    """Torch threads of each worker on CPU; `auto`: the cores that its node lets it use, shared out over the workers there."""
    global_batch: int = option(192, at_least=1, unit="pairs")
    """Image-caption pairs of one step over all workers."""
    images_per_object: int = option(2, at_least=1)
    """Images Q of each object in a step; a step has P = global_batch / Q objects."""
    accumulation: int = option(1, at_least=1, identity=False)
    """Micro-batches of a step on each worker: the same losses and gradients in less memory, about 1.4 x the time."""
    max_steps: int = option(400, at_least=0, unit="steps")
    """Length of training in steps; 0: as `epochs` says."""
    epochs: float = option(0.0, at_least=0, unit="epochs", added=True)
    """Length of training in place of `max_steps`: in an epoch each object of `data.root` has one turn; 0: `max_steps` says."""
    seed: int = option(0, below=SEEDS)
    """Seed of the initial weights, the sample stream, masks and augmentation."""
    start_from: str = ""
    """Run (its best checkpoint), export or pretrained model of the same towers that gives the first weights, and the references
    of objects that both sets have."""
    zero_stage: Literal[0, 1, 2, 3] = option(1, identity=False)
    """DeepSpeed ZeRO stage: what is sharded over workers (0 nothing, 1 optimizer, 2 + gradients, 3 + parameters)."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """`bf16`: matrix products and convolutions in bf16 (autocast), weights, norms and losses fp32; `auto`: where it is native."""
    gradient_dtype: Literal["fp32", "bf16"] = option("fp32", added=True)
    """How gradients travel between workers: `bf16` halves what is sent, and each sum over workers is rounded to 8 bits."""
    gradient_checkpointing: bool = option(False, identity=False)
    """Recompute activations in the backward pass (less memory, more time)."""
    compile: bool = option(False, identity=False)
    """Compile the towers with torch.compile: a slow first step (needs a C++ compiler), then faster ones; ZeRO stages 0 to 2."""
    lr: float = option(1e-3, above=0)
    """Peak learning rate of the backbone."""
    layer_decay: float = option(1.0, share=True, added=True)
    """Learning rate of a tower's layer as a multiple of that of the next: 0.75 trains what lies deep down least; 1: all alike."""
    lock_image: Union[Literal["all"], int] = option(0, at_least=0, words=("all",), unit="layers", added=True)
    """First layers of the image tower that stay as they are, with what lies before them, or `all` of the tower; 0: none."""
    lock_text: Union[Literal["all"], int] = option(0, at_least=0, words=("all",), unit="layers", added=True)
    """The same of the text tower."""
    lr_new: float = option(1.0, above=0)
    """Learning rate of new modules (projections, heads) as a multiple of `lr`."""
    weight_decay: float = option(0.05, at_least=0)
    """AdamW weight decay (none on biases, norms and embeddings of positions)."""
    beta2: float = option(0.98, at_least=0, below=1)
    """AdamW beta2."""
    eps: float = option(1e-6, above=0)
    """AdamW epsilon."""
    ema: float = option(0.0, at_least=0, below=1, added=True)
    """Decay of a moving average of the weights, which evaluations and exports use in their place (0.999); 0: none."""
    warmup_steps: int = option(50, at_least=0, unit="steps")
    """Steps of linear warm-up; cosine to zero follows."""
    clip_norm: float = option(1.0, at_least=0)
    """Gradient norm is clipped to this; 0: no clipping."""
    log_every: int = option(10, at_least=1, unit="steps", identity=False)
    """Steps between log lines (the only host synchronisation)."""
    profile: int = option(0, at_least=0, unit="steps", identity=False)
    """Steps that rank 0 traces after ten to warm up, into `profile/` of the run; 0: none. `--profile` alone traces 5."""
    sinks: list[str] = option([], identity=False)
    """Where the numbers of metrics.jsonl go besides TensorBoard: wandb, mlflow, trackio, or what a package provides."""
    eval_every: int = option(0, at_least=0, unit="steps", identity=False)
    """Steps between evaluations on val (and checkpoints); 0: a tenth of training."""
    keep_checkpoints: int = option(2, at_least=1, identity=False)
    """The best on val so many are kept, and the latest."""
    async_checkpoints: bool = option(True, identity=False)
    """Write checkpoints in the background: training stops for the copy to host memory only."""
    max_failures: int = option(3, at_least=-1, identity=False)
    """Worker failures that are recovered from before the run gives up."""
    storage_gb: float = option(1.0, above=0, unit="GB", identity=False)
    """Size of Ray's object store when a local cluster is started, in GB."""

    @property
    def on_gpu(self) -> bool:
        """Whether workers compute on GPUs; `auto` is settled before they start (`mmref.cluster.resources.with_gpus`)."""
        return self.gpu is True

    @property
    def steps_between_evaluations(self) -> int:
        return self.eval_every or max(1, self.max_steps // 10)


@dataclass
class EvalConfig:
    """Evaluation: features, refinement, intervals."""

    batch: int = option(128, at_least=1)
    """Images or texts encoded at once."""
    workers: int = option(1, at_least=0)
    """Ray actors that compute features in `mmref evaluate`; 0: in its own process, as where Ray is not installed."""
    metric: Literal["mAP", "R@1", "R@1+mAP"] = "mAP"
    """What picks the best checkpoint and the refinement on val; mAP picks what lasts on new objects, of R@1 too."""
    class_protocol: bool = False
    """Also the protocol of sets whose objects are classes (CUB, Flowers): a class's mean text feature searches all images."""
    image_to_image: bool = False
    """Also image to image (re-identification): every image searches the others of its split for images of its object."""
    same_camera: str = ""
    """Image to image where an object's images by one camera do not meet: the field of the samples' json that names the camera."""
    captions_as_one: Literal["none", "image", "object"] = "none"
    """Also all captions of each image, or of each object, as one query: the mean of their features."""
    top_p: int = option(1000, at_least=0)
    """Candidates of the first pass that refinement re-scores; 0: all."""
    refine_kinds: list[Literal["sparse", "dense", "expansion"]] = field(default_factory=lambda: ["sparse", "dense"])
    """Codes that the search for the refinement tries, with every combination of the three below."""
    refine_weights: list[float] = option([0.05, 0.1, 0.2, 0.4, 0.8], at_least=0)
    """Weights of the reference-based similarity that it tries; no refinement always competes."""
    refine_top_rs: list[int] = option([16, 64, 256], at_least=1)
    """References in a sparse code or an expansion that it tries."""
    refine_taus: list[float] = option([0.02, 0.05, 0.1], above=0)
    """Temperatures of both that it tries."""
    refine_in_training: bool = False
    """Search the refinement at each evaluation on val too: checkpoints are then picked by their refined score."""
    test_in_training: bool = False
    """Score test at each evaluation too, to report the best of them beside the result, as papers that choose on test do."""
    bootstrap: int = option(1000, at_least=1, unit="resamples")
    """Resamples of the 95 % intervals."""
    examples: int = option(12, at_least=0)
    """Queries shown in the report, the first three at its top."""


@dataclass
class Config:
    """A training run."""

    run_dir: str = option("runs/train", identity=False)
    """Directory or URL for checkpoints, metrics and the report; the same directory again resumes the run."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig, metadata={"option": Option(identity=False)})

    @property
    def objects_per_step(self) -> int:
        return self.train.global_batch // self.train.images_per_object

    @property
    def micro_batch(self) -> int:
        return self.train.global_batch // (self.train.workers * self.train.accumulation)
