"""Towers as somebody else's package brings them: a vision tower from an import path, a text tower's folder in a package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel

from support.tiny_set import BERT

CODE = """
import torch
from types import SimpleNamespace

class Maps(torch.nn.Module):
    '''(B, 3, H, W) -> feature maps (B, width, H / 4, W / 4), with batch statistics and dropout.'''
    def __init__(self, width=12, counts=True):
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width)
        self.conv = torch.nn.Conv2d(3, width, 4, stride=4)
        self.norm, self.drop = torch.nn.BatchNorm2d(width), torch.nn.Dropout(0.5)
        if not counts:
            self.norm.num_batches_tracked = None
        self.calls = self.rows = 0

    def forward(self, pixel_values):
        self.calls, self.rows = self.calls + 1, self.rows + len(pixel_values)
        return SimpleNamespace(last_hidden_state=self.drop(self.norm(self.conv(pixel_values))))

maps = Maps

class Bare(torch.nn.Module):
    pass

def function():
    return Maps(4)

number = 3
"""
VISION = {"import": "tiny_towers:maps", "width": 6}
TEXT = "package://tiny_words/weights/bert"
FROZEN: dict[str, Any] = {
    "model.vision_config": VISION, "model.text_config": None, "model.text": TEXT, "model.adapter_layers": 1,
    "model.freeze_backbone": True, "data.crop_padding": 0,
}  # fmt: skip


def install(folder: Path, tokenizer: Path) -> None:
    """Write both packages into a folder that is on sys.path, the text tower with a tokenizer beside it."""
    (folder / "tiny_towers.py").write_text(CODE)
    words = folder / "tiny_words"
    words.mkdir()
    (words / "__init__.py").write_text("raise ImportError('found without being imported')\n")
    torch.manual_seed(3)
    AutoModel.from_config(AutoConfig.for_model(**BERT)).save_pretrained(words / "weights" / "bert")
    for file in tokenizer.iterdir():
        shutil.copy(file, words / "weights" / "bert")
