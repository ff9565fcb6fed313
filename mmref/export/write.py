"""From a run to a folder that loads anywhere: consolidated weights, references, tokenizer, refinement, model card.

    model.safetensors        weights of towers and projections (heads serve training only)
    config.json              format, sizes, refinement, metrics; config.yaml: the run's config, towers spelt out
    tokenizer/               as transformers saves it
    references.safetensors   rows (m, K, d) of the training objects, their ids, mean text code of dense refinement
    transformers/            the same towers for plain transformers, where it has such a model
    adapters/image, text     LoRA's adapters of a tower as peft has them; in the weights above they are merged
    README.md                the model card

Every weight is a safetensors file; nothing is pickled. The folder appears as a whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModel
from transformers.utils.logging import disable_progress_bar

from mmref.config import Config, config_hash, dump_yaml, from_dict, to_dict
from mmref.data.shard_set import ShardSet
from mmref.data.tokens import Tokens, load_tokens
from mmref.errors import ExportError
from mmref.evaluate.choose import settings_of, trained_space
from mmref.evaluate.features import Encoder, Floats, read_queries
from mmref.evaluate.refinement import ReferenceSpace, RefinementSettings
from mmref.export.card import is_plain, model_card, pretrained_card
from mmref.export.interpolate import interpolate
from mmref.model.backbone import IMPORT, DualBackbone, PairBackbone, tower_config
from mmref.model.lora import has_lora, merge_lora, write_lora
from mmref.model.mmref import HEADS, TRAINING_ONLY, MMRef, build_model
from mmref.run.checkpoints import CheckpointInfo, best_checkpoint, fetched, load_model, load_object_ids
from mmref.run.directory import RunDir
from mmref.run.exported import FORMAT
from mmref.run.models import config_on, load_pretrained
from mmref.run.row_file import StoredReferences, are_set, blocks
from mmref.storage.packed_strings import NAMES as ID_TENSORS
from mmref.storage.packed_strings import pack_strings
from mmref.storage.tensor_file import Pieces, write_tensors
from mmref.storage.whole_folder import whole_folder
from mmref.version import __version__

MEAN_TEXTS = 4096  # captions of val whose mean centres dense codes of single queries
ENCODED = 128  # of them at a time


def export_run(run_dir: str, out: str, data: str | None = None, interpolated: bool = False) -> Path:
    """Write the best checkpoint of an evaluated run as a folder.

    Args:
        run_dir: run directory of `mmref train`, local or a URL.
        out: the folder; must not exist.
        data: the run's shard set, by default where its config says.
        interpolated: with the weights that training started from (`mmref.export.interpolate`).

    Returns:
        The folder's path.

    Raises:
        ExportError: `out` exists, is being written by another process or cannot be written, or the run's best checkpoint has not
            been evaluated, or there is nothing to interpolate with. StorageError when the disk is full.
    """
    target = Path(out).absolute()
    with whole_folder(out, ExportError, "README.md", _no_other) as folder:
        _write(run_dir, data, folder, target.name, interpolated)
    return target


def export_pretrained(name: str, out: str) -> Path:
    """Write a pretrained model as a folder of the same layout: no references, and no copy for transformers, which has the model.

    Returns the folder's path. Raises ModelError; ExportError and StorageError as `export_run`.
    """
    disable_progress_bar()
    target = Path(out).absolute()
    with whole_folder(out, ExportError, "README.md", _no_other) as folder:
        parts = load_pretrained(name)
        config, module = parts.config, parts.module
        _write_model(folder, portable_config(config, module), module, parts.tokens)
        _write_references(folder, None, [])
        card = {
            "format": FORMAT, "mmref": __version__, "pretrained": name, "config_hash": config_hash(config),
            "embed_dim": module.embed_dim, "objects": 0, "refinement": asdict(RefinementSettings(weight=0.0)),
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(card, indent=1), "utf-8")
        (folder / "README.md").write_text(pretrained_card(target.name, name), "utf-8")
    return target


def _no_other(target: Path) -> Iterable[str]:
    raise ExportError(f"{target} exists already: give another `--out`, or remove it.")


def _write(run_dir: str, data: str | None, target: Path, name: str, interpolated: bool) -> None:
    """Write the files of an export into an empty folder, `name` on its card."""
    disable_progress_bar()
    run = RunDir(run_dir)
    config, info = config_on(run, data), best_checkpoint(run)
    metrics = _metrics_of(run, info)
    shards = ShardSet.open(data or config.data.root)
    tokens = load_tokens(config)
    with fetched(run, info, "model", "references") as folder:
        module = build_model(config, tokens.vocab_size).eval()
        load_model(folder, module)
        references, object_ids = StoredReferences(folder, info.meta), load_object_ids(folder, info.meta)
    space = trained_space(config, references)

    _merge_adapters(target / "adapters", module)
    extra: dict[str, Any] = {}
    if interpolated:
        mixed = interpolate(module, config, shards, tokens, space, metrics["split"])
        metrics = mixed.metrics
        info = dataclasses.replace(info, meta={**info.meta, "val": mixed.val})
        extra["interpolation"] = {"share": mixed.share, "tried": mixed.tried}
    settings = settings_of(metrics)
    portable = portable_config(config, module)
    _write_model(target, portable, module, tokens)
    text_mean = None
    if space and settings.kind == "dense" and settings.weight > 0:
        text_mean = _text_mean(Encoder(module, module, portable.data, tokens, torch.device("cpu")), space, shards)
    _write_references(target, references if space else None, object_ids, text_mean)
    card = {
        "format": FORMAT,
        "mmref": __version__,
        "step": info.step,
        "config_hash": config_hash(config),
        "embed_dim": module.embed_dim,
        "objects": len(references) if space else 0,
        "refinement": asdict(settings if space else RefinementSettings(weight=0.0)),
        "val": info.meta.get("val", {}),
        **extra,
        **({"close_match": metrics["close_match"]} if "close_match" in metrics else {}),
        metrics["split"]: {k: metrics[k] for k in ("initial", "refined", "ci95", "n_queries", "n_gallery")},
    }
    (target / "config.json").write_text(json.dumps(card, indent=1), "utf-8")
    if is_plain(config):
        write_transformers(target / "transformers", config, module, tokens)
    share = extra.get("interpolation", {}).get("share")
    (target / "README.md").write_text(model_card(name, config, info, metrics, shards, share), "utf-8")


def _metrics_of(run: RunDir, info: CheckpointInfo) -> dict[str, Any]:
    """The run's metrics.json. Raises ExportError when it is missing or of another checkpoint, RunDirectoryError when it is
    damaged."""
    metrics = run.read_fields("metrics.json")
    if metrics.get("checkpoint") != info.folder:
        raise ExportError(
            f"the best checkpoint of {run.path} is {info.folder}, and metrics.json is of "
            f"{metrics.get('checkpoint', 'none')}: the refinement has not been chosen for it. Run "
            f"`mmref evaluate --model {run.path}` first."
        )
    return metrics


def portable_config(config: Config, module: MMRef) -> Config:
    """The config with its towers spelt out and without what serves training only: it loads without hub or shard set."""
    values = to_dict(config)
    towers = {"vision": module.backbone.vision_model.config, "text": module.backbone.text_model.config}
    model = values["model"]
    if isinstance(module.backbone, DualBackbone):
        found = tower_config(config.model.dual, config.model.dual_config, "model.dual").to_dict()
        found |= {f"{name}_config": tower.to_dict() for name, tower in towers.items()}
        model |= {"dual": "", "dual_config": found}
    else:
        for name, tower in towers.items():
            if IMPORT not in (model[f"{name}_config"] or {}):  # a tower from an import path stays that
                model |= {name: "", f"{name}_config": tower.to_dict()}
        model |= {"feature_cache": ""}
    model |= {"lora_image": 0, "lora_text": 0}  # merged
    values["data"]["tokenizer"] = ""
    values["loss"] |= {"w_rec": 0.0, "w_mlm": 0.0, "w_id": 0.0}  # no heads
    if config.loss.w_rec and not config.loss.w_fuse:
        values["loss"] |= {"w_guide": 0.0, "caption_weight": 0.0}  # `check_taught` refuses what follows untaught references
    values["train"] |= {"precision": "fp32", "gpu": False, "gradient_checkpointing": False}
    return from_dict(values)


def _merge_adapters(folder: Path, module: MMRef) -> None:
    """Write the adapters of each tower that has some, and make them a part of its weights."""
    for part, tower in (("image", module.backbone.vision_model), ("text", module.backbone.text_model)):
        if has_lora(tower):
            write_lora(tower, folder / part)
            merge_lora(tower)


def _write_model(folder: Path, config: Config, module: MMRef, tokens: Tokens) -> None:
    weights = {n: t.contiguous() for n, t in module.state_dict().items() if not n.startswith((*HEADS, *TRAINING_ONLY))}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.yaml").write_text(dump_yaml(config), "utf-8")
    tokens.tokenizer.save_pretrained(folder / "tokenizer")


def _write_references(
    folder: Path, references: StoredReferences | None, object_ids: list[str], text_mean: Floats | None = None
) -> None:
    """Trained rows with the ids of their objects, written as they are read; no rows where training set none."""
    tensors: dict[str, torch.Tensor | Pieces] = {}
    if references is not None:
        kept = are_set(references)
        rows = (torch.from_numpy(references[at][kept[at]]) for at in blocks(references))
        tensors["rows"] = Pieces((int(kept.sum()), *references.shape[1:]), torch.float32, rows)
        object_ids = [object_ids[i] for i in np.flatnonzero(kept)]
    else:
        object_ids = []
    tensors |= {name: torch.from_numpy(array) for name, array in zip(ID_TENSORS, pack_strings(object_ids))}
    if text_mean is not None:
        tensors["text_mean"] = torch.from_numpy(text_mean)
    with open(folder / "references.safetensors", "wb") as file:
        write_tensors(file, tensors)


def _text_mean(encoder: Encoder, space: ReferenceSpace, shards: ShardSet) -> Floats:
    """Mean code of val's captions: a search asks one sentence at a time, and one sentence has no mean to be centred by."""
    texts = read_queries(shards.index("val" if "val" in shards.splits else "train")).texts
    chosen = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[:MEAN_TEXTS]]
    with encoder:
        features = [encoder.texts(chosen[start : start + ENCODED]) for start in range(0, len(chosen), ENCODED)]
    return space.mean(np.concatenate(features))


def write_transformers(folder: Path, config: Config, module: MMRef, tokens: Tokens) -> None:
    """The towers as transformers' own models: one dual encoder, or `vision/` and `text/` with the projections beside them."""
    backbone = module.backbone
    if isinstance(backbone, PairBackbone):
        backbone.vision_model.save_pretrained(folder / "vision")
        backbone.text_model.save_pretrained(folder / "text")
        tokens.tokenizer.save_pretrained(folder / "text")
        projections = {n: p.contiguous() for n, p in backbone.state_dict().items() if "_projection." in n}
        save_file(projections, folder / "projections.safetensors", metadata={"format": "pt"})
        return
    whole = tower_config(config.model.dual, config.model.dual_config, "model.dual")
    whole.text_config.vocab_size = backbone.text_model.config.vocab_size
    dual = AutoModel.from_config(whole, dtype=torch.float32)  # a config may name the half precision of its own files
    state = backbone.state_dict()
    scale, bias = module.log_scale.detach(), module.logit_bias
    own = dual.state_dict()
    for name, tensor in own.items():
        if name == "logit_scale":
            state[name] = scale.reshape(tensor.shape)
        elif name == "logit_bias":  # SigLIP's; it alone of the alignments has one
            state[name] = torch.zeros_like(tensor) if bias is None else bias.detach().reshape(tensor.shape)
        elif name.endswith("position_ids"):
            state[name] = tensor
    dual.load_state_dict(state)
    dual.save_pretrained(folder)
    tokens.tokenizer.save_pretrained(folder)
