"""How images and captions are prepared where a config says `auto`: as the pretrained model of `model.dual` wants them.

Whatever its own files say counts: image size, resize or crop, filter, statistics, length and padding of captions.
"""

from __future__ import annotations

import copy
import functools
import textwrap
from dataclasses import dataclass
from typing import Any

from mmref.config.packages import local_name
from mmref.config.tree import AUTO, Config, DataConfig
from mmref.errors import ModelError

PLAIN: dict[str, Any] = {  # without a pretrained dual encoder
    "image_height": 64, "image_width": 64, "resize": "area", "resample": "bicubic", "max_tokens": 24, "padding": "right",
    "image_mean": [0.481, 0.458, 0.408], "image_std": [0.269, 0.261, 0.276],
}  # fmt: skip
BEFORE = {"resize": "area", "resample": "bicubic", "resize_edge": 1, "padding": "right"}
"""What a config of a version without these fields meant."""
FITS = ("resize", "resample", "resize_edge")
FILTERS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # in the order of Pillow's numbers
ENDLESS = 1 << 20  # tokens: transformers' mark of a tokenizer that knows no limit is far above
TRAINED_TOKENS = {"chinese_clip": 52}
"""Families whose text tower has more positions than it was trained to read images with."""
POSITIONS_FROM_PADDING = (
    "altclip_text_model", "bridgetower_text_model", "camembert", "clap_text_model", "data2vec-text", "ibert", "lilt",
    "longformer", "luke", "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Text towers that count positions from behind the padding token's id: so many they cannot use."""
READS_PADDING = ("siglip",)
REFUSED = {  # families that transformers has and we have not, and why
    "siglip2": "NaFlex reads patches of images of every shape and number, and images have one size here. Give a SigLIP 2 of "
    "fixed resolution, such as google/siglip2-base-patch16-224",
}
SAID = 300


@dataclass(frozen=True)
class Inputs:
    """Values of the fields of `DataConfig` that a pretrained model was made for."""

    image_height: int
    image_width: int
    resize: str
    resample: str
    resize_edge: int
    max_tokens: int
    padding: str
    image_mean: list[float]
    image_std: list[float]

    def fields(self) -> dict[str, Any]:
        return {name: copy.copy(getattr(self, name)) for name in self.__dataclass_fields__}


def settled(config: Config) -> Config:
    """A copy of a checked config without `auto` in its `data`. Raises ModelError where `model.dual` cannot be looked at.

    Only what computes takes such a copy: over a config that is varied, another model settles `auto` in another way.
    """
    config = copy.deepcopy(config)
    data = config.data
    if AUTO in [value for value in vars(data).values() if isinstance(value, str)]:
        own = inputs_of(config.model.dual) if config.model.dual else None
        found = own.fields() if own else dict(PLAIN)
        if own and any(getattr(data, side) not in (AUTO, getattr(own, side)) for side in ("image_height", "image_width")):
            found |= {name: PLAIN.get(name) for name in FITS}  # its crop is for its size
        _fill(data, found)
    return config


def _fill(data: DataConfig, found: dict[str, Any]) -> None:
    """Put values in the place of `auto`."""
    for name, value in found.items():
        if getattr(data, name) == AUTO and value is not None:
            setattr(data, name, copy.copy(value))
    if data.resize_edge == AUTO:
        data.resize_edge = max(data.image_height, data.image_width)


def differing(config: Config) -> list[str]:
    """What a settled config has otherwise than its pretrained model was made for, a line each. Raises ModelError."""
    if not config.model.dual:
        return []
    own = inputs_of(config.model.dual).fields()
    unused = {name for name in neutral(config.data) if name in FITS[1:]}
    lines = []
    for name, value in own.items():
        given = getattr(config.data, name)
        if given != value and name not in unused:
            lines.append(f"data.{name} is {given}, {config.model.dual} was made for {value}")
    return lines


def neutral(data: DataConfig) -> list[str]:
    """Fields that change nothing as they are: a run without them has the same identity."""
    names = list(FITS) if data.resize == "area" else ["resize_edge"] if data.resize == "stretch" else []
    return [*names, *(["padding"] if data.padding == "right" else [])]


def refuse_known(family: str) -> None:
    """Raise ModelError for a family of dual encoders that is known not to work, with the reason."""
    if why := REFUSED.get(family):
        raise ModelError(f"model.dual: the family `{family}` cannot be used: {why}.")


@functools.cache
def inputs_of(name: str) -> Inputs:
    """How a pretrained model, by hub id or directory, wants its images and captions. Raises ModelError."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    place = local_name(name)
    try:
        config: Any = AutoConfig.from_pretrained(place, trust_remote_code=False)
        refuse_known(config.model_type)
        images: Any = AutoImageProcessor.from_pretrained(place, trust_remote_code=False, backend="pil")
        tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # of transformers, its hub client and whatever parses the files
        said = textwrap.shorten(str(error), SAID, placeholder=" ...")
        raise ModelError(
            f"how {name} wants its images and captions cannot be read: {said}. It takes config.json, preprocessor_config.json "
            "and a tokenizer, of a hub id or a directory; without them set `data.image_height`, `image_width`, `image_mean`, "
            "`image_std`, `resize`, `resample`, `resize_edge`, `max_tokens` and `padding` yourself."
        ) from error
    fit = _image_rule(name, images)
    plain = [0.0] * 3, [1.0] * 3
    mean, std = (images.image_mean, images.image_std) if images.do_normalize else plain
    return Inputs(
        **fit,
        image_mean=[float(x) for x in mean],
        image_std=[float(x) for x in std],
        max_tokens=_length(config, tokenizer),
        padding=str(tokenizer.padding_side) if config.model_type in READS_PADDING else "right",
    )


def _image_rule(name: str, images: Any) -> dict[str, Any]:
    """Sides, rule and filter of an image processor. Raises ModelError for one that prepares images in another way."""
    size, crop = images.size, images.crop_size if images.do_center_crop else None
    odd = [what for what in ("longest_edge", "max_height", "max_width", "min_pixels", "max_pixels") if size and size.get(what)]
    wrong = ""
    if not images.do_resize or not size:
        wrong = "leaves images in their own sizes"
    elif odd or not (size.get("shortest_edge") or (size.get("height") and size.get("width"))):
        wrong = f"resizes to {dict(size)}"
    elif not crop and size.get("shortest_edge"):
        wrong = f"resizes the shorter side to {size['shortest_edge']} and cuts nothing off: images of many shapes"
    elif not images.do_rescale or abs(images.rescale_factor * 255 - 1) > 1e-6:
        wrong = f"scales values by {images.rescale_factor if images.do_rescale else 1}, not by 1/255"
    elif getattr(images, "do_pad", None):
        wrong = "pads images"
    elif crop is not None and not size.get("shortest_edge") and dict(crop) != dict(size):
        wrong = f"resizes to {dict(size)} and cuts {dict(crop)} out"
    if wrong:
        raise ModelError(
            f"{name}: its image processor ({type(images).__name__}) {wrong}, which nothing here does. Set `data.image_height`, "
            "`image_width`, `image_mean`, `image_std` and `resize` yourself."
        )
    edge = size.get("shortest_edge")
    sides: Any = crop if edge else size
    height, width = sides["height"], sides["width"]
    return {
        "image_height": int(height), "image_width": int(width), "resize": "crop" if edge else "stretch",
        "resample": FILTERS[int(images.resample)], "resize_edge": int(edge or max(height, width)),
    }  # fmt: skip


def text_positions(text: Any) -> int:
    """Tokens for which a text tower has positions, by its config."""
    positions = int(getattr(text, "max_position_embeddings", ENDLESS))
    if getattr(text, "model_type", "") in POSITIONS_FROM_PADDING:
        positions -= int(text.pad_token_id or 0) + 1
    return positions


def _length(config: Any, tokenizer: Any) -> int:
    """Tokens that a text tower reads: by its positions, its tokenizer, and what its family was trained with."""
    positions = text_positions(getattr(config, "text_config", config))
    return min(positions, int(tokenizer.model_max_length), TRAINED_TOKENS.get(config.model_type, ENDLESS))
