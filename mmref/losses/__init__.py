"""The losses of MMRef: one pure function a file, computed in fp32, and `objective`, which puts them together.

Each loss has a slow brute-force twin in tests/losses/.
"""

from mmref.losses.agreement import agreement, agreement_weights
from mmref.losses.identity import identity_loss
from mmref.losses.infonce import infonce
from mmref.losses.reconstruction import reconstruction_loss
from mmref.losses.reference_contrast import reference_loss
from mmref.losses.sdm import sdm
from mmref.losses.sigmoid import sigmoid
from mmref.losses.soft_targets import soft_targets
from mmref.losses.triplet_alignment import triplet_alignment

__all__ = [
    "agreement",
    "agreement_weights",
    "identity_loss",
    "infonce",
    "reconstruction_loss",
    "reference_loss",
    "sdm",
    "sigmoid",
    "soft_targets",
    "triplet_alignment",
]
