"""The driver of a training run as a process of its own, without the evaluation afterwards: python drive.py --config FILE ..."""

import sys

from mmref.config import load_config
from mmref.terminal.run_command import run_command
from mmref.train import trainer

trainer.RESIZE_CHECK_S = 3.0  # a run of seconds looks for more places sooner than one of days


def main() -> int:
    trainer.train(load_config(sys.argv[1:]), final_evaluation=False)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
