"""Image and text towers: CLIP, SigLIP and other dual encoders, or any vision + text pair; of transformers, or an import path.

Both classes offer the same calls:
    encode_image(pixels (B, 3, H, W)) -> global (B, d), tokens (B, N, image_width)
    encode_text(ids (B, L), mask (B, L)) -> global (B, d), tokens (B, L, text_width)
    in_shared_space(image tokens, text tokens) -> (B, N, d), (B, L, d): what becomes of tokens on the way to global features
Global features are not normalised here.

A tower from an import path (`model.vision_config: {import: package.module:function, ...}`) is what the function returns for
the other keys as arguments: a module that is called with `pixel_values` (vision) or `input_ids` and `attention_mask` (text)
and gives an object with `last_hidden_state`, tokens (B, N, w) or feature maps (B, w, h, w'), and perhaps `pooler_output`. Its
`config` has `hidden_size`, that of a text tower `vocab_size` as well and perhaps `max_position_embeddings`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from mmref.config import ModelConfig
from mmref.config.inputs import refuse_known, text_positions
from mmref.config.packages import IMPORT, imported, local_name
from mmref.errors import ModelError
from mmref.model.adapter import Adapter
from mmref.model.depthwise import use_depthwise
from mmref.model.frozen import FrozenTokens
from mmref.model.text_groups import BLIND_TO_PADDING

DRIVEN = ("chinese_clip", "clip", "metaclip_2", "siglip", "vision-text-dual-encoder")  # families of dual encoders, as tested
CAUSAL = ("clip", "metaclip_2")  # those of them whose words see what lies before them alone
NOT_IN_EVERY_FILE = ("pooler", "mask_token", "logit_")  # weights a tower may start without: trained anew, or not read
SAID = 400  # characters of a foreign error: transformers lists every model it knows
TRIED_TOKENS, TRIED_PX = 8, 64  # of the forward pass that tries towers, where nothing else is known


@contextlib.contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises for a bad name or config into ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # transformers, its hub client and safetensors each have errors of their own
        said = textwrap.shorten(str(error), SAID, placeholder=" ...")
        raise ModelError(
            f"{what} cannot be loaded: {said}. Give a hub id, a directory written by save_pretrained, "
            f"or a `*_config` mapping with a `model_type` that transformers knows or an `import` path."
        ) from error


def tower_config(name: str, config: dict[str, Any] | None, what: str) -> PretrainedConfig:
    """transformers config of a tower by hub id or directory, or from its fields. Raises ModelError."""
    with _named_errors(f"{what} {name or config}"):
        if name:
            return AutoConfig.from_pretrained(local_name(name), trust_remote_code=False)
        values = dict(config or {})
        if not (model_type := values.pop("model_type", None)):
            raise ValueError("its `model_type` is missing")
        return AutoConfig.for_model(model_type, **values)


def without_weights(config: ModelConfig) -> ModelConfig:
    """The same towers by their configs, so that building them loads nothing. Raises ModelError."""
    changes: dict[str, Any] = {}
    for part in ("dual", "vision", "text"):
        if name := getattr(config, part):
            changes |= {part: "", f"{part}_config": tower_config(name, None, f"model.{part}").to_dict()}
    return dataclasses.replace(config, **changes, feature_cache="")


def check_towers(config: ModelConfig, end_id: int | None, size: tuple[int, int] | None = None) -> None:
    """Raise ModelError for a tower that does not exist, towers without features, or a tokenizer that ends captions otherwise.

    Loads no weights. `size`: height and width of the images, in pixels.
    """
    for part in ("dual", "vision", "text"):
        name, values = getattr(config, part), getattr(config, f"{part}_config")
        if not (name or values):
            continue
        if IMPORT in (values or {}):
            imported(values[IMPORT], f"model.{part}")
            continue
        found = tower_config(name, values, f"model.{part}")
        if part == "dual":
            refuse_known(found.model_type)
        # CLIP reads its text feature at the end token (2 is its legacy value for "the largest id").
        expected = getattr(getattr(found, "text_config", None), "eos_token_id", None)
        if part == "dual" and "clip" in found.model_type and expected not in (None, 2, end_id):
            raise ModelError(
                f"model.dual: its text tower ends captions with token {expected}, the tokenizer with {end_id}: every text "
                f"feature would be the same. Set `text_config: {{eos_token_id: {end_id}}}` in model.dual_config, or "
                "use the tokenizer of the model."
            )
    try_towers(config, size)


def try_towers(config: ModelConfig, size: tuple[int, int] | None = None) -> None:
    """Raise ModelError for towers that give no features of images of `size` (height, width) and texts.

    One forward pass, on tensors that have shapes and no memory: a moment, however large the towers are. Only one that fails is
    tried again with random weights, since not every sound tower runs without memory. Towers from an import path are not tried.
    """
    if any(IMPORT in (values or {}) for values in (config.dual_config, config.vision_config, config.text_config)):
        return
    config = without_weights(config)
    for real in (False, True):
        try:
            _forward(config, size, real)
            return
        except ModelError:
            raise
        except Exception as error:  # whatever foreign code raises
            if real:
                raise _no_features(config, size, error) from error


def _forward(config: ModelConfig, size: tuple[int, int] | None, real: bool) -> None:
    """Build towers and encode two images and two texts, in memory or without. Raises whatever their code raises."""
    with torch.device("cpu" if real else "meta"):
        backbone = _towers(config).eval()
    with torch.no_grad(), contextlib.nullcontext() if real else FakeTensorMode(allow_non_fake_inputs=True):
        backbone = backbone if real else backbone.to_empty(device="cpu")
        ids = torch.zeros(2, min(TRIED_TOKENS, backbone.max_positions), dtype=torch.long)
        image, image_tokens = backbone.encode_image(torch.zeros(2, 3, *(size or backbone.native_size or [TRIED_PX] * 2)))
        text, text_tokens = backbone.encode_text(ids, torch.ones_like(ids))
        backbone.text_model.get_input_embeddings()  # which grow for a mask token
    features = image.shape == text.shape == (2, backbone.embed_dim)
    widths = backbone.image_width, backbone.text_width
    if not features or any(t.dim() != 3 or t.shape[2] != w for t, w in zip((image_tokens, text_tokens), widths)):
        raise ValueError(
            f"features of shape {tuple(image.shape)} for images and {tuple(text.shape)} for texts, tokens of "
            f"{tuple(image_tokens.shape)} and {tuple(text_tokens.shape)} where {widths[0]} and {widths[1]} wide ones are expected"
        )


def _no_features(config: ModelConfig, size: tuple[int, int] | None, error: Exception) -> ModelError:
    """What to say of towers whose forward pass raised an error."""
    said = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    at = f" of {size[0]} x {size[1]} px" if size else ""
    if config.dual_config:
        return ModelError(
            f"model.dual: a dual encoder of the family `{config.dual_config['model_type']}` gives no features of images{at} and "
            f"texts ({said}). The families that work are {', '.join(DRIVEN)}; any vision tower and text encoder do as a pair "
            "(`model.vision`, `model.text`)."
        )
    kinds = [(values or {}).get("model_type") for values in (config.vision_config, config.text_config)]
    return ModelError(
        f"model.vision `{kinds[0]}` and model.text `{kinds[1]}` give no features of images{at} and texts ({said}). A vision "
        "tower takes `pixel_values` of that size, a text tower `input_ids` and `attention_mask` alone (an encoder, no "
        "encoder-decoder), and both give `last_hidden_state`."
    )


def load_tower(name: str, config: dict[str, Any] | None, what: str) -> Any:
    """A transformers model by hub id or directory (`name`), with random weights from `config`, or from an import path.

    Raises ModelError, also for a directory whose weights are not all there: transformers fills up with random ones.
    """
    with _named_errors(f"{what} {name or config}"):
        if name:
            tower, info = AutoModel.from_pretrained(
                local_name(name), dtype=torch.float32, trust_remote_code=False, output_loading_info=True
            )
            lacking = sorted(key for key in info["missing_keys"] if not any(part in key for part in NOT_IN_EVERY_FILE))
            if lacking:
                raise ModelError(
                    f"{what} {name}: its files hold no weights for {len(lacking)} of the model's tensors, such as {lacking[0]}; "
                    "they would start at random. Give the files of this very model: its config and its weights belong together."
                )
            return tower
        if IMPORT in (config or {}):
            return _imported_tower(dict(config or {}), what)
        # Also of a config that names the half precision of its files: weights and features are fp32 wherever they come from.
        return AutoModel.from_config(tower_config(name, config, what), dtype=torch.float32)


def _imported_tower(arguments: dict[str, Any], what: str) -> Any:
    """What the class at `import` is for the other keys. Raises ModelError when that is no tower."""
    path = arguments.pop(IMPORT)
    tower = imported(path, what)(**arguments)
    needed = ("vocab_size",) if what == "model.text" else ()
    lacking = [name for name in needed if not hasattr(getattr(tower, "config", None), name)]
    if not hasattr(tower, "config") or lacking:
        raise ModelError(
            f"{what}: {path} has no {' or '.join(lacking) or '`config`'}; a tower is a torch module whose `config` has "
            "`hidden_size`, and for text `vocab_size`."
        )
    return tower


def _masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the token axis, padding left out: (B, N, w), (B, N) -> (B, w)."""
    if mask is None:
        return tokens.mean(1)
    weight = mask.to(tokens.dtype)[..., None]
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)


def _as_tokens(hidden: Tensor) -> Tensor:
    """Feature maps (B, C, h, w) of convolutional towers become tokens (B, h w, C)."""
    return hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden


class DualBackbone(nn.Module):
    """A dual encoder of transformers: its own poolers and projections give the global features."""

    vision_model: Any
    text_model: Any
    visual_projection: Any
    text_projection: Any

    def __init__(self, model: PreTrainedModel, imported: bool = False) -> None:
        super().__init__()
        if not hasattr(model, "vision_model") or not hasattr(model, "text_model"):
            raise ModelError(
                f"`model.dual` needs a dual encoder such as CLIP or SigLIP, found {type(model).__name__}; "
                "for separate towers give `model.vision` and `model.text`."
            )
        self.vision_model, self.text_model = model.vision_model, model.text_model
        # SigLIP projects inside its towers; its and CLIP's scale parameters are left behind: the temperature is ours,
        # and DeepSpeed cannot broadcast a 0-dim parameter.
        self.visual_projection = getattr(model, "visual_projection", None) or nn.Identity()
        self.text_projection = getattr(model, "text_projection", None) or nn.Identity()
        vision, text = model.config.vision_config, model.config.text_config
        self.image_width, self.text_width = vision.hidden_size, text.hidden_size
        self.embed_dim = getattr(model.config, "projection_dim", None) or text.projection_size
        if isinstance(self.visual_projection, nn.Identity):
            self.embed_dim = text.projection_size if hasattr(text, "projection_size") else vision.hidden_size
        self.native_size = _native_size(vision)
        self.vocab_size = text.vocab_size
        self.max_positions = text_positions(text)
        # SigLIP was trained on padded text without a mask. CLIP is causal and reads its features at the end token: no word sees
        # the padding behind a caption. Without a mask attention runs in its fastest form, and nobody asks whether it is all ones.
        self.uses_mask = imported or model.config.model_type not in ("siglip", *CAUSAL)
        self.trims_texts = not imported and bool({model.config.model_type, text.model_type} & BLIND_TO_PADDING)
        self._interpolates = _interpolates(self.vision_model)

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        extra = {}
        if self._interpolates and tuple(pixels.shape[-2:]) != self.native_size:
            extra["interpolate_pos_encoding"] = True
        out = self.vision_model(pixel_values=pixels, **extra)
        tokens = _as_tokens(out.last_hidden_state)
        return self.visual_projection(_pooled(out, tokens)), tokens

    def encode_text(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.text_model(input_ids=ids, attention_mask=mask if self.uses_mask else None)
        return self.text_projection(_pooled(out, out.last_hidden_state)), out.last_hidden_state

    def in_shared_space(self, image_tokens: Tensor, text_tokens: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.visual_projection, nn.Identity):  # SigLIP: only its texts are projected, inside the tower
            return image_tokens, self.text_model.head(text_tokens)
        norm = getattr(self.vision_model, "post_layernorm", nn.Identity())
        return self.visual_projection(norm(image_tokens)), self.text_projection(text_tokens)

    def new_parameter_prefixes(self) -> tuple[str, ...]:
        return ()


class PairBackbone(nn.Module):
    """Any vision tower beside any text tower, each with a linear projection to the shared space.

    With `adapter_layers` transformer layers of width `embed_dim` follow each tower: tokens are theirs, and global features
    their pooled tokens.
    """

    vision_model: Any
    text_model: Any

    def __init__(self, vision: Any, text: Any, config: ModelConfig) -> None:
        super().__init__()
        self.vision_model, self.text_model = vision, text
        embed_dim, adapter_layers = config.embed_dim, config.adapter_layers
        self.pool = "mean" if config.pool == "auto" and adapter_layers else config.pool
        if self.pool != "auto":  # a pooler nobody reads would be a parameter without a gradient
            towers: tuple[Any, Any] = (vision, text)
            for tower in towers:
                pooler = getattr(tower, "pooler", None)
                if pooler is not None and any(True for _ in pooler.parameters()):
                    tower.pooler = nn.Identity()  # not all towers ask whether they have one before they call it
        self.image_width, self.text_width = _tower_width(vision), _tower_width(text)
        self.visual_adapter = self.text_adapter = None
        if adapter_layers:
            self.visual_adapter = Adapter(self.image_width, embed_dim, adapter_layers)
            self.text_adapter = Adapter(self.text_width, embed_dim, adapter_layers)
            self.image_width = self.text_width = embed_dim
        self.visual_projection = nn.Linear(self.image_width, embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text_width, embed_dim, bias=False)
        self.embed_dim = embed_dim
        self.vocab_size = text.config.vocab_size
        self.max_positions = text_positions(text.config)
        # What a tower from an import path makes of padding is its own affair.
        known = getattr(text.config, "model_type", None) in BLIND_TO_PADDING
        self.trims_texts = known and IMPORT not in (config.text_config or {})
        self.native_size = _native_size(vision.config)
        self._interpolates = _interpolates(vision)
        self.keeps = True  # off: inputs that will not come again pass by the cache
        kept = [
            FrozenTokens(config.feature_cache, tower, config.feature_cache_gb) if config.feature_cache else None
            for tower in (vision, text)
        ]
        self._kept_images, self._kept_texts = kept

    def keep_tokens(self, images: bool, texts: bool) -> None:
        """Keep tokens in `model.feature_cache` for these towers alone: those of a trained one change."""
        self._kept_images = self._kept_images if images else None
        self._kept_texts = self._kept_texts if texts else None

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self._kept_images is not None and self.keeps:
            tokens, pooled = self._kept_images(pixels, None, lambda rows: self._see(pixels[rows])[0]), None
        else:
            tokens, pooled = self._see(pixels)
        if self.visual_adapter is not None:
            tokens = self.visual_adapter(tokens)
        return self.visual_projection(self._global(pooled, tokens, None)), tokens

    def encode_text(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        if self._kept_texts is not None and self.keeps:
            tokens, pooled = self._kept_texts(ids, mask, lambda rows: self._read(ids[rows], mask[rows])[0]), None
        else:
            tokens, pooled = self._read(ids, mask)
        if self.text_adapter is not None:
            tokens = self.text_adapter(tokens, mask)
        return self.text_projection(self._global(pooled, tokens, mask)), tokens

    def in_shared_space(self, image_tokens: Tensor, text_tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.visual_projection(image_tokens), self.text_projection(text_tokens)

    def _see(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The vision tower's tokens (B, N, w) and pooled output, where it has one."""
        extra = {}
        if self._interpolates and self.native_size != tuple(pixels.shape[-2:]):
            extra["interpolate_pos_encoding"] = True
        out = self.vision_model(pixel_values=pixels, **extra)
        return _as_tokens(out.last_hidden_state), getattr(out, "pooler_output", None)

    def _read(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The text tower's tokens (B, L, w) and pooled output, where it has one."""
        out = self.text_model(input_ids=ids, attention_mask=mask)
        return out.last_hidden_state, getattr(out, "pooler_output", None)

    def _global(self, pooled: Tensor | None, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """(B, w): the tower's pooler, its first token, or the mean of its tokens."""
        if self.pool == "auto" and pooled is not None:
            return pooled.flatten(1)
        return tokens[:, 0] if self.pool == "first" else _masked_mean(tokens, mask)

    def new_parameter_prefixes(self) -> tuple[str, ...]:
        return ("visual_projection.", "text_projection.", "visual_adapter.", "text_adapter.")


Backbone = DualBackbone | PairBackbone


def _native_size(vision: Any) -> tuple[int, int] | None:
    """(height, width) that the config of a vision tower names."""
    size = getattr(vision, "image_size", None)
    return (size, size) if isinstance(size, int) else ((int(size[0]), int(size[1])) if size else None)


def _interpolates(vision: Any) -> bool:
    """Whether a vision tower stretches its positions over images of another size."""
    return "interpolate_pos_encoding" in inspect.signature(vision.forward).parameters


def _pooled(out: Any, tokens: Tensor) -> Tensor:
    """(B, w) a tower's own pooled output; its first token where it has no pooler, as in Chinese-CLIP."""
    pooled = getattr(out, "pooler_output", None)
    return tokens[:, 0] if pooled is None else pooled.flatten(1)


def _tower_width(tower: Any) -> int:
    """Width of a tower's last hidden state: `hidden_size`, or the last of `hidden_sizes` of hierarchical ones."""
    for name in ("hidden_size", "d_model", "dim"):
        if isinstance(getattr(tower.config, name, None), int):
            return getattr(tower.config, name)
    sizes = getattr(tower.config, "hidden_sizes", None) or getattr(tower.config, "embed_dims", None)
    if sizes:
        return int(sizes[-1])
    raise ModelError(f"{type(tower).__name__}: no hidden_size or hidden_sizes in its config, so its width is unknown.")


def _family(config: ModelConfig) -> str:
    """`model_type` of a dual encoder, "" for one from an import path. Raises ModelError."""
    if IMPORT in (config.dual_config or {}):
        return ""
    return str(tower_config(config.dual, config.dual_config, "model.dual").model_type)


def _towers(config: ModelConfig) -> Backbone:
    if config.dual or config.dual_config:
        imports = IMPORT in (config.dual_config or {})
        return DualBackbone(load_tower(config.dual, config.dual_config, "model.dual"), imports)
    return PairBackbone(
        load_tower(config.vision, config.vision_config, "model.vision"),
        load_tower(config.text, config.text_config, "model.text"),
        config,
    )


def build_backbone(config: ModelConfig, vocab_size: int) -> Backbone:
    """Backbone of a config; the text embedding grows to `vocab_size` rows when the tokenizer has more tokens.

    Raises ModelError, also for a dual encoder of a family that gives no features.
    """
    if (config.dual or config.dual_config) and (family := _family(config)) not in DRIVEN:
        refuse_known(family)
        try_towers(config)
    backbone = _towers(config)
    if vocab_size > backbone.vocab_size:  # a mask token added to a tokenizer without one (CLIP)
        backbone.text_model.resize_token_embeddings(vocab_size, mean_resizing=False)
        backbone.vocab_size = vocab_size
    use_depthwise(backbone.vision_model)
    return backbone
