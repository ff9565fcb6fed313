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
    if device.type == "cuda":
        _check_gpu(asked, device)
    elif device.type != "cpu":
        try:
            torch.zeros(1, device=device)
        except (RuntimeError, NotImplementedError, AssertionError) as error:  # of a kind that this PyTorch was built without
            said = str(error).splitlines()[0]
            raise ModelError(f"the device {asked} cannot be used ({said}): give auto, cpu or cuda.") from None
    return device


def _check_gpu(asked: str | torch.device, device: torch.device) -> None:
    """Raise ModelError where a GPU is not there. Nothing is put on one: a process that has begun to use it cannot be forked."""
    if not torch.cuda.is_available():
        raise ModelError(f"the device {asked} is not here: PyTorch sees no GPU. Leave it out, or give `cpu`.")
    if (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"the device {asked} is not here: PyTorch sees {torch.cuda.device_count()}, counted from 0.")


def described(device: torch.device) -> str:
    """What a device is called where it is told: "GPU NVIDIA H200", "CPU"."""
    return f"GPU {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type.upper()
