"""Which processor a model computes on in this process."""

from __future__ import annotations

import torch

from mmref.errors import ModelError


def chosen_device(asked: str | torch.device = "auto") -> torch.device:
    """The device that was asked for; `auto`: the GPU where there is one. Raises ModelError for one that is not there."""
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise ModelError(f"the device {asked!r} is none that PyTorch knows ({said}): give auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"the device {asked} is not here: PyTorch sees no GPU. Leave it out, or give `cpu`.")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # of a kind that this PyTorch was built without, a GPU that is not there
        said = str(error).splitlines()[0]
        raise ModelError(f"the device {asked} cannot be used ({said}): give auto, cpu or cuda.") from None
    return device


def described(device: torch.device) -> str:
    """What a device is called where it is told: "GPU NVIDIA H200", "CPU"."""
    return f"GPU {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type.upper()
