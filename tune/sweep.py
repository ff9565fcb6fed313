"""Search hyper-parameters: `python tune/sweep.py --space tune/spaces/default.yaml --trials 16 --config configs/x.yaml`."""

import sys

from mmref.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
