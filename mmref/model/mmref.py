"""The MMRef module: towers, temperature and heads in one forward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmref.config import AUTO, MIN_TAU, Config, DataConfig, LossConfig, ReferenceConfig, TrainConfig
from mmref.errors import ModelError
from mmref.losses import identity_loss, reconstruction_loss
from mmref.model.backbone import Backbone, PairBackbone, build_backbone
from mmref.model.depth import lock
from mmref.model.lora import MARK, add_lora
from mmref.model.text_groups import TextGroup, encode_groups
from mmref.model.word_decoder import ImageWordHead, ReconstructionHead
from mmref.randomness import RandomStream, torch_seed

TRAINING_ONLY = ("classify.",)  # parameters that a model which only encodes is built without
HEADS = ("reconstruct.", "image_words.")  # of losses that a run may have or not
LOGITS = ("log_scale", "logit_bias")  # what turns cosines into the alignment's logits


class Masked(NamedTuple):
    """Masked captions of a micro-batch."""

    ids: Tensor  # (B, L) masked token ids
    at: Tensor  # (M,) places of the masked words in the flattened captions
    words: Tensor  # (M,) what stood there
    references: Tensor | None  # (B, K, d) references of each sample's object; None where training has none


class Output(NamedTuple):
    """What a forward gives; parts that were not asked for are None."""

    image: Tensor | None  # (B, d) L2-normalised, fp32
    text: Tensor | None  # (B, d) L2-normalised, fp32
    rec_sum: Tensor | None  # scalar: summed cross-entropy over the masked words, from references
    mlm_sum: Tensor | None  # the same, from images
    id_sum: Tensor | None  # scalar: summed cross-entropy of the objects over images and texts
    scale: Tensor  # (1,) inverse temperature of the alignment
    bias: Tensor | None = None  # (1,) of its logits, under `loss.align: sigmoid`


class AtMost(torch.autograd.Function):
    """min(x, bound), with a gradient above the bound as well where it leads back: a clamp would stay there for ever."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x >= bound)
        return x.clamp(max=bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (above,) = ctx.saved_tensors
        return torch.where(above & (grad < 0), 0, grad), None


class MMRef(nn.Module):
    """Everything that is trained by the engine: the references themselves live outside, in the bank.

    All parameters are used inside `forward`, which is what ZeRO-3 needs: it gathers them around it.
    """

    def __init__(
        self,
        backbone: Backbone,
        loss: LossConfig,
        reference: ReferenceConfig,
        gradient_checkpointing: bool = False,
        bf16: bool = False,
        objects: int = 0,
        plain_attention: bool = False,
    ) -> None:
        """
        Args:
            objects: of training, which `loss.w_id` classifies; 0 for a model that is only to encode.
            plain_attention: train with products and a softmax in place of PyTorch's fused attention, whose backward pass
                in bf16 takes several times as long on a CPU.
        """
        super().__init__()
        self.backbone, self.bf16, self.compiled = backbone, bf16, False
        self.plain_attention = plain_attention
        self.locked: list[nn.Module] = []
        self.rec_detach_text = loss.rec_detach_text
        # The shape is (1,), since DeepSpeed cannot broadcast 0-dim parameters.
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / loss.tau)]), requires_grad=loss.learn_tau)
        self.logit_bias = nn.Parameter(torch.tensor([loss.bias])) if loss.align == "sigmoid" else None
        self.reconstruct = None
        if loss.w_rec > 0:
            self.reconstruct = ReconstructionHead(
                backbone.embed_dim, backbone.text_width, backbone.vocab_size, loss.rec_layers, reference.memory_tokens
            )
        self.image_words = None
        if loss.w_mlm > 0:
            self.image_words = ImageWordHead(backbone.embed_dim, backbone.vocab_size, loss.mlm_layers)
        self.classify = None
        if loss.w_id > 0 and objects:
            self.classify = nn.Linear(backbone.embed_dim, objects)
            nn.init.normal_(self.classify.weight, std=0.001)
            nn.init.zeros_(self.classify.bias)
        if gradient_checkpointing:
            for tower in (backbone.vision_model, backbone.text_model):
                if not getattr(tower, "supports_gradient_checkpointing", False):
                    raise ModelError(
                        f"train.gradient_checkpointing: {type(tower).__name__} cannot recompute its activations in transformers. "
                        "For less memory raise `train.accumulation`, which works with every tower."
                    )
                tower.gradient_checkpointing_enable()

    def lock_towers(self, image: int | str, text: int | str) -> None:
        """Keep towers as they are, or their first layers: no gradients, and always in evaluation mode, without dropout or batch
        statistics. Raises ModelError.

        Args:
            image, text: number of layers, or "all".
        """
        backbone = self.backbone
        self.locked = lock(backbone.vision_model, image, "train.lock_image") + lock(backbone.text_model, text, "train.lock_text")
        for module in self.locked:
            module.eval()
        if isinstance(backbone, PairBackbone):
            backbone.keep_tokens(image == "all", text == "all")

    def train(self, mode: bool = True) -> MMRef:
        """Training or evaluation mode of everything but what is locked."""
        super().train(mode)
        for module in self.locked:
            module.eval()
        return self

    @contextmanager
    def keeping_nothing(self) -> Iterator[None]:
        """Inside, inputs pass by `model.feature_cache`: they will not come again."""
        if not isinstance(self.backbone, PairBackbone):
            yield
            return
        before, self.backbone.keeps = self.backbone.keeps, False
        try:
            yield
        finally:
            self.backbone.keeps = before

    def compile_towers(self) -> None:
        """Compile both towers in place: names of parameters stay, which checkpoints go by.

        Training meets images of one shape and captions of many lengths, in two modes under gradient caching; evaluation,
        which meets others, runs the towers as they are. Dropout draws what it would draw uncompiled, the same in both passes
        of gradient caching.
        """
        self.compiled = True
        options = {"fallback_random": True}
        self.backbone.vision_model.compile(dynamic=False, options=options)
        self.backbone.text_model.compile(dynamic=self.backbone.trims_texts, options=options)

    @property
    def embed_dim(self) -> int:
        return self.backbone.embed_dim

    def forward(
        self,
        pixels: Tensor | None = None,
        ids: Tensor | None = None,
        mask: Tensor | None = None,
        masked: Masked | None = None,
        objects: Tensor | None = None,
        groups: list[TextGroup] | None = None,
    ) -> Output:
        """Features of images (B, 3, H, W) and captions (B, L), either or both; the heads' losses where `masked` captions
        and the `objects` (B,) of the samples are given. `groups` of `group_texts(mask)` save the work on padding."""
        image = text = rec_sum = mlm_sum = id_sum = None
        device = self.log_scale.device.type
        # Evaluation brings other shapes, and each would be compiled for a few batches.
        eager = torch.compiler.set_stance("force_eager") if self.compiled and not self.training else nullcontext()
        plain = self.plain_attention and torch.is_grad_enabled()
        attention = sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()
        precision = torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext()
        with eager, attention, precision:
            if pixels is not None:
                image_global, image_tokens = self.backbone.encode_image(pixels)
                image = nn.functional.normalize(image_global.float(), dim=-1)
            if ids is not None:
                assert mask is not None
                text_global = self._encode_text(ids, mask, groups)[0]
                text = nn.functional.normalize(text_global.float(), dim=-1)
            if objects is not None and self.classify is not None:
                id_sum = identity_loss(self.classify(image_global), self.classify(text_global), objects)
            if masked is not None:
                assert mask is not None
                with self.keeping_nothing():  # masked anew at each step
                    states = self._encode_text(masked.ids, mask, groups)[1]
                if self.reconstruct is not None:
                    given = states.detach() if self.rec_detach_text else states
                    rec_sum = reconstruction_loss(self.reconstruct(given, mask, masked.references, masked.at), masked.words)
                if self.image_words is not None:
                    seen, read = self.backbone.in_shared_space(image_tokens, states)
                    mlm_sum = reconstruction_loss(self.image_words(read, mask, seen, masked.at), masked.words)
        scale = AtMost.apply(self.log_scale.float().exp(), 1 / MIN_TAU)
        bias = None if self.logit_bias is None else self.logit_bias.float().clone()
        return Output(image, text, rec_sum, mlm_sum, id_sum, scale, bias)

    def _encode_text(self, ids: Tensor, mask: Tensor, groups: list[TextGroup] | None) -> tuple[Tensor, Tensor]:
        if groups is None or not self.backbone.trims_texts:
            return self.backbone.encode_text(ids, mask)
        return encode_groups(self.backbone.encode_text, ids, mask, groups)

    def is_new(self, name: str) -> bool:
        """Whether a parameter starts from random weights beside pretrained towers (gets `train.lr_new`)."""
        prefixes = tuple(f"backbone.{p}" for p in self.backbone.new_parameter_prefixes())
        return name.startswith((*HEADS, *TRAINING_ONLY, *LOGITS, *prefixes)) or MARK in name


def computes_in_bf16(gpu: bool) -> bool:
    """Whether this machine's GPU or CPU multiplies in bf16 itself; emulated, it is slower than fp32."""
    if gpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def chosen_precision(train: TrainConfig) -> tuple[bool, str]:
    """Whether a run on this machine computes in bf16, and why, in words."""
    if train.precision != "auto":
        return train.precision == "bf16", "as `train.precision` says"
    gpu = torch.cuda.is_available() if train.gpu == AUTO else train.gpu
    what = "GPU" if gpu else "processor"
    native = computes_in_bf16(gpu)
    return native, f"this {what} {'multiplies in it' if native else 'has no instructions for bf16'}"


def check_captions(backbone: Backbone, data: DataConfig) -> None:
    """Raise ModelError for captions that are longer than a text tower reads, or padded where it would read padding."""
    if data.max_tokens > backbone.max_positions:
        raise ModelError(
            f"data.max_tokens {data.max_tokens} is more than the {backbone.max_positions} positions of the text tower: set "
            f"data.max_tokens to at most {backbone.max_positions}."
        )
    if data.padding != "left":
        return
    why = ""
    if backbone.trims_texts:  # most of them count positions or take their feature from the first place on, too
        why = f"the text tower, {type(backbone.text_model).__name__}, is given the first places of a caption, as many as it needs"
    elif isinstance(backbone, PairBackbone) and backbone.pool == "first":
        why = "`model.pool: first` takes the first token of a caption for its feature"
    if why:
        raise ModelError(f"data.padding is left, and {why}, where padding would stand: set `data.padding: right`.")


def build_model(config: Config, vocab_size: int, objects: int = 0) -> MMRef:
    """MMRef of a config, with weights that depend on the seed and config alone; `objects` of training. Raises ModelError."""
    train = config.train
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(RandomStream.INITIAL_WEIGHTS, train.seed, 0))
        backbone = build_backbone(config.model, vocab_size)
        check_captions(backbone, config.data)
        bf16 = chosen_precision(train)[0]
        plain = bf16 and not train.on_gpu
        model = MMRef(backbone, config.loss, config.reference, train.gradient_checkpointing, bf16, objects, plain)
        if config.model.lora_image:
            add_lora(backbone.vision_model, config.model.lora_image, config.model.lora_alpha, "model.lora_image")
        if config.model.lora_text:
            add_lora(backbone.text_model, config.model.lora_text, config.model.lora_alpha, "model.lora_text")
        both = ("all", "all") if config.model.freeze_backbone else (train.lock_image, train.lock_text)
        model.lock_towers(*both)
        return model
