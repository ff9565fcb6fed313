"""Captions -> token ids."""

from __future__ import annotations

import contextlib
import os
import tempfile
import textwrap
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmref.config import Config
from mmref.config.packages import local_name
from mmref.errors import MMRefError, ModelError
from mmref.storage.locations import file_system, is_url
from mmref.storage.retries import retry

MASK_TOKEN = "<|mask|>"
SAID = 400  # characters of an error of transformers, which may list every tokenizer it knows


class Tokens:
    """A tokenizer with fixed length, and the ids that masking needs."""

    def __init__(self, tokenizer: Any, max_tokens: int, padding: str = "right") -> None:
        """padding: the side of it. On the right a caption's tokens come first, as all but those want them who read padding."""
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        tokenizer.padding_side = padding
        if tokenizer.mask_token_id is None:  # CLIP has none: reconstruction adds one row to the word embedding
            tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = _stand_in(tokenizer)
        self.vocab_size = len(tokenizer)
        self.mask_id = int(tokenizer.mask_token_id)
        # The unknown token stands for a word, unless it doubles as another special token (CLIP's end token).
        named = {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "sep", "pad", "cls", "mask")}
        special = (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}) | (named - {None})
        self.special_ids = np.array(sorted(special), dtype=np.int64)

    def __call__(self, captions: list[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Ids and mask, (n, max_tokens) each; longer captions are cut, shorter ones padded."""
        out = self.tokenizer(captions, padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="np")
        ids = out["input_ids"].astype(np.int32)
        mask = out.get("attention_mask")
        return ids, (np.ones_like(ids) if mask is None else mask.astype(np.int32))


def _stand_in(tokenizer: Any) -> str:
    """What pads captions where a tokenizer has no token for it; the mask tells padding from words. Raises ModelError."""
    for token in (tokenizer.eos_token, tokenizer.sep_token, tokenizer.unk_token):
        if token:
            return str(token)
    raise ModelError(
        f"the tokenizer {tokenizer.name_or_path} has no token that captions can be padded with, nor one that ends them: set "
        "`pad_token` in its tokenizer_config.json."
    )


def tokenizer_path(config: Config) -> str:
    """Where the tokenizer of a run is: `data.tokenizer`, the backbone's, or the shard set's own."""
    own = config.data.root.rstrip("/") + "/tokenizer"
    return config.data.tokenizer or config.model.dual or config.model.text or own


def read_tokenizer(place: str, mend: str) -> Any:
    """The tokenizer of a hub id, folder or URL. Raises ModelError that names the place, and ends with how to `mend` it."""
    from transformers import AutoTokenizer

    try:
        with _local(place) as folder:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except MMRefError:  # of storage
        raise
    except Exception as error:  # for a damaged tokenizer.json tokenizers has no class of its own
        said = textwrap.shorten(str(error), SAID, placeholder=" ...")
        raise ModelError(f"no tokenizer at {place}: {said}. {mend}") from error


def load_tokens(config: Config) -> Tokens:
    """Tokenizer of a config. Raises ModelError that names the place that was tried, or leaves no room for a word."""
    path = local_name(tokenizer_path(config))
    tokenizer = read_tokenizer(path, "Set `data.tokenizer` to a hub id or a directory with tokenizer.json.")
    special = tokenizer.num_special_tokens_to_add()
    if config.data.max_tokens <= special:  # nothing of a caption would be left, and every text the same
        raise ModelError(
            f"data.max_tokens {config.data.max_tokens} leaves no word of a caption: the tokenizer at {path} puts {special} "
            f"special tokens around it. Set data.max_tokens to at least {special + 1}."
        )
    return Tokens(tokenizer, config.data.max_tokens, config.data.padding)


@contextlib.contextmanager
def _local(path: str) -> Iterator[str]:
    """A hub id or folder as it is; the folder of a URL (a shard set on object storage) as a copy."""
    if not is_url(path):
        yield path
        return
    fs, inner = file_system(path)
    with tempfile.TemporaryDirectory(prefix="mmref-") as folder:
        for name in retry(f"list {path}", lambda: fs.ls(inner, detail=False)):
            retry(f"read {name}", partial(fs.get_file, name, f"{folder}/{os.path.basename(name)}"))
        yield folder
