"""LoRA (Hu et al. 2021, arXiv:2106.09685) on the linear layers of a tower, by `peft`: added, merged, written as its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from mmref.errors import ModelError
from mmref.extras import need
from mmref.model.depth import layers_of

MARK = "lora_"  # in the names of the adapters' parameters
PREFIX = "base_model.model."  # of names in the files of peft


def add_lora(tower: nn.Module, rank: int, alpha: float, field: str) -> None:
    """Give each linear layer inside a tower's layers an adapter, and train nothing else of the tower. At first they add nothing.

    Raises ExtraMissingError where peft is not installed, ModelError where the tower has no linear layers.
    """
    need("lora", f"`{field}`")
    from peft import LoraConfig, inject_adapter_in_model

    inside = {id(m) for m in layers_of(tower, field).modules()}
    targets = [name for name, m in tower.named_modules() if id(m) in inside and type(m) is nn.Linear]
    if not targets:
        raise ModelError(f"`{field}`: {type(tower).__name__} has no linear layer that could have an adapter. Leave it 0.")
    settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "target_modules": targets}  # alpha is declared as whole
    inject_adapter_in_model(LoraConfig(**settings), tower)
    for name, p in tower.named_parameters():
        p.requires_grad_(MARK in name)


def has_lora(tower: Any) -> bool:
    return hasattr(tower, "peft_config")


def below_adapters(model: nn.Module) -> set[str]:
    """Names of the parameters of towers with adapters that are none of them: those of the model that training started from,
    which checkpoints leave out."""
    towers = [f"{name}." for name, module in model.named_modules() if has_lora(module)]
    return {name for name, _ in model.named_parameters() if MARK not in name and name.startswith(tuple(towers))}


def write_lora(tower: Any, folder: Path) -> None:
    """Write a tower's adapters as peft does, for `PeftModel.from_pretrained(tower, folder)`."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    weights = {PREFIX + name: p.contiguous() for name, p in get_peft_model_state_dict(tower, save_embedding_layers=False).items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (config,) = tower.peft_config.values()
    config.save_pretrained(str(folder))


def merge_lora(tower: Any) -> None:
    """Add the adapters to the weights that they adapt, and leave the tower as it was without any."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(tower.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(tower.get_submodule(parent), own, module.get_base_layer())
    del tower.peft_config
