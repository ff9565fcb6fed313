"""Any model by what names it, ready to be used."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from mmref.evaluate.refinement import RefinementSettings
from mmref.export.model import Model, load
from mmref.export.write import export_run
from mmref.model.device import chosen_device
from mmref.run.models import find_model, load_pretrained


def load_any(given: str | os.PathLike[str], device: str | torch.device = "auto") -> Model:
    """A model by run directory, folder of an export, or name of a pretrained one; see `mmref.load`."""
    found, on = find_model(os.path.expanduser(os.fspath(given))), chosen_device(device)
    if found.kind == "export":
        return load(found.place, on)
    if found.kind == "run":
        with tempfile.TemporaryDirectory(prefix="mmref-") as folder:
            return load(export_run(found.place, str(Path(folder) / "model")), on)
    parts = load_pretrained(found.place)
    none = RefinementSettings(weight=0.0)
    card = {"pretrained": found.place, "embed_dim": parts.module.embed_dim}
    return Model(parts.config, parts.module, parts.tokens, None, [], none, None, on, card)
