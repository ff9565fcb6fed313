"""Train MMRef: `python jobs/train.py --config configs/emoji.yaml`, or behind `ray job submit --working-dir . --`."""

import sys

from mmref.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
