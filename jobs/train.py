"""Train MMRef: `python jobs/train.py --config configs/emoji.yaml`, or behind `ray job submit --working-dir . --`."""

import sys

from mmref.cli import run_command, train

if __name__ == "__main__":
    sys.exit(run_command(lambda: train(sys.argv[1:])))
