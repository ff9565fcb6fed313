"""The folder of an export as it is read: what its files say, its model, its references. Who writes it: mmref/export/write.py."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from mmref.config import Config, from_saved
from mmref.data.tokens import Tokens, read_tokenizer
from mmref.errors import ModelError
from mmref.model.mmref import MMRef, build_model
from mmref.storage.packed_strings import NAMES as ID_TENSORS
from mmref.storage.packed_strings import unpack_strings

FORMAT = 1
AGAIN = "Export the run again, or copy the folder again."
REFERENCES, ROWS = "references.safetensors", "rows"  # the file, and its tensor of references where there are some


@dataclass(frozen=True)
class Exported:
    """An export in memory."""

    card: dict[str, Any]  # config.json
    config: Config
    module: MMRef
    tokens: Tokens
    references: NDArray[np.float32] | None  # (m, K, d); None where training set none
    object_ids: list[str]
    text_mean: NDArray[np.float32] | None


def is_export(card: Any) -> bool:
    """Whether a config.json is that of an export, as none of transformers is."""
    return isinstance(card, dict) and "format" in card and "model_type" not in card


def exported_rows(folder: Path) -> bool:
    """Whether an export holds references. Raises ModelError."""
    with _reading(folder / REFERENCES) as path, safe_open(path, "np") as file:
        return ROWS in file.keys()  # noqa: SIM118 -- a file is no mapping


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Raise ModelError for what whoever reads a file of an export raises where that is damaged, or not there."""
    try:
        yield path
    except OSError as error:
        raise ModelError(f"{path.parent} is no exported model: {error}. Write one with `mmref export RUN --out DIR`.") from None
    except (ValueError, yaml.YAMLError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged: {' '.join(str(error).split())}. {AGAIN}") from None


def _fields(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Names and values of a text file of an export. Raises ModelError."""
    with _reading(path):
        found = parse(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds no names and values, but a {type(found).__name__}")
    return dict(found)


def read_export(folder: Path) -> Exported:
    """Raises ModelError."""
    card = _fields(folder / "config.json", json.loads)
    if card.get("format") != FORMAT:
        raise ModelError(
            f"{folder} has export format {card.get('format')}, this version of mmref reads {FORMAT}: export the run again."
        )
    config = from_saved(_fields(folder / "config.yaml", yaml.safe_load), str(folder / "config.yaml"))
    with _reading(folder / "model.safetensors") as path:
        weights = load_file(path)
    with _reading(folder / REFERENCES) as path:
        arrays = {name: tensor.numpy() for name, tensor in load_file(path).items()}  # mapped
        ids = _object_ids(arrays)
    if named := [n for n in (config.model.dual, config.model.vision, config.model.text) if n]:  # an export names none
        raise ModelError(f"{folder}/config.yaml wants the model {named[0]} from elsewhere: export the run again.")
    tokenizer = read_tokenizer(str(folder / "tokenizer"), AGAIN)
    tokens = Tokens(tokenizer, config.data.max_tokens, config.data.padding)
    module = build_model(config, tokens.vocab_size)
    sizes = {name: value.shape for name, value in module.state_dict().items()}
    if other := [name for name, value in weights.items() if value.shape != sizes.get(name, value.shape)]:
        raise ModelError(f"{folder}/model.safetensors does not fit its config: {other[:3]} have other sizes. Export again.")
    missing, unknown = module.load_state_dict(weights, strict=False)
    # Where a tower's batch norms count no batches, torch itself adds the counts that it then does not know.
    unknown = [name for name in unknown if name in weights]
    if missing or unknown:
        raise ModelError(
            f"{folder}/model.safetensors does not fit its config: missing {missing[:3]}, unknown {unknown[:3]}. Export again."
        )
    return Exported(card, config, module, tokens, arrays.get(ROWS), ids, arrays.get("text_mean"))


def _object_ids(arrays: dict[str, NDArray[Any]]) -> list[str]:
    """Of each object that has references. Raises ValueError where they are not there, or not one for each."""
    if absent := [name for name in ID_TENSORS if name not in arrays]:
        raise ValueError(f"it has no tensor {absent[0]}")
    ids: list[str] = unpack_strings(*(arrays[name] for name in ID_TENSORS)).to_pylist()
    if ROWS in arrays and len(arrays[ROWS]) != len(ids):
        raise ValueError(f"it has references of {len(arrays[ROWS])} objects, and the ids of {len(ids)}")
    return ids
