"""Compare rows: `python tune/ablate.py --rows tune/rows/default.yaml --config configs/emoji.yaml --seeds 0 1 2`."""

import sys

from mmref.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablate", *sys.argv[1:]]))
