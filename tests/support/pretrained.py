"""Small pretrained models in the layout of a hub, one of every family: config, safetensors, tokenizer, image processor."""

from __future__ import annotations

import io
import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    BertTokenizer,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Siglip2Tokenizer,
    SiglipTokenizer,
)

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["a", "small", "yellow", "bird", "with", "black", "wings", "red", "boat", "at", "night", "the", "of", "in", "snow"]
TEXTS = ["a small yellow bird with black wings", "red boat", "the boat at night in the snow of the night", "bird"]
LETTERS = [*string.ascii_lowercase, *string.digits]


def word_ids(*special: str) -> dict[str, int]:
    return {word: i for i, word in enumerate([*special, *WORDS, *(x for x in LETTERS if x not in WORDS)])}


def clip_tokenizer() -> Any:
    """Letters, alone and at a word's end; the end token has the largest id, which old configs count on."""
    vocabulary = [*LETTERS, *(f"{x}</w>" for x in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, merges=[], model_max_length=77)


def word_tokenizer(end: str = "</s>", **options: Any) -> Any:
    """Whole words, and a token at the end: SigLIP's without an attention mask."""
    raw = Tokenizer(models.WordLevel(word_ids("<pad>", end, "<unk>"), unk_token="<unk>"))
    raw.normalizer, raw.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, unk_token="<unk>", **options)


def sentencepiece_tokenizer() -> Any:
    """As of the first SigLIP: a file of SentencePiece, of lower-case words without punctuation."""
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(WORDS), *TEXTS] * 20), model_prefix=f"{folder}/spiece", vocab_size=60,
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
        )  # fmt: skip
        return SiglipTokenizer(f"{folder}/spiece.model", model_max_length=16)


def bert_tokenizer(**options: Any) -> Any:
    return BertTokenizer(vocab=word_ids("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), **options)


def gemma_tokenizer() -> Any:
    """As of SigLIP 2: lower case, padded on the left, of no length that it knows."""
    return Siglip2Tokenizer(vocab=word_ids("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"), merges=[])


def _config(model_type: str, text: dict[str, Any], vision: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    vision = {**SMALL, "image_size": 32, "patch_size": 8, **(vision or {})}
    return {"model_type": model_type, "vision_config": vision, "text_config": {**SMALL, **text}, **more}


CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "resample": 3}
SQUARE = {"size": {"height": 32, "width": 32}, "resample": 3}
HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
CLIP_TEXT = {"vocab_size": 74, "max_position_embeddings": 77, "bos_token_id": 72, "pad_token_id": 73}
BERT_TEXT = {"vocab_size": 60, "max_position_embeddings": 64}
FAMILIES: dict[str, tuple[dict[str, Any], Callable[[], Any], dict[str, Any]]] = {
    "clip": (
        _config("clip", {**CLIP_TEXT, "eos_token_id": 73}, projection_dim=12), clip_tokenizer,
        {"image_processor_type": "CLIPImageProcessor", **CROP},
    ),
    "clip, old end token": (
        _config("clip", {**CLIP_TEXT, "eos_token_id": 2}, projection_dim=12), clip_tokenizer,
        {"image_processor_type": "CLIPImageProcessor", **CROP, "size": {"shortest_edge": 36}},
    ),
    "siglip": (
        _config("siglip", {"vocab_size": 60, "max_position_embeddings": 16, "projection_size": 16}),
        lambda: word_tokenizer(pad_token="</s>", model_max_length=16, model_input_names=["input_ids"]),
        {"image_processor_type": "SiglipImageProcessor", **SQUARE, **HALVES},
    ),
    "siglip, sentencepiece": (
        _config("siglip", {"vocab_size": 60, "max_position_embeddings": 16, "projection_size": 16}), sentencepiece_tokenizer,
        {"image_processor_type": "SiglipImageProcessor", **SQUARE, **HALVES},
    ),
    "siglip2": (
        _config("siglip", {"vocab_size": 60, "max_position_embeddings": 64, "projection_size": 16}), gemma_tokenizer,
        {"image_processor_type": "SiglipImageProcessor", **SQUARE, "resample": 2, **HALVES},
    ),
    "chinese_clip": (
        _config("chinese_clip", BERT_TEXT, projection_dim=12), bert_tokenizer,
        {"image_processor_type": "ChineseCLIPImageProcessor", **SQUARE, "do_center_crop": False},
    ),
    "vision-text-dual-encoder": (
        _config("vision-text-dual-encoder", {"model_type": "bert", **BERT_TEXT, "max_position_embeddings": 160},
                {"model_type": "vit"}, projection_dim=12),
        lambda: bert_tokenizer(model_max_length=160),
        {"image_processor_type": "ViTImageProcessor", **SQUARE, "resample": 2, **HALVES},
    ),
    "no pad token": (
        _config("vision-text-dual-encoder", {"model_type": "bert", **BERT_TEXT}, {"model_type": "clip_vision_model"},
                projection_dim=12),
        lambda: word_tokenizer(model_max_length=32),
        {"image_processor_type": "CLIPImageProcessor", **CROP},
    ),
}  # fmt: skip
FAMILIES["clip, fp16 in shards"] = FAMILIES["clip"]


def save_pretrained(family: str, folder: Path) -> Path:
    """A model of random weights that differ from place to place, as a hub would hold it."""
    config, tokenizer, images = FAMILIES[family]
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(AutoConfig.for_model(**config))
    with torch.no_grad():
        for parameter in model.parameters():  # of the size that trained weights have: features of two inputs differ
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    if "fp16" in family:
        model.half().save_pretrained(folder, max_shard_size="20KB")
    else:
        model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_convert_rgb": True, **images}))
    return folder


def photograph(seed: int, height: int, width: int, mode: str = "RGB", kind: str = "JPEG") -> bytes:
    """A picture of soft areas, edges and grain, as a camera takes them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    layers = [np.sin(2 * np.pi * (f * x + g * y) + p) for f, g, p in rng.uniform(-6, 6, (9, 3))]
    rgb = np.stack([sum(layers[i::3]) for i in range(3)], -1) * 30 + 127
    rgb += 60 * ((x - 0.4) ** 2 + (y - 0.3) ** 2 < 0.04)[..., None] + rng.normal(0, 6, rgb.shape)
    image = Image.fromarray(rgb.clip(0, 255).astype(np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 92} if kind == "JPEG" else {}))
    return out.getvalue()


PHOTOGRAPHS = [
    photograph(0, 97, 143), photograph(1, 211, 75), photograph(2, 40, 41), photograph(3, 32, 32), photograph(4, 120, 90, "L"),
    photograph(5, 101, 77, kind="PNG"), photograph(6, 25, 30, kind="WEBP"), photograph(7, 300, 451),
]  # fmt: skip


def own_features(folder: Path | str, photographs: list[bytes], texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """L2-normalised features of images and texts, by transformers alone with the folder's own processors."""
    from transformers import AutoImageProcessor, AutoTokenizer

    model: Any = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    pictures = [Image.open(io.BytesIO(data)) for data in photographs]
    options: dict[str, Any] = {"truncation": True}
    if model.config.model_type == "siglip":  # as its page asks for
        options |= {"padding": "max_length", "max_length": model.config.text_config.max_position_embeddings}
    features = []
    with torch.no_grad():
        features.append(model.get_image_features(**processor(images=pictures, return_tensors="pt")))
        alone = []
        for text in texts:  # one by one: a tokenizer may have no token to pad with
            given = tokenizer([text], return_tensors="pt", **options)
            names = ("input_ids",) if model.config.model_type == "siglip" else ("input_ids", "attention_mask")
            alone.append(model.get_text_features(**{name: given[name] for name in names}))
    found = [getattr(features[0], "pooler_output", features[0])]
    found.append(torch.cat([getattr(out, "pooler_output", out) for out in alone]))
    image, text = (torch.nn.functional.normalize(x.float(), dim=-1).numpy() for x in found)
    return image, text
