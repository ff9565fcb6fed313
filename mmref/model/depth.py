"""How deep in its tower a parameter lies: what fine-tuning locks, or gives a lower learning rate, by.

Towers name their layers in many ways. All of them hold them in a list of modules, the largest they have, and register what
comes before the layers ahead of it and what comes after behind it.
"""

from __future__ import annotations

from torch import nn

from mmref.errors import ModelError


def layers_of(tower: nn.Module, field: str) -> nn.ModuleList:
    """The layers of a tower; of one in stages (ConvNeXt, Swin) the stages. Raises ModelError for a tower without any.

    Args:
        field: of the config that asks, for the error.
    """
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList) and len(module)]
    sizes = [sum(p.numel() for p in found.parameters()) for found in lists]
    if not any(sizes):
        raise ModelError(
            f"`{field}` goes by the layers of a tower, and {type(tower).__name__} has no list of them: leave it off for it."
        )
    return lists[sizes.index(max(sizes))]  # of equal ones the outer


def depths(tower: nn.Module, field: str) -> dict[str, int]:
    """Depth of each parameter by its name in the tower: 0 before the first layer, 1 for the first, ... and one more behind the
    last. Raises ModelError."""
    layers = layers_of(tower, field)
    inside = {id(p): number for number, layer in enumerate(layers, start=1) for p in layer.parameters()}
    found, depth = {}, 0
    for name, p in tower.named_parameters():
        if id(p) in inside:
            found[name] = inside[id(p)]
            depth = len(layers) + 1  # of what is registered from here on
        else:
            found[name] = depth
    return found


def lock(tower: nn.Module, layers: int | str, field: str) -> list[nn.Module]:
    """Keep a tower's first layers and what lies before them as they are, or all of it; returns the modules that are locked
    whole, which belong in evaluation mode. Raises ModelError for more layers than there are.

    Args:
        layers: how many, or "all".
        field: of the config, for errors.
    """
    if layers == "all":
        tower.requires_grad_(False)
        return [tower]
    if not layers:
        return []
    count = len(layers_of(tower, field))
    if int(layers) > count:
        raise ModelError(f"`{field}` {layers}: {type(tower).__name__} has {count} layers. Give at most {count}, or `all`.")
    where = depths(tower, field)
    for name, p in tower.named_parameters():
        if where[name] <= int(layers):
            p.requires_grad_(False)
    return [m for m in tower.modules() if any(True for _ in m.parameters()) and not any(p.requires_grad for p in m.parameters())]
