"""The losses of MMRef: one pure function a file, computed in fp32, (tensors) -> scalar.

Each has a slow brute-force twin in tests/losses/.
"""

from mmref.losses.infonce import infonce
from mmref.losses.reconstruction import reconstruction_loss
from mmref.losses.reference import reference_loss, scale_gradient
from mmref.losses.sdm import sdm

__all__ = ["infonce", "reconstruction_loss", "reference_loss", "scale_gradient", "sdm"]
