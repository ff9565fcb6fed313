"""What a GPU can compute at most, by its name: the denominator of MFU (model FLOPs utilization)."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

TERA = 1e12


class Peak(NamedTuple):
    """Dense TFLOP/s of one GPU, without sparsity; None where it has no units for that precision."""

    words: tuple[str, ...]  # of the name that the driver gives, all of them
    bf16: float | None  # products of bf16, sums in fp32
    tf32: float | None
    fp32: float


# From NVIDIA's data sheets, whose figures with sparsity are halved. The first line whose words are all in a name counts.
PEAKS = (
    Peak(("B200",), 2250, 1125, 75),  # HGX B200: eight of them have 36 PFLOP/s of bf16 with sparsity
    Peak(("H200", "NVL"), 835.5, 417.5, 60),  # H200 data sheet
    Peak(("H200",), 989.5, 494.5, 67),
    Peak(("GH200",), 989.5, 494.5, 67),  # GH200 data sheet
    Peak(("H100", "NVL"), 835.5, 417.5, 60),  # H100 data sheet
    Peak(("H100", "PCIE"), 756, 378, 51),
    Peak(("H100",), 989.5, 494.5, 67),  # SXM: the driver says "H100 80GB HBM3"
    Peak(("A100",), 312, 156, 19.5),  # A100 data sheet, SXM and PCIe alike
    Peak(("A40",), 149.7, 74.8, 37.4),  # A40 data sheet
    Peak(("A30",), 165, 82, 10.3),  # A30 data sheet
    Peak(("A10",), 125, 62.5, 31.2),  # A10 data sheet
    Peak(("L40S",), 362, 183, 91.6),  # L40S data sheet
    Peak(("L40",), 181, 90.5, 90.5),  # L40 data sheet
    Peak(("L4",), 121, 60, 30.3),  # L4 data sheet
    Peak(("RTX", "4090"), 165.2, 82.6, 82.6),  # Ada GPU architecture white paper, appendix A
    Peak(("RTX", "3090"), 71, 35.6, 35.6),  # Ampere GA102 GPU architecture white paper, appendix A
    Peak(("V100",), None, None, 15.7),  # V100 data sheet, SXM2
    Peak(("T4",), None, None, 8.1),  # T4 data sheet
)


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of a GPU by the name that the driver gives it; None for one that is not in the table, or a slice of one (MIG).

    Args:
        precision: "bf16", "tf32" or "fp32".
    """
    words = set(re.split(r"[\s-]+", name.upper()))
    if "MIG" in words:
        return None
    found = next((peak for peak in PEAKS if words.issuperset(peak.words)), None)
    tera = None if found is None else {"bf16": found.bf16, "tf32": found.tf32, "fp32": found.fp32}[precision]
    return None if tera is None else tera * TERA


def multiplied_in(bf16: bool) -> str:
    """Precision in which a GPU multiplies: that of the run, or TF32 where the process allows it in the place of fp32."""
    return "bf16" if bf16 else "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
