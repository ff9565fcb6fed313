"""Compile DeepSpeed's CPU communication ahead of time: `python -m mmref.train.build_ops` (40 s once, then a second)."""

import os


def build() -> None:
    """Build (or find) the op that `deepspeed.initialize` would otherwise build in the first minute of a run."""
    import torch

    if torch.cuda.is_available():
        return  # NCCL is used instead
    os.environ["DS_ACCELERATOR"] = "cpu"
    from mmref.train.engine import prepare_node

    prepare_node()


if __name__ == "__main__":
    build()
