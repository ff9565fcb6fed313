"""Evaluate a run: `python jobs/evaluate.py --model RUN --data SHARDS --split test --out metrics.json`."""

import sys

from mmref.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
