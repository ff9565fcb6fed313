"""Image and text towers through transformers: CLIP and SigLIP, or any vision + text pair.

Both classes offer the same two calls:
    encode_image(pixels (B, 3, H, W)) -> global (B, d), tokens (B, N, image_width)
    encode_text(ids (B, L), mask (B, L)) -> global (B, d), tokens (B, L, text_width)
Global features are not normalised here.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from mmref.config import ModelConfig
from mmref.errors import ModelError


@contextlib.contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Turn what transformers raises for a bad name or config into ModelError."""
    try:
        yield
    except Exception as error:  # transformers, its hub client and safetensors each have errors of their own
        raise ModelError(
            f"{what} cannot be loaded: {error}. Give a hub id, a directory written by save_pretrained, "
            f"or a `*_config` mapping with a `model_type` that transformers knows."
        ) from error


def tower_config(name: str, config: dict[str, Any] | None, what: str) -> PretrainedConfig:
    """transformers config of a tower by hub id or directory, or from its fields. Raises ModelError."""
    with _named_errors(f"{what} {name or config}"):
        if name:
            return AutoConfig.from_pretrained(name)
        values = dict(config or {})
        model_type = values.pop("model_type")
        return AutoConfig.for_model(model_type, **values)


def check_towers(config: ModelConfig, end_id: int | None) -> None:
    """Raise ModelError for a tower that does not exist or a tokenizer that ends captions otherwise; loads no weights."""
    for part in ("dual", "vision", "text"):
        name, values = getattr(config, part), getattr(config, f"{part}_config")
        if not (name or values):
            continue
        found = tower_config(name, values, f"model.{part}")
        # CLIP reads its text feature at the end token (2 is its legacy value for "the largest id")
        expected = getattr(getattr(found, "text_config", None), "eos_token_id", None)
        if part == "dual" and "clip" in found.model_type and expected not in (None, 2, end_id):
            raise ModelError(
                f"model.dual: its text tower ends captions with token {expected}, the tokenizer with {end_id}: every text "
                f"feature would be the same. Set `text_config: {{eos_token_id: {end_id}}}` in model.dual_config, or "
                "use the tokenizer of the model."
            )


def load_tower(name: str, config: dict[str, Any] | None, what: str) -> PreTrainedModel:
    """A transformers model by hub id or directory (`name`), or with random weights from `config`."""
    with _named_errors(f"{what} {name or config}"):
        if name:
            return AutoModel.from_pretrained(name, dtype=torch.float32)
        return AutoModel.from_config(tower_config(name, config, what))


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
    """CLIP or SigLIP: its own poolers and projections give the global features."""

    vision_model: Any
    text_model: Any
    visual_projection: Any
    text_projection: Any

    def __init__(self, model: PreTrainedModel) -> None:
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
        self.native_size = (vision.image_size, vision.image_size)
        self.vocab_size = text.vocab_size
        self.max_positions = text.max_position_embeddings
        # SigLIP was trained on padded text without a mask; CLIP is causal and reads its features at the end token
        self.uses_mask = model.config.model_type != "siglip"

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        interpolate = tuple(pixels.shape[-2:]) != self.native_size
        out = self.vision_model(pixel_values=pixels, interpolate_pos_encoding=interpolate)
        return self.visual_projection(out.pooler_output), out.last_hidden_state

    def encode_text(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.text_model(input_ids=ids, attention_mask=mask if self.uses_mask else None)
        return self.text_projection(out.pooler_output), out.last_hidden_state

    def new_parameter_prefixes(self) -> tuple[str, ...]:
        return ()


class PairBackbone(nn.Module):
    """Any vision tower beside any text tower, each with a linear projection to the shared space."""

    vision_model: Any
    text_model: Any

    def __init__(self, vision: PreTrainedModel, text: PreTrainedModel, embed_dim: int, pool: str = "auto") -> None:
        super().__init__()
        self.vision_model, self.text_model, self.pool = vision, text, pool
        if pool != "auto":  # a pooler nobody reads would be a parameter without a gradient
            towers: tuple[Any, Any] = (vision, text)
            for tower in towers:
                if getattr(tower, "pooler", None) is not None:
                    tower.pooler = None
        self.image_width = _tower_width(vision)
        self.text_width = _tower_width(text)
        self.visual_projection = nn.Linear(self.image_width, embed_dim, bias=False)
        self.text_projection = nn.Linear(self.text_width, embed_dim, bias=False)
        self.embed_dim = embed_dim
        self.vocab_size = text.config.vocab_size
        self.max_positions = getattr(text.config, "max_position_embeddings", 1 << 30)
        size = getattr(vision.config, "image_size", None)
        self.native_size = (size, size) if isinstance(size, int) else (tuple(size) if size else None)
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(vision.forward).parameters

    def encode_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        extra = {}
        if self._interpolates and self.native_size != tuple(pixels.shape[-2:]):
            extra["interpolate_pos_encoding"] = True
        out = self.vision_model(pixel_values=pixels, **extra)
        tokens = _as_tokens(out.last_hidden_state)
        return self.visual_projection(self._global(out, tokens, None)), tokens

    def encode_text(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        out = self.text_model(input_ids=ids, attention_mask=mask)
        return self.text_projection(self._global(out, out.last_hidden_state, mask)), out.last_hidden_state

    def _global(self, out: Any, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """(B, w): the tower's pooler, its first token, or the mean of its tokens."""
        pooled = getattr(out, "pooler_output", None)
        if self.pool == "auto" and pooled is not None:
            return pooled.flatten(1)
        return tokens[:, 0] if self.pool == "first" else _masked_mean(tokens, mask)

    def new_parameter_prefixes(self) -> tuple[str, ...]:
        return ("visual_projection.", "text_projection.")


Backbone = DualBackbone | PairBackbone


def _tower_width(tower: PreTrainedModel) -> int:
    """Width of a tower's last hidden state: `hidden_size`, or the last of `hidden_sizes` of hierarchical ones."""
    for name in ("hidden_size", "d_model", "dim"):
        if isinstance(getattr(tower.config, name, None), int):
            return getattr(tower.config, name)
    sizes = getattr(tower.config, "hidden_sizes", None) or getattr(tower.config, "embed_dims", None)
    if sizes:
        return int(sizes[-1])
    raise ModelError(f"{type(tower).__name__}: no hidden_size or hidden_sizes in its config, so its width is unknown.")


def build_backbone(config: ModelConfig, vocab_size: int) -> Backbone:
    """Backbone of a config; the text embedding grows to `vocab_size` rows when the tokenizer has more tokens."""
    if config.dual or config.dual_config:
        backbone: Backbone = DualBackbone(load_tower(config.dual, config.dual_config, "model.dual"))
    else:
        backbone = PairBackbone(
            load_tower(config.vision, config.vision_config, "model.vision"),
            load_tower(config.text, config.text_config, "model.text"),
            config.embed_dim,
            config.pool,
        )
    if vocab_size > backbone.vocab_size:  # a mask token added to a tokenizer without one (CLIP)
        backbone.text_model.resize_token_embeddings(vocab_size, mean_resizing=False)
        backbone.vocab_size = vocab_size
    return backbone
